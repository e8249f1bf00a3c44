"""One benchmark: its inputs, our callable, the peers' callables, and the least work any implementation must do."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Run = Callable[[Inputs], tuple[Tensor, ...]]

SIZES = ("tiny", "cpu", "gpu")  # for tests; for a laptop; the sizes for which goals are stated


@dataclass(frozen=True)
class Case:
    """A benchmark. ``ours`` and every peer take the same inputs and return the same tensors, in the same order."""

    name: str  # unique, "op/variant"
    op: str  # public kernels that ``ours`` calls, joined by "+"
    shape: dict[str, int]
    make: Callable[[torch.device], Inputs]  # seeded by the caller; leaves that get gradients require them
    ours: Run
    peers: dict[str, Run | None]  # None: not installed, or cannot run on this device
    flops: float = 0.0  # of the least work, in the inputs' dtype
    bytes: float = 0.0  # least traffic
    dtype: torch.dtype = torch.float32
    graph: bool = False  # launch-bound: on a GPU it is captured once and replayed
    rounds: int | None = None  # limit on rounds, without cold-cache rounds, for calls that take seconds
    compare: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], dict[str, Any]] | None = None  # found, ours → JSON
    reset: Callable[[Inputs], None] | None = None  # undoes what a call does to its inputs; not timed
    extra: dict[str, Any] = field(default_factory=dict)  # anything worth recording beside the shape


def dtype_for(size: str) -> torch.dtype:
    """bfloat16 on a GPU, for which goals are stated, float32 elsewhere."""
    return torch.bfloat16 if size == "gpu" else torch.float32


def installed(module: str, *, gpu: bool = False) -> bool:
    """Whether a peer can run here: its module is installed, and there is a CUDA device if it needs one."""
    return importlib.util.find_spec(module) is not None and (torch.cuda.is_available() or not gpu)


def with_gradients(value: Tensor, leaves: list[Tensor], upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    """``value`` and its gradients in ``leaves``; nothing is accumulated, so a call can be repeated."""
    return (value.detach(), *torch.autograd.grad(value, leaves, upstream))


def leaf(tensor: Tensor) -> Tensor:
    """The tensor as a leaf that gets a gradient."""
    return tensor.detach().requires_grad_()
