"""4-bit layers on the meta device: their packed bytes, and the unpacked weight as a temporary of each product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrl.models.families import Family
from fastrl.models.quantize import quantized_bytes, quantized_layers


class Planned4bit(nn.Module):
    """Stand-in for a 4-bit layer of [out, in] weights; the backward unpacks the weight again instead of saving it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        size = quantized_bytes(self.numbers)
        self.packed = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = linear.bias

    @property
    def numbers(self) -> int:
        """Number of weights."""
        return self.in_features * self.out_features

    @property
    def weight(self) -> Tensor:
        """The unpacked weight."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        result: Any = _Product.apply(x, self)
        return result if self.bias is None else result + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Planned4bit) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.layer.weight, None


def plan_quantized(core: nn.Module, family: Family) -> None:
    """Replace the same layers as ``quantize``, with or without adapters."""
    for name, linear in quantized_layers(core, family):
        core.set_submodule(name, Planned4bit(linear))


def unpacked(core: nn.Module) -> int:
    """Number of weights in the 4-bit layers of ``core`` beyond their packed parameters' elements."""
    layers = [module for module in core.modules() if isinstance(module, Planned4bit)]
    return sum(layer.numbers - layer.packed.numel() for layer in layers)
