"""Recognises transformers' layers by what their code computes, for kernels that compute the same.

A class counts as a kind if its forward reads only the names that a plain layer of the kind reads, or, for norms, rotary
functions and activations, if it gives the kind's numbers for a small input. A layer that computes something else under
the same names is none: a rotary embedding of neighbouring pairs or of part of a head, a norm that adds 1 to its weight,
a gated layer with a clamp. Only classes are tried, never a model's weights, so models without data are recognised too.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

MERGED, THREE_AXES = "apply_rotary_pos_emb", "apply_multimodal_rotary_pos_emb"
GATED = {"down_proj", "act_fn", "gate_proj", "up_proj"}  # what the forward of a plain gated layer reads


def names(module: nn.Module) -> set[str]:
    """The attributes and globals that a layer's forward reads."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return set(code.co_names) if code is not None else set()


def untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module does what its class does: no subclass, no ``forward`` of its own, no hook."""
    return type(module) is kind and "forward" not in vars(module) and not hooked(module)


def hooked(module: nn.Module) -> bool:
    """Whether code is called before or after the module's forward."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own or hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


def is_plain_norm(module: nn.Module) -> bool:
    """Whether a norm computes weight · x / rms(x)."""
    named = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    return named and _computes_rms_norm(type(module))


@cache
def _computes_rms_norm(kind: Any) -> bool:
    weight, x = torch.linspace(-1.0, 2.0, 8), torch.linspace(-2.0, 3.0, 8)[None]
    try:
        got = kind.forward(SimpleNamespace(weight=weight, variance_epsilon=1e-6), x)
    except AttributeError:  # it reads more than a plain norm has
        return False
    return torch.allclose(got, weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6), atol=1e-5)


def is_gated_silu(module: nn.Module) -> bool:
    """Whether a layer computes down(silu(gate(x)) · up(x))."""
    function = getattr(module, "act_fn", None)
    silu = isinstance(function, nn.SiLU) or type(function).__name__ == "SiLUActivation"
    return silu and hasattr(module, "gate_proj") and hasattr(module, "up_proj") and names(module) <= GATED


def rotary_name(module: nn.Module) -> str | None:
    """The name of the rotary function that an attention layer calls, if it rotates the two halves of whole heads."""
    read = names(module)
    return next((name for name in (MERGED, THREE_AXES) if name in read and _is_plain_rope(module, name)), None)


def _is_plain_rope(module: Any, name: str) -> bool:
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


def with_global(forward: Any, name: str, value: Any) -> Any:
    """A copy of the function ``forward`` whose globals bind ``name`` to ``value``."""
    scope = {**forward.__globals__, name: value}
    changed = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed
