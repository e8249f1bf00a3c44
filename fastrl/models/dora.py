"""DoRA's forward with its column scale cached while the weights do not change.

DoRA (arXiv:2402.09353, eq. 5) scales the columns of W + ΔW to the norms m: ``m / ‖W + ΔW‖``. peft computes that norm,
and so all of ΔW, in every forward. Training passes need this. A rollout would compute it for every layer and token, so
the scale is cached until the next pass with gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn


class CachedDora(DoraLinearVariant):
    """The variant of one module. Training passes use peft's forward; others compute the same with the cached scale."""

    def __init__(self) -> None:
        self._cached: tuple[tuple[int, ...], Tensor] | None = None
        self._place: Tensor | None = None  # of the scale: a captured decode step reads it where it was

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """The layer's output; ``result`` is the base layer's output for ``x``."""
        if module.training or torch.is_grad_enabled():
            self._cached = None
            return DoraLinearVariant.forward(module, active_adapter, x, result, **kwargs)
        scale = self._scale(module, active_adapter, x)
        base = module.get_base_layer()
        plain = result if base.bias is None else result - base.bias
        update = module.lora_B[active_adapter](module.lora_A[active_adapter](x)) * module.scaling[active_adapter]
        return result + ((scale - 1) * plain + scale * update)

    def _scale(self, module: Any, adapter: str, x: Tensor) -> Tensor:
        """``m / ‖W + ΔW‖`` [1, out], computed in the same dtypes as peft."""
        magnitude = module.lora_magnitude_vector[adapter]
        low, high = module.lora_A[adapter], module.lora_B[adapter]
        # In-place updates by an optimizer increment their versions
        state = tuple(p._version for p in (low.weight, high.weight, magnitude.weight, module.get_base_layer().weight))
        if self._cached is None or self._cached[0] != state:
            from peft.utils.integrations import dequantize_module_weight

            weight = dequantize_module_weight(module.get_base_layer()).to(x.dtype)
            update = magnitude.get_lora_weight(low, high).to(x.dtype)
            norm = magnitude.get_weight_norm(weight, update, module.scaling[adapter])
            scale = (magnitude.weight / norm).view(1, -1)
            place = self._place
            if place is not None and (place.dtype, place.device) == (scale.dtype, scale.device):
                scale = place.copy_(scale)
            self._place, self._cached = scale, (state, scale)
        return self._cached[1]


def keep_scales(core: nn.Module) -> None:
    """Use :class:`CachedDora` in every linear layer of ``core`` that has DoRA adapters."""
    for module in core.modules():
        variants = getattr(module, "lora_variant", None) or {}
        for name, variant in variants.items():
            if type(variant) is DoraLinearVariant:
                variants[name] = CachedDora()
