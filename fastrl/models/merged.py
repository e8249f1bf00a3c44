"""Merged weights for sampling: a copy W + s B A of every adapted linear layer, in W's dtype.

A rollout decodes many tokens with the same weights, and with merged ones each token costs what it does without
adapters. The weights that are trained are not touched: for a block, the adapted layers are exchanged for plain ones.

An update B A is often smaller than half of the distance between two neighbouring bfloat16 numbers, and rounding to the
nearest would return W, so that the sampler would be the base model. So sums are rounded up or down at random, with
the probability that makes the rounded number's mean the sum (stochastic rounding); the random numbers are the same
in every rollout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.models.layer_kinds import untouched
from fastrl.models.lora import merged_sum

LOW_BITS = 16  # of a float32 number that bfloat16 does not have


def mergeable(core: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Parent, name and module of every adapted layer whose weights can be merged: those on plain linear layers."""
    from peft.tuners.lora import LoraLayer

    return [
        (parent, name, child)
        for parent in core.modules()
        for name, child in parent.named_children()
        if isinstance(child, LoraLayer)
        and untouched(child.get_base_layer(), nn.Linear)
        and not (child.merged or child.disable_adapters)
    ]


def merged_bytes(core: nn.Module) -> int:
    """Bytes of the merged copies."""
    weights = [module.get_base_layer().weight for _, _, module in mergeable(core)]
    return sum(weight.numel() * weight.element_size() for weight in weights)


class Merged:
    """Plain layers with the merged weights of ``core`` at the time of the call. Biases are shared."""

    @torch.no_grad()
    def __init__(self, core: nn.Module) -> None:
        self._layers = [
            (parent, name, module, _plain(module, seed)) for seed, (parent, name, module) in enumerate(mergeable(core))
        ]

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def active(self) -> Iterator[None]:
        """A block in which the model computes with them, without gradients or adapters."""
        for parent, name, _, plain in self._layers:
            setattr(parent, name, plain)
        try:
            yield
        finally:
            for parent, name, module, _ in self._layers:
                setattr(parent, name, module)


def _plain(module: Any, seed: int) -> nn.Linear:
    base = module.get_base_layer()
    plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    weight = rounded(merged_sum(module, base.weight), base.weight.dtype, seed)
    plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), base.bias
    return plain.eval()


def rounded(x: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """``x`` in ``dtype``: float32 to bfloat16 by stochastic rounding, numbers that have the dtype's precision exactly;
    others to the nearest."""
    if dtype != torch.bfloat16 or x.dtype != torch.float32:
        return x.to(dtype)
    rng = None if x.is_meta else torch.Generator(x.device).manual_seed(seed)
    bits = torch.randint(0, 1 << LOW_BITS, x.shape, dtype=torch.int32, device=x.device, generator=rng)
    bits += x.view(torch.int32)  # a carry out of the low bits rounds away from zero
    bits &= -1 << LOW_BITS
    return bits.view(torch.float32).to(dtype)
