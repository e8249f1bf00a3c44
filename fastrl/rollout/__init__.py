"""Rollout: prompts → sampled completions. Vision once per image, prefill once per prompt, one decode for all rows."""

from fastrl.rollout.generator import Generator, Session
from fastrl.rollout.sampler import Sampling, sample

__all__ = ["Generator", "Sampling", "Session", "sample"]
