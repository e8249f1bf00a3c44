"""liger-kernel's RMSNorm, SwiGLU and rotary embedding, patched into the layers of one model instance.

liger's own patching replaces names inside transformers' modules, and so affects every model of the process. Some of
those names no longer exist (since transformers 5.2x the rotary function takes cosines whose three axes are already
merged), so its RoPE would silently stay unused.
"""

from __future__ import annotations

from collections import Counter
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

MERGED, THREE_AXES = "apply_rotary_pos_emb", "apply_multimodal_rotary_pos_emb"
GATED = {"down_proj", "act_fn", "gate_proj", "up_proj"}  # what the forward of a plain gated layer reads


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
    """The kind of layer and liger's forward for it, recognised by its attributes and by what its code computes.

    A layer that computes something else under the same names gets none: a rotary embedding of neighbouring pairs or of
    part of a head, a norm that adds 1 to its weight, a gated layer with a clamp.
    """
    name = type(module).__name__
    if name.endswith("RMSNorm") and hasattr(module, "variance_epsilon") and _is_plain_norm(module):
        return "rms_norm", _rms_norm
    if hasattr(module, "gate_proj") and hasattr(module, "up_proj") and _is_silu(getattr(module, "act_fn", None)):
        return ("swiglu", _swiglu) if _names(module) <= GATED else (None, None)
    for function in (MERGED, THREE_AXES):
        if function in _names(module) and _is_plain_rope(module, function):
            return "rope", _with_rope(type(module).forward, function)
    return None, None


def _names(module: nn.Module) -> set[str]:
    """The attributes and globals that a layer's forward reads."""
    code = getattr(type(module).forward, "__code__", None)
    return set(code.co_names) if code is not None else set()


def _is_plain_norm(module: Any) -> bool:
    """Whether a norm computes weight · x / rms(x), tried on one vector."""
    weight = module.weight
    x = torch.linspace(-2.0, 3.0, weight.numel(), dtype=torch.float32, device=weight.device).to(weight.dtype)[None]
    wide = x.float()
    want = weight.float() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + module.variance_epsilon)
    with torch.no_grad():
        got = type(module).forward(module, x).float()
    return torch.allclose(got, want, rtol=2e-2, atol=2e-2)


def _is_plain_rope(module: Any, name: str) -> bool:
    """Whether a layer's rotary function rotates the two halves of the whole head, as liger's kernels do."""
    theirs = type(module).forward.__globals__.get(name)
    rope = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    if theirs is None or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return False
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 8, generator=rng) for heads in (4, 2))
    axes = (3,) if name == THREE_AXES else ()
    cos, sin = (torch.randn(*axes, 1, 3, 4, generator=rng).repeat(*(1 for _ in axes), 1, 1, 2) for _ in range(2))
    sections = ([1, 1, 2],) if axes else ()
    merged = [torch.cat([part[axis, ..., span] for axis, span in _SPANS], -1) if axes else part for part in (cos, sin)]
    want = [x * merged[0][:, None] + _rotate_half(x) * merged[1][:, None] for x in (q, k)]
    try:
        got = theirs(q, k, cos, sin, *sections)
    except TypeError:
        return False
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))


# Columns that each axis gives to a head of 8 with sections 1, 1 and 2, in both halves.
_SPANS = tuple(
    (axis, slice(half + start, half + end)) for half in (0, 4) for axis, start, end in ((0, 0, 1), (1, 1, 2), (2, 2, 4))
)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


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
