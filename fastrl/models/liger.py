"""liger-kernel's RMSNorm, SwiGLU and rotary embedding, patched into the layers of one model instance.

liger's own patching replaces names inside transformers' modules, and so affects every model of the process. Some of
those names no longer exist (since transformers 5.2x the rotary function takes cosines whose three axes are already
merged), so its RoPE would silently stay unused.
"""

from __future__ import annotations

from collections import Counter
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

MERGED, THREE_AXES = "apply_rotary_pos_emb", "apply_multimodal_rotary_pos_emb"


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
    """The kind of layer and liger's forward for it, recognised by its attributes and the functions its code calls."""
    name = type(module).__name__
    if name.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return "rms_norm", _rms_norm
    if hasattr(module, "gate_proj") and hasattr(module, "up_proj") and _is_silu(getattr(module, "act_fn", None)):
        return "swiglu", _swiglu
    code = getattr(type(module).forward, "__code__", None)
    for function in (MERGED, THREE_AXES):
        if code is not None and function in code.co_names:
            return "rope", _with_rope(type(module).forward, function)
    return None, None


def _is_silu(function: Any) -> bool:
    return isinstance(function, nn.SiLU) or type(function).__name__ == "SiLUActivation"


def _rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    # in_place would overwrite the output's gradient with the input's, and a residual sum may still need the former.
    return liger_rms_norm(hidden_states, self.weight, self.variance_epsilon, in_place=False)


def _swiglu(self: Any, hidden_states: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return self.down_proj(liger_swiglu(self.gate_proj(hidden_states), self.up_proj(hidden_states)))


def _with_rope(forward: Any, name: str) -> Any:
    """A copy of ``forward`` whose globals bind ``name`` to liger's rotary embedding."""
    rotary = _three_axes if name == THREE_AXES else _merged
    changed = FunctionType(
        forward.__code__,
        {**forward.__globals__, name: rotary},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed


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
