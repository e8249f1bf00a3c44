"""Activation offload: the layer inputs that checkpointing keeps stay on the host between forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

SMALLEST = 1 << 16  # bytes; smaller tensors stay on the device


class _Held(NamedTuple):
    tensor: Tensor | None  # on the host; None on the meta device, which has nothing to keep
    device: torch.device
    shape: torch.Size
    dtype: torch.dtype


def offload_checkpoints(core: Any) -> None:
    """Keep the inputs of a model's checkpointed layers on the host; gradients are bit-identical.

    Each input is copied to pinned memory when its layer starts and back when the layer is recomputed, both in stream
    order. This costs two copies of [tokens, hidden] per layer. Call ``use_checkpointing`` first.

    Raises:
        ValueError: no layer of ``core`` is checkpointed.
    """
    layers = [m for m in core.modules() if getattr(m, "gradient_checkpointing", False)]
    layers = [m for m in layers if hasattr(m, "_gradient_checkpointing_func")]
    if not layers:
        raise ValueError("offload_checkpoints: no layer is checkpointed")
    for layer in layers:
        layer._gradient_checkpointing_func = _offloaded(layer._gradient_checkpointing_func)


def _offloaded(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # The checkpoint drops what the layer saves, so these hooks only see what the checkpoint itself keeps.
        with torch.autograd.graph.saved_tensors_hooks(to_host, from_host):
            return checkpoint(function, *args, **kwargs)

    return run


def to_host(tensor: Tensor) -> Tensor | _Held:
    """Copy a tensor to the host; leaves (weights) and small tensors are returned unchanged."""
    if tensor.is_leaf or tensor.numel() * tensor.element_size() < SMALLEST:
        return tensor
    if tensor.is_meta:
        return _Held(None, tensor.device, tensor.shape, tensor.dtype)
    held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    held.copy_(tensor, non_blocking=tensor.is_cuda)
    return _Held(held, tensor.device, tensor.shape, tensor.dtype)


def from_host(held: Tensor | _Held) -> Tensor:
    """Copy the tensor back to its device."""
    if isinstance(held, Tensor):
        return held
    if held.tensor is None:
        return torch.empty(held.shape, dtype=held.dtype, device=held.device)
    return held.tensor.to(held.device, non_blocking=True)
