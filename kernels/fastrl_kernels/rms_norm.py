"""RMSNorm, alone or with the residual sum before it, for training: forward and backward in one launch each.

    total = residual + x;    y = w * total / sqrt(mean total^2 + eps)

(Zhang and Sennrich, arXiv 1910.07467, eq. 4.) With ``r = 1 / sqrt(mean t^2 + eps)``, ``n = r t`` and the upstream
gradients ``g`` of y and ``d`` of the total:

    dt = d + r (w g - n mean(w g n)),    dw = sum over rows of g n,    dresidual = dx = dt

Why it is fast: a norm written in torch is six kernels forward and about twelve backward, most of them on float32 copies
that are kept in between. Here a row stays in registers. The forward reads what it adds and writes the sum and its norm;
the backward reads the sum, from which it computes ``r`` again, and both gradients, so that the sum of the residual's
gradients costs no pass of its own. Weight gradients are summed per block of rows and then over blocks in a fixed order:
no atomics, bitwise reproducible. Sums are float32; the normalised row is rounded to its dtype before its weight, as
transformers' norms do.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl_kernels import _native_pointwise
from fastrl_kernels._common import (
    FLOATS,
    check,
    check_dtype,
    check_same_device,
    check_shape,
    contiguous,
    launch,
    refuse_forward_mode,
    use_operator,
)
from fastrl_kernels._native import reads
from fastrl_kernels._triton import tl, triton

MAX_HIDDEN = 8192  # of a row that stays in the registers of one program
_BLOCKS = 1024  # of rows, at most, whose weight gradients are summed apart
_LEAST_ROWS = 8  # of a block


@triton.jit
def rms_norm_kernel(
    residual,  # [R, H], contiguous
    x,  # [R, H], contiguous, or None
    weight,  # [H]
    total,  # [R, H], contiguous; may be the residual. Written if x is given
    out,  # [R, H], contiguous
    hidden,
    eps,
    BLOCK: tl.constexpr,
):
    """One row."""
    h = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * hidden + h
    inside = h < hidden
    summed = tl.load(residual + at, mask=inside, other=0.0)
    if x is not None:
        summed = (summed.to(tl.float32) + tl.load(x + at, mask=inside, other=0.0).to(tl.float32)).to(summed.dtype)
        tl.store(total + at, summed, mask=inside)
    wide = summed.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / hidden + tl.cast(eps, tl.float32))
    normed = (wide * scale).to(summed.dtype).to(tl.float32)
    w = tl.load(weight + h, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (normed * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward_kernel(
    grad,  # [R, H], of the norm, contiguous
    grad_total,  # [R, H], of the sum, contiguous, or None
    total,  # [R, H], contiguous
    weight,  # [H]
    grad_in,  # [R, H], contiguous
    partials,  # [blocks, H] float32, or None: the weight takes no gradient
    rows,
    hidden,
    block_rows,
    eps,
    BLOCK: tl.constexpr,
):
    """``block_rows`` rows, one after another."""
    block = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    inside = h < hidden
    w = tl.load(weight + h, mask=inside, other=0.0).to(tl.float32)
    summed = tl.zeros([BLOCK], tl.float32)
    for i in range(block_rows):
        row = block * block_rows + i
        live = inside & (row < rows)
        at = row * hidden + h
        raw = tl.load(total + at, mask=live, other=0.0)
        g = tl.load(grad + at, mask=live, other=0.0).to(tl.float32)
        t = raw.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(t * t, 0) / hidden + tl.cast(eps, tl.float32))
        n = t * scale
        summed += g * n.to(raw.dtype).to(tl.float32)
        if BLOCK > 4096:  # a long row leaves no registers for the weight
            w = tl.load(weight + h, mask=live, other=0.0).to(tl.float32)
        g *= w
        d = scale * (g - n * (tl.sum(g * n, 0) / hidden))
        if grad_total is not None:
            d += tl.load(grad_total + at, mask=live, other=0.0).to(tl.float32)
        tl.store(grad_in + at, d.to(grad_in.dtype.element_ty), mask=live)
    if partials is not None:
        tl.store(partials + block * hidden + h, summed, mask=inside)


def power_of_two(size: int) -> int:
    """The smallest power of two not below ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def norm_warps(hidden: int, numbers: int = 16) -> int:
    """Warps of a program over a row of ``hidden`` numbers: ``numbers`` for a thread. Rows that begin at odd places are
    never those of one warp, as the compiler sends them through shared memory."""
    return min(max(power_of_two(hidden) // (32 * numbers), 1 if hidden % 16 == 0 else 2), 16)


def norm_block(hidden: int) -> int:
    """Numbers of a program over a row of ``hidden``: one for a thread at least, as two warps that held the same number
    would race where the sum takes the residual's place."""
    return max(power_of_two(hidden), 32 * norm_warps(hidden))


def block_rows(rows: int) -> int:
    """Rows of a block: few enough for many programs, and no more than ``_BLOCKS`` blocks."""
    return max(_LEAST_ROWS, -(-rows // _BLOCKS))


@torch.library.custom_op("fastrl::rms_norm", mutates_args=())
def _norm_op(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    flat = x.contiguous()
    out = torch.empty_like(flat)
    if flat.numel():
        hidden = flat.shape[-1]
        block = norm_block(hidden)
        launch(rms_norm_kernel, flat.numel() // hidden)(
            flat, None, weight.contiguous(), flat, out, hidden, eps, BLOCK=block, num_warps=norm_warps(hidden)
        )
    return out


@_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("fastrl::residual_rms_norm", mutates_args=())
def _residual_op(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual, x = residual.contiguous(), x.contiguous()
    total, out = torch.empty_like(residual), torch.empty_like(residual)
    if residual.numel():
        hidden = residual.shape[-1]
        block = norm_block(hidden)
        launch(rms_norm_kernel, residual.numel() // hidden)(
            residual, x, weight.contiguous(), total, out, hidden, eps, BLOCK=block, num_warps=norm_warps(hidden)
        )
    return total, out


@_residual_op.register_fake
def _(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = torch.empty_like(residual, memory_format=torch.contiguous_format)
    return total, torch.empty_like(total)


@torch.library.custom_op("fastrl::rms_norm_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    grad_total: Optional[Tensor],  # noqa: UP045 (the schema parser of older torch wants typing.Optional)
    total: Tensor,
    weight: Tensor,
    eps: float,
    partial: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of the sum, and the weight's per block of rows, [blocks, H] float32 (``partial`` False: [0, H])."""
    grad_in, partials = _backward_like(total, partial)
    if total.numel():
        hidden = total.shape[-1]
        rows = total.numel() // hidden
        per, block = block_rows(rows), norm_block(hidden)
        launch(rms_norm_backward_kernel, -(-rows // per))(
            grad.contiguous(), contiguous(grad_total), total.contiguous(),
            weight.contiguous(), grad_in, partials if partial else None, rows, hidden, per, eps,
            BLOCK=block, num_warps=norm_warps(hidden, 8),
        )  # fmt: skip
    return grad_in, partials


@_backward_op.register_fake
def _(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, eps: float, partial: bool
) -> tuple[Tensor, Tensor]:
    return _backward_like(total, partial)


def _backward_like(total: Tensor, partial: bool) -> tuple[Tensor, Tensor]:
    hidden = total.shape[-1]
    rows = total.numel() // max(hidden, 1)
    blocks = -(-rows // block_rows(rows)) if partial else 0
    grad_in = torch.empty_like(total, memory_format=torch.contiguous_format)
    return grad_in, total.new_empty((blocks, hidden), dtype=torch.float32)


def _gradients(
    ctx: Any, grad: Tensor | None, grad_total: Tensor | None, trained: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of the sum and of the weight, from those of norm and sum."""
    total, weight = ctx.saved_tensors
    if grad is None:
        return grad_total, None
    grad_in, partials = _backward_op(grad, grad_total, total, weight, ctx.eps, trained)
    return grad_in, partials.sum(0).to(weight.dtype) if trained else None


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _keep_total(ctx: Any, inputs: Any, output: Any) -> None:
    *_, weight, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], weight)


def _backward(ctx: Any, grad: Tensor) -> Any:
    return *_gradients(ctx, grad, None, ctx.needs_input_grad[1]), None


def _backward_total(ctx: Any, grad_total: Tensor | None, grad: Tensor | None) -> Any:
    grad_in, grad_weight = _gradients(ctx, grad, grad_total, ctx.needs_input_grad[2])
    return grad_in, grad_in, grad_weight, None


_norm_op.register_autograd(_backward, setup_context=_keep)
_residual_op.register_autograd(_backward_total, setup_context=_keep_total)


class _Forked(torch.autograd.Function):
    """A stream and its norm: the stream's two gradients are summed in the norm's backward."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.eps = eps
        ctx.save_for_backward(residual, weight)
        ctx.set_materialize_grads(False)
        return residual.view_as(residual), _norm_op(residual, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad: Tensor | None) -> Any:  # type: ignore[override]
        return *_gradients(ctx, grad, grad_total, ctx.needs_input_grad[1]), None


class ResidualNorm(NamedTuple):
    """The residual stream after the sum, and its norm; both shaped like the residual."""

    residual: Tensor
    normed: Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension; formula and gradient at the top of this file.

    Args:
        x: [..., H], float32, bfloat16 or float16 (float64, and rows of more than 8,192 numbers, run in plain torch).
        weight: [H] of the same dtype.
        eps: added to the mean of squares.

    Returns:
        Like ``x``. Differentiable once in ``x`` and ``weight``.

    Raises:
        ValueError: shapes do not match, or tensors are on different devices.
        TypeError: dtypes differ or are not floating.
    """
    if reads("fastrl_norm", x, weight) and x.dim() > 0 and weight.shape == x.shape[-1:]:
        return _native_pointwise.rms_norm(x, weight, float(eps), rms_norm_reference)
    _check(x, None, weight)
    refuse_forward_mode("rms_norm", x, weight)
    if not use_operator(x) or x.shape[-1] > MAX_HIDDEN:
        return rms_norm_reference(x, weight, eps)
    return _norm_op(x, weight, float(eps))


def residual_rms_norm(residual: Tensor, x: Tensor | None, weight: Tensor, eps: float = 1e-6) -> ResidualNorm:
    """The residual sum and the RMSNorm that follows it; formulas and gradients at the top of this file.

    Nothing is changed in place (``add_rms_norm`` does so, for decoding). Use the returned residual in place of the
    given one, also without ``x``: then the sum of its gradients needs no kernel of its own.

    Args:
        residual: [..., H], the dtypes of :func:`rms_norm`.
        x: like the residual; None: nothing is added.
        weight: [H] of the same dtype.
        eps: added to the mean of squares.

    Returns:
        ``residual`` (the sum, rounded to its dtype) and ``normed``. Differentiable once.

    Raises:
        ValueError, TypeError: as for :func:`rms_norm`.
    """
    fits = x is not None and residual.dim() > 0 and residual.shape == x.shape and weight.shape == x.shape[-1:]
    if x is not None and fits and reads("fastrl_norm", residual, x, weight):
        return ResidualNorm(*_native_pointwise.residual_rms_norm(residual, x, weight, float(eps), rms_norm_reference))
    _check(residual, x, weight)
    refuse_forward_mode("residual_rms_norm", residual, x, weight)
    if x is None and not use_operator(residual):
        return ResidualNorm(residual, rms_norm(residual, weight, eps))
    if not use_operator(residual) or residual.shape[-1] > MAX_HIDDEN:
        return residual_rms_norm_reference(residual, x, weight, eps)
    if x is not None:
        return ResidualNorm(*_residual_op(residual, x, weight, float(eps)))
    if torch.compiler.is_compiling():  # which follows no output that is an input
        return ResidualNorm(residual, _norm_op(residual, weight, float(eps)))
    forked: Any = _Forked.apply(residual, weight, float(eps))
    return ResidualNorm(*forked)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Eager twin of :func:`rms_norm` (same arguments, nothing checked)."""
    if x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype) * weight


def residual_rms_norm_reference(residual: Tensor, x: Tensor | None, weight: Tensor, eps: float = 1e-6) -> ResidualNorm:
    """Eager twin of :func:`residual_rms_norm` (same arguments, nothing checked)."""
    total = residual if x is None else residual + x
    return ResidualNorm(total, rms_norm_reference(total, weight, eps))


def _check(residual: Tensor, x: Tensor | None, weight: Tensor) -> None:
    name = "x" if x is None else "residual"
    check(residual.dim() > 0, f"{name}: expected at least one dimension")
    check_dtype(name, residual, FLOATS)
    check_shape("weight", weight, (residual.shape[-1],))
    check_dtype("weight", weight, (residual.dtype,))
    if x is not None:
        check_shape("x", x, tuple(residual.shape))
        check_dtype("x", x, (residual.dtype,))
    check_same_device(residual=residual, x=x, weight=weight)
