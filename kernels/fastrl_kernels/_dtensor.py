"""Detects DTensors without importing their modules, which takes seconds, when there are none."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """True for a DTensor, a sharded parameter included. Free while tracing."""
    if type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
