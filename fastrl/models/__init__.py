"""Models as policies: loading, encoding records, log-probs of packed batches with shared prompts."""

from fastrl.models.encoding import EncodeError
from fastrl.models.load import load_policy
from fastrl.models.lora import Lora
from fastrl.models.policy import Policy

__all__ = ["EncodeError", "Lora", "Policy", "load_policy"]
