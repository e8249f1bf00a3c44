"""liger-kernel's RMSNorm, SwiGLU and rotary embedding, patched into the layers of one model instance.

liger's own patching replaces names inside transformers' modules, and so affects every model of the process. Some of
those names no longer exist (since transformers 5.2x the rotary function takes cosines whose three axes are already
merged), so its RoPE would silently stay unused.
"""

from __future__ import annotations

from collections import Counter
from types import MethodType
from typing import Any

from torch import Tensor, nn

from fastrl.models.layer_kinds import THREE_AXES, is_gated_silu, is_plain_norm, rotary_name, with_global


def use_liger(core: nn.Module) -> Counter[str]:
    """Switch a loaded model's RMSNorms, gated SiLU layers and rotary embeddings to liger's kernels.

    Returns:
        How many layers of each kind were switched: ``rms_norm``, ``swiglu``, ``rope``.

    Raises:
        ImportError: liger-kernel is not installed.
        ValueError: Triton kernels do not run on the model's device, or the model has no layer to switch.
    """
    from fastrl_kernels._common import interpreting

    device = next(core.parameters()).device
    if device.type != "cuda" and not interpreting():
        raise ValueError(
            f"model.liger: liger's kernels need a GPU, and the model is on {device}; set model.liger: false"
        )
    try:
        from liger_kernel.transformers.functional import liger_rms_norm, liger_swiglu  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "model.liger: liger-kernel is not installed; pip install 'liger-kernel>=0.8.2', or set model.liger: false"
        ) from error
    done: Counter[str] = Counter()
    for module in core.modules():
        kind, forward = _replacement(module)
        if kind is not None:
            module.forward = MethodType(forward, module)
            done[kind] += 1
    if not done:
        raise ValueError(f"model.liger: found no RMSNorm, SwiGLU or rotary layer in {type(core).__name__}")
    return done


def drop_liger(core: nn.Module) -> None:
    """Undo ``use_liger``: the layers use their classes' own forward again."""
    for module in core.modules():
        kind, _ = _replacement(module)
        if kind is not None:
            module.__dict__.pop("forward", None)


def _replacement(module: nn.Module) -> tuple[str | None, Any]:
    """The kind of layer and liger's forward for it (see ``fastrl.models.layer_kinds``)."""
    if is_plain_norm(module):
        return "rms_norm", _rms_norm
    if is_gated_silu(module):
        return "swiglu", _swiglu
    name = rotary_name(module)
    if name is not None:
        return "rope", with_global(type(module).forward, name, _three_axes if name == THREE_AXES else _merged)
    return None, None


def _rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    # in_place would overwrite the output's gradient with the input's, and a residual sum may still need the former.
    return liger_rms_norm(hidden_states, self.weight, self.variance_epsilon, in_place=False)


def _swiglu(self: Any, hidden_states: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return self.down_proj(liger_swiglu(self.gate_proj(hidden_states), self.up_proj(hidden_states)))


def _merged(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """q [B, Hq, L, D], k [B, Hkv, L, D], cos and sin [1 or B, L, D]."""
    from liger_kernel.transformers.functional import liger_rope

    return liger_rope(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)


def _three_axes(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, mrope_section: list[int], unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """As ``_merged``, but cos and sin [3, B, L, D] have separate axes, as in older versions of transformers."""
    from liger_kernel.transformers.functional import liger_qwen2vl_mrope

    return liger_qwen2vl_mrope(q, k, cos, sin, mrope_section, unsqueeze_dim)
