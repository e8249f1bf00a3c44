"""The library's pointwise kernels in the layers of one model instance: on a GPU by default, unless liger's are chosen.

- RMSNorms, alone, and in layers of two RMSNorms together with the residual sums;
- the gate of gated SiLU layers, and bias and activation of other MLPs;
- rotary embeddings of text, and of vision towers together with the split of their joint projection.

Every replaced forward computes what the class' own does, and falls back on it where the kernel cannot: other dtypes,
weights that only the layer's own call gathers or that a wrapper holds, hooks on the parts that a kernel joins.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrl.models.layer_kinds import (
    THREE_AXES,
    hooked,
    is_gated_silu,
    is_plain_norm,
    names,
    rotary_name,
    untouched,
    with_global,
)
from fastrl_kernels._activations import KINDS, activate
from fastrl_kernels._triton import HAS_TRITON
from fastrl_kernels.bias_activation import bias_activation
from fastrl_kernels.gated import silu_mul
from fastrl_kernels.rms_norm import residual_rms_norm, rms_norm
from fastrl_kernels.rope import qkv_rope, rope

# Names of the parts of layers of two norms, and of MLPs without a gate: all that the layer's forward reads.
LAYERS = (("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"), ("norm1", "attn", "norm2", "mlp"))
MLPS = (("fc1", "act", "fc2"), ("fc1", "activation_fn", "fc2"), ("linear_fc1", "act_fn", "linear_fc2"))
MLPS += (("linear_1", "act", "linear_2"),)
TOWER = {"qkv", "proj", "apply_rotary_pos_emb_vision", "get_max_seqlen", "is_flash_attention_requested"}


def fuses(device: torch.device) -> bool:
    """Whether the kernels run on ``device``."""
    return HAS_TRITON and device.type == "cuda"


def use_fused(core: nn.Module) -> Counter[str]:
    """Switch a model's layers to the library's pointwise kernels.

    Returns:
        How many layers of each kind were switched: ``rms_norm``, ``gated``, ``mlp``, ``rope``, ``tower``, ``layer``.
    """
    done: Counter[str] = Counter()
    for module in core.modules():
        kind, forward = _replacement(module)
        if kind is not None and "forward" not in vars(module):
            module.forward = MethodType(forward, module)
            done[kind] += 1
    return done


@contextmanager
def fused(core: nn.Module) -> Iterator[None]:
    """:func:`use_fused` in a block."""
    before = {id(module) for module in core.modules() if "forward" in vars(module)}
    use_fused(core)
    try:
        yield
    finally:
        for module in core.modules():
            if id(module) not in before:
                module.__dict__.pop("forward", None)


def _replacement(module: nn.Module) -> tuple[str | None, Any]:
    """The kind of layer (see ``fastrl.models.layer_kinds``) and the forward for it."""
    if is_plain_norm(module):
        return "rms_norm", _norm
    if is_gated_silu(module):
        return "gated", _gated
    children, read = dict(module.named_children()), names(module)
    for parts in LAYERS:
        if read == set(children) == set(parts) and all(is_plain_norm(children[name]) for name in parts[::2]):
            return "layer", _layer_forward(type(module), parts)
    for parts in MLPS:
        kind = _activation_kind(children.get(parts[1])) if read == set(children) == set(parts) else None
        if kind is not None:
            return "mlp", partial(_mlp, parts, kind)
    if read >= TOWER and set(children) == {"qkv", "proj"}:
        return "tower", _tower
    name = rotary_name(module)
    if name is not None:
        return "rope", with_global(type(module).forward, name, _three_axes if name == THREE_AXES else _merged)
    return None, None


def _activation_kind(function: Any) -> str | None:
    """Which of the kernels' activations a module computes, by its numbers."""
    if not isinstance(function, nn.Module) or list(function.parameters()):
        return None
    x = torch.linspace(-4.0, 4.0, 33, dtype=torch.float64)
    got = function(x)
    return next((kind for kind in KINDS if torch.allclose(got, activate(x, kind), rtol=0, atol=1e-9)), None)


# The forwards


def _plain(weight: Tensor, x: Tensor) -> bool:
    """Whether a kernel may read ``weight`` beside ``x``: of its dtype, whole, and in one place."""
    kind = type(weight) is nn.Parameter or type(weight) is Tensor
    return kind and weight.dtype == x.dtype and weight.device == x.device and not hasattr(weight, "ds_id")


def _joins(module: nn.Module, x: Tensor) -> bool:
    """Whether a kernel may take over part of a layer: a plain linear one, without anything around it."""
    return untouched(module, nn.Linear) and _plain(module.weight, x)  # type: ignore[arg-type]


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    if not _plain(self.weight, hidden_states):
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _gated(self: Any, hidden_states: Tensor) -> Tensor:
    gate, up = self.gate_proj, self.up_proj
    alike = (gate.bias is None) == (up.bias is None) if _joins(gate, hidden_states) else False
    if not (alike and _joins(up, hidden_states)):
        return self.down_proj(silu_mul(gate(hidden_states), up(hidden_states)))
    products: Any = _TwoProducts.apply(hidden_states, gate.weight, up.weight)
    return self.down_proj(silu_mul(*products, gate_bias=gate.bias, up_bias=up.bias))


class _TwoProducts(torch.autograd.Function):
    """Two products of one input. Its gradient is summed inside the second product of the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, first, second)
        return F.linear(x, first), F.linear(x, second)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        of_weights = [g.t() @ rows if need else None for g, need in zip(flat, ctx.needs_input_grad[1:], strict=True)]
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = torch.addmm(flat[0] @ weights[0], flat[1], weights[1]).view(x.shape)
        return of_x, *of_weights


def _mlp(parts: tuple[str, str, str], kind: str, self: Any, hidden_states: Tensor) -> Tensor:
    first, last = getattr(self, parts[0]), getattr(self, parts[2])
    if _joins(first, hidden_states):
        return last(bias_activation(F.linear(hidden_states, first.weight), first.bias, kind=kind))
    return last(bias_activation(first(hidden_states), kind=kind))


def _layer_forward(kind: type, parts: tuple[str, str, str, str]) -> Callable[..., Any]:
    """The forward of a layer of two norms: h += attention(norm(h)); h += mlp(norm(h))."""
    first, attention, second, mlp = parts
    known = list(inspect.signature(inspect.unwrap(kind.forward)).parameters.values())[2:]
    positional = [p.name for p in known if p.kind is p.POSITIONAL_OR_KEYWORD]
    defaults = {p.name: p.default for p in known if p.default is not p.empty}

    def compute(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = defaults | dict(zip(positional, args, strict=False)) | kwargs
        residual, normed = _residual_norm(getattr(self, first), hidden_states, None)
        attended = getattr(self, attention)(hidden_states=normed, **given)
        attended = attended[0] if isinstance(attended, tuple) else attended
        residual, normed = _residual_norm(getattr(self, second), residual, attended)
        return residual + getattr(self, mlp)(normed)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training and _checkpoints_in_forward():
            return self._gradient_checkpointing_func(partial(compute, self, **kwargs), *args)
        return compute(self, *args, **kwargs)

    return forward


@cache
def _checkpoints_in_forward() -> bool:
    """Whether transformers checkpoints in a layer's forward, which is replaced here, or around it (before 5.2x)."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" not in vars(GradientCheckpointingLayer)


def _residual_norm(norm: Any, residual: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
    """The residual after the sum, and its norm."""
    fits = x is None or (x.dtype == residual.dtype and x.shape == residual.shape)
    if fits and _plain(norm.weight, residual) and not hooked(norm):
        return residual_rms_norm(residual, x, norm.weight, norm.variance_epsilon)
    total = residual if x is None else residual + x
    return total, norm(total)


def _tower(
    self: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    max_seqlen: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """A vision tower's attention with its rotary embedding, as one variable-length call; else the class' own."""
    scope = inspect.unwrap(type(self).forward).__globals__
    if position_embeddings is None or not scope["is_flash_attention_requested"](self.config):
        return type(self).forward(
            self, hidden_states, cu_seqlens, position_embeddings=position_embeddings, max_seqlen=max_seqlen, **kwargs
        )
    qkv = self.qkv(hidden_states).view(len(hidden_states), 3, self.num_heads, -1)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in qkv_rope(qkv, *position_embeddings))
    longest = scope["get_max_seqlen"](cu_seqlens, self.config, kwargs={"max_seqlen": max_seqlen})
    lengths = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
    lengths |= {"max_length_q": longest, "max_length_k": longest}
    interface = scope["ALL_ATTENTION_FUNCTIONS"].get_interface(
        self.config._attn_implementation, scope["eager_attention_forward"]
    )
    dropout = self.attention_dropout if self.training else 0.0
    options = {"attention_mask": None, "scaling": self.scaling, "dropout": dropout, "is_causal": False}
    attended, _ = interface(self, q, k, v, **options, **lengths, **kwargs)
    return self.proj(attended.reshape(len(hidden_states), -1))


def _merged(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """q [B, Hq, L, D], k [B, Hkv, L, D], cos and sin [1 or B, L, D]."""
    return rope(q, k, cos, sin)


def _three_axes(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, mrope_section: list[int], unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """As ``_merged``, but cos and sin [3, B, L, D] have separate axes, as in older versions of transformers."""
    return rope(q, k, cos, sin, sections=mrope_section)
