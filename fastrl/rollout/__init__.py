"""Rollout: prompts → sampled completions. Vision once per image, prefill once per prompt, one decode for all rows."""

from fastrl.rollout.generator import Generator, Session
from fastrl.rollout.sampler import Sampling, sample
from fastrl.rollout.vllm import VllmGenerator
from fastrl.rollout.vllm_weights import RolloutError

__all__ = ["Generator", "RolloutError", "Sampling", "Session", "VllmGenerator", "sample"]
