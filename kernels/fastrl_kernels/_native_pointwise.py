"""The operations between a layer's products in C++ (``csrc/pointwise.cpp``): float32 on the CPU, with gradients.

One pass over memory forward and one backward, on torch's threads; nothing is kept that can be computed again. A
gradient that is itself differentiated, or taken of many vectors at once, is the eager twin's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from fastrl_kernels._activations import KINDS
from fastrl_kernels._native import call_team, pointer, reads

Twin = Callable[..., Any]
Layout = tuple[int, ...]  # floats from one batch, token and head to the next


def _tracks(*tensors: Tensor | None) -> bool:
    """Whether a gradient of any of them is wanted."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _twins_gradients(
    twin: Twin, inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of ``twin`` in the inputs that need one, by differentiable operators."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        outs = twin(*inputs)
    given = [(out, grad) for out, grad in zip(outs, grads, strict=True) if grad is not None]
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need and x is not None]
    if not given or not wanted:
        return [None for _ in needed]
    outs, upstream = zip(*given, strict=True)
    found = iter(torch.autograd.grad(outs, wanted, upstream, create_graph=again))
    return [next(found) if need else None for need in needed]


# Gates and activations


def gated(
    gate: Tensor, up: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None, kind: str, twin: Twin
) -> Tensor:
    """``act(gate + gate_bias) * (up + up_bias)``; ``up`` None: the activation alone. ``twin``: of all five."""
    if _tracks(gate, up, gate_bias, up_bias):
        out: Any = _Gated.apply(gate, up, gate_bias, up_bias, kind, twin)
        return out
    return _gated(gate, up, gate_bias, up_bias, kind)


def _gated(gate: Tensor, up: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None, kind: str) -> Tensor:
    given = _whole(gate, up, gate_bias, up_bias)
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    call_team("fastrl_gated", *map(pointer, given), *_rows_of(gate), KINDS.index(kind), out.data_ptr())
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor | None,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        kind: str,
        twin: Twin,
    ) -> Tensor:
        ctx.save_for_backward(gate, up, gate_bias, up_bias)
        ctx.kind, ctx.twin = kind, twin
        return _gated(gate, up, gate_bias, up_bias, kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled() or not reads("fastrl_gated_backward", grad):
            found = _twins_gradients(lambda *x: (ctx.twin(*x, ctx.kind),), inputs, [grad], needed[:4])
            return *found, None, None
        gate, up, gate_bias, up_bias = inputs
        given = _whole(grad, gate, up, gate_bias, up_bias)
        grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        grad_up = None if up is None else torch.empty_like(grad_gate)
        # zeros, as C++ takes an empty ``up`` for none
        sums = gate.new_zeros((1 if up is None else 2, gate.shape[-1])) if needed[2] or needed[3] else None
        outs = (grad_gate, grad_up, sums)
        call_team(
            "fastrl_gated_backward",
            *map(pointer, given), *_rows_of(gate), KINDS.index(ctx.kind), *map(pointer, outs),
        )  # fmt: skip
        if sums is None:
            return grad_gate, grad_up, None, None, None, None
        return grad_gate, grad_up, sums[0], None if up is None else sums[1], None, None


# Norms


def rms_norm(x: Tensor, weight: Tensor, eps: float, twin: Twin) -> Tensor:
    """RMSNorm. ``twin``: of the three arguments."""
    if _tracks(x, weight):
        out: Any = _Norm.apply(x, weight, eps, twin)
        return out
    return _norm(x, None, weight, eps)[1]


def residual_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float, twin: Twin) -> tuple[Tensor, Tensor]:
    """The sum and its RMSNorm. ``twin``: of the norm."""
    if _tracks(residual, x, weight):
        both: Any = _ResidualNorm.apply(residual, x, weight, eps, twin)
        return both
    return _norm(residual, x, weight, eps)


def add_rms_norm(residual: Tensor, x: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Adds ``x`` to the residual, which is contiguous, in place. No gradient."""
    _, out = _norm(residual, x, weight, eps, residual)
    if x is not None:
        _changed(residual)
    return out


def _norm(
    residual: Tensor, x: Tensor | None, weight: Tensor, eps: float, total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The sum, into ``total`` if given, and its norm."""
    given = _whole(residual, x, weight)
    out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    if total is None:
        total = residual if x is None else torch.empty_like(out)
    call_team("fastrl_norm", *map(pointer, given), eps, *_rows_of(residual), total.data_ptr(), out.data_ptr())
    return total, out


def _norm_gradients(
    ctx: Any, total: Tensor, weight: Tensor, grad_total: Tensor | None, grad: Tensor | None, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of the sum and of the weight."""
    if grad is None:
        return grad_total, None
    if torch.is_grad_enabled() or not reads("fastrl_norm_backward", grad, grad_total):
        of_total, of_weight = _twins_gradients(lambda x, w: (ctx.twin(x, w, ctx.eps),), (total, weight), [grad], needed)
        if grad_total is not None and of_total is not None:
            of_total = of_total + grad_total
        return of_total, of_weight
    given = _whole(grad, grad_total, total, weight)
    grad_in = torch.empty_like(total, memory_format=torch.contiguous_format)
    grad_weight = weight.new_empty(weight.shape) if needed[1] else None
    call_team(
        "fastrl_norm_backward",
        *map(pointer, given), ctx.eps, *_rows_of(total), grad_in.data_ptr(), pointer(grad_weight),
    )  # fmt: skip
    return grad_in, grad_weight


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, twin: Twin) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.twin = eps, twin
        return _norm(x, None, weight, eps)[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return *_norm_gradients(ctx, x, weight, None, grad, ctx.needs_input_grad[:2]), None, None


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, weight: Tensor, eps: float, twin: Twin) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        total, out = _norm(residual, x, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.twin = eps, twin
        return total, out

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad: Tensor | None) -> Any:  # type: ignore[override]
        total, weight = ctx.saved_tensors
        residual, x, trained, *_ = ctx.needs_input_grad
        of_total, of_weight = _norm_gradients(ctx, total, weight, grad_total, grad, (residual or x, trained))
        return of_total if residual else None, of_total if x else None, of_weight, None, None


# Rotary embeddings


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sections: Sequence[int] | None, twin: Twin
) -> tuple[Tensor, Tensor]:
    """q and k [B, H, L, D] turned by angles [B or 1, L, R], with sections [3, B or 1, L, R]. ``twin``: of q and k."""
    if _tracks(q, k):
        both: Any = _Rope.apply(q, k, cos, sin, sections, twin)
        return both
    return _rope(q, k, cos, sin, sections, back=False)


def _rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sections: Sequence[int] | None, *, back: bool
) -> tuple[Tensor, Tensor]:
    q, k = _unit(q), _unit(k)
    outs = _by_token(q), _by_token(k)
    layouts = [_layout(x) for x in (q, k, k, *outs, outs[1])]
    _turn((q, k, None, *outs, None), layouts, _sizes(q, k), cos, sin, sections, back)
    return outs


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sections: Sequence[int] | None, twin: Twin
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.sections, ctx.twin, ctx.shapes = sections, twin, (q.shape, k.shape)
        return _rope(q, k, cos, sin, sections, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        if torch.is_grad_enabled() or not reads("fastrl_rope", *grads):
            zeros = [cos.new_zeros(shape).requires_grad_() for shape in ctx.shapes]  # it is linear
            return *_twins_gradients(ctx.twin, zeros, grads, (True, True)), None, None, None, None
        grad_q, grad_k = grads
        return *_rope(grad_q, grad_k, cos, sin, ctx.sections, back=True), None, None, None, None


def qkv_rope(qkv: Tensor, cos: Tensor, sin: Tensor, twin: Twin) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [N, 3, H, D] → q and k [N, H, D] turned by angles [N, R], and v in place. ``twin``: of qkv."""
    if _tracks(qkv):
        three: Any = _Split.apply(qkv, cos, sin, twin)
        return three
    return _split(qkv, cos, sin)


def _split(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    qkv = _unit(qkv)
    q, k, v = qkv.unbind(1)
    outs = q.new_empty(q.shape), q.new_empty(q.shape)
    layout, to = (0, qkv.stride(0), qkv.stride(2)), (0, outs[0].stride(0), outs[0].stride(1))
    n, heads, dim = q.shape
    _turn(
        (q, k, None, *outs, None), [layout] * 3 + [to] * 3, (1, n, heads, heads, dim), cos[None], sin[None], None, False
    )
    return *outs, v


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, twin: Twin) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.twin, ctx.shape = twin, qkv.shape
        return _split(qkv, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        if torch.is_grad_enabled() or not reads("fastrl_rope", *grads):
            zeros = cos.new_zeros(ctx.shape).requires_grad_()
            return *_twins_gradients(ctx.twin, [zeros], grads, [True]), None, None, None
        n, _, heads, dim = ctx.shape
        joint = cos.new_empty(ctx.shape)
        grads = tuple(map(_unit, grads))
        layouts = [*((0, *x.stride()[:2]) for x in grads), *[(0, 3 * heads * dim, dim)] * 3]
        tensors = (*grads, *joint.unbind(1))
        _turn(tensors, layouts, (1, n, heads, heads, dim), cos[None], sin[None], None, True)
        return joint, None, None, None


def rope_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slot: int
) -> Tensor:
    """As ``decode_layer.rope_append``, with a slot that exists. No gradient."""
    given, out = _whole(q, k, v, cos, sin), torch.empty_like(q, memory_format=torch.contiguous_format)
    rows, heads, dim = q.shape
    numbers = (c_int64 * 8)(rows, heads, k.shape[1], dim // 2, slot, *keys.stride()[:3])
    call_team("fastrl_rope_append", *map(pointer, given), numbers, *map(pointer, (out, keys, values)))
    _changed(keys)
    _changed(values)
    return out


def _turn(
    tensors: Sequence[Tensor | None], layouts: Sequence[Layout], sizes: tuple[int, ...], cos: Tensor, sin: Tensor,
    sections: Sequence[int] | None, back: bool,
) -> None:  # fmt: skip
    """``tensors``: q, k, v or None, and where they go; ``sizes``: batch, length, heads, k heads, dim."""
    cos, sin = cos.contiguous(), sin.contiguous()
    axis = (cos.stride(0), *sections[:2]) if sections else (0, 0, 0)
    batch, line = cos.stride(-3) if cos.shape[-3] > 1 else 0, cos.stride(-2)
    strides = [step for layout in layouts for step in layout]
    numbers = _numbers((*sizes, cos.shape[-1] // 2, *strides, axis[0], batch, line, *axis[1:]))
    pointers = (c_void_p * 6)(*map(pointer, tensors))
    call_team("fastrl_rope", pointers, cos.data_ptr(), sin.data_ptr(), numbers, back)


@functools.lru_cache(maxsize=256)
def _numbers(numbers: tuple[int, ...]) -> Any:
    """An array for C++, which only reads it."""
    return (c_int64 * len(numbers))(*numbers)


def _by_token(x: Tensor) -> Tensor:
    """An empty [B, H, L, D] that is stored as [B, L, H, D]."""
    batch, heads, length, dim = x.shape
    return x.new_empty((batch, length, heads, dim)).transpose_(1, 2)


def _layout(x: Tensor) -> Layout:
    batch, head, token, _ = x.stride()
    return batch, token, head


def _sizes(q: Tensor, k: Tensor) -> tuple[int, ...]:
    batch, heads, length, dim = q.shape
    return batch, length, heads, k.shape[1], dim


def _unit(x: Tensor) -> Tensor:
    """``x`` with numbers of the last dimension next to each other."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _changed(tensor: Tensor) -> None:
    """Tell autograd of a change that it did not see."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def _whole(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous ones, to be kept until the call is over."""
    return [None if x is None else x.contiguous() for x in tensors]


def _rows_of(x: Tensor) -> tuple[int, int]:
    n = x.shape[-1]
    return (x.numel() // n if n else 0), n
