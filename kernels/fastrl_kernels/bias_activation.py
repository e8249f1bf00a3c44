"""Bias and activation between the two products of an MLP without a gate, forward and backward in one launch each.

    y = act(x + b),    dx = g act'(x + b),    db = sum over rows of dx

Why it is fast: hand the product its weight alone, and the bias is added where the activation reads anyway, in float32.
The backward reads two tensors, writes one, and sums the bias' gradient on the way, for which torch reads dx again; of
``quick_gelu`` torch makes three kernels forward and more backward. Bias gradients are summed per block of rows and then
over blocks in a fixed order: no atomics, bitwise reproducible.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from fastrl_kernels import _native_pointwise
from fastrl_kernels._activations import (
    activate,
    activation,
    activation_slope,
    check_kind,
    column_block_rows,
    column_blocks,
)
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

_COLUMNS = 1024  # of a program; with 512, one configuration spills 8 bytes on sm_100


@triton.jit
def bias_activation_kernel(
    x,  # [R, C], contiguous
    bias,  # [C] or None
    out,  # [R, C], contiguous
    size,
    columns,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``BLOCK`` numbers of flat tensors."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + at % columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, activation(z, KIND).to(out.dtype.element_ty), mask=inside)


@triton.jit
def bias_activation_backward_kernel(
    grad,  # [R, C], contiguous
    x,  # [R, C], contiguous
    bias,  # [C] or None
    grad_in,  # [R, C], contiguous
    partials,  # [blocks, C] float32, or None: the bias takes no gradient
    rows,
    columns,
    block_rows,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``block_rows`` rows of ``BLOCK`` columns, one after another."""
    across = tl.cdiv(columns, BLOCK)
    block = (tl.program_id(0) // across).to(tl.int64)
    c = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    inside = c < columns
    b = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    summed = tl.zeros([BLOCK], tl.float32)
    for i in range(block_rows):
        row = block * block_rows + i
        live = inside & (row < rows)
        at = row * columns + c
        z = tl.load(x + at, mask=live, other=0.0).to(tl.float32) + b
        d = tl.load(grad + at, mask=live, other=0.0).to(tl.float32) * activation_slope(z, KIND)
        tl.store(grad_in + at, d.to(grad_in.dtype.element_ty), mask=live)
        summed += tl.where(live, d, 0.0)
    if partials is not None:
        tl.store(partials + block * columns + c, summed, mask=inside)


@torch.library.custom_op("fastrl::bias_activation", mutates_args=())
def _activation_op(
    x: Tensor,
    bias: Optional[Tensor],  # noqa: UP045 (the schema parser of older torch wants typing.Optional)
    kind: str,
) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        launch(bias_activation_kernel, -(-x.numel() // 1024))(
            x, contiguous(bias), out, x.numel(), x.shape[-1], KIND=kind, BLOCK=1024, num_warps=4
        )
    return out


@_activation_op.register_fake
def _(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("fastrl::bias_activation_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    x: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    kind: str,
    partial: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of x, and the bias' per block of rows, [blocks, C] float32 (``partial`` False: [0, C])."""
    grad, x = grad.contiguous(), x.contiguous()
    grad_in, partials = _backward_like(x, partial)
    if x.numel():
        columns = x.shape[-1]
        rows = x.numel() // columns
        per, given = column_block_rows(rows), contiguous(bias)
        launch(bias_activation_backward_kernel, -(-rows // per) * -(-columns // _COLUMNS))(
            grad, x, given, grad_in, partials if partial else None, rows, columns, per,
            KIND=kind, BLOCK=_COLUMNS, num_warps=4,
        )  # fmt: skip
    return grad_in, partials


@_backward_op.register_fake
def _(grad: Tensor, x: Tensor, bias: Tensor | None, kind: str, partial: bool) -> tuple[Tensor, Tensor]:
    return _backward_like(x, partial)


def _backward_like(x: Tensor, partial: bool) -> tuple[Tensor, Tensor]:
    columns = x.shape[-1]
    blocks = column_blocks(x.numel() // max(columns, 1)) if partial else 0
    grad_in = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_in, x.new_empty((blocks, columns), dtype=torch.float32)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, bias, ctx.kind = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, grad: Tensor) -> Any:
    x, bias = ctx.saved_tensors
    trained = bias is not None and ctx.needs_input_grad[1]
    grad_in, partials = _backward_op(grad, x, bias, ctx.kind, trained)
    return grad_in, partials.sum(0).to(x.dtype) if trained else None, None


_activation_op.register_autograd(_backward, setup_context=_setup)


def bias_activation(x: Tensor, bias: Tensor | None = None, *, kind: str = "gelu") -> Tensor:
    """``act(x + bias)``; gradients at the top of this file.

    Args:
        x: [..., C], float32, bfloat16 or float16 (float64 runs in plain torch): a product without its bias.
        bias: [C] of the same dtype, or None.
        kind: ``gelu`` (the error function), ``gelu_tanh``, ``quick_gelu`` (x times the logistic function of 1.702 x) or
            ``silu``.

    Returns:
        Like ``x``. Differentiable once in ``x`` and ``bias``.

    Raises:
        ValueError: shapes do not match, tensors are on different devices, or the kind is unknown.
        TypeError: dtypes differ or are not floating.
    """
    check_kind(kind)
    fits = x.dim() > 0 and (kind == "quick_gelu" if bias is None else bias.shape == x.shape[-1:])
    if fits and reads("fastrl_gated", x, bias):  # of the others without a bias torch has one operator
        return _native_pointwise.gated(x, None, bias, None, kind, _twin)
    check(x.dim() > 0, "x: expected at least one dimension")
    check_dtype("x", x, FLOATS)
    if bias is not None:
        check_shape("bias", bias, (x.shape[-1],))
        check_dtype("bias", bias, (x.dtype,))
    check_same_device(x=x, bias=bias)
    refuse_forward_mode("bias_activation", x, bias)
    if not use_operator(x):
        return bias_activation_reference(x, bias, kind=kind)
    return _activation_op(x, bias, kind)


def _twin(x: Tensor, up: None, bias: Tensor | None, up_bias: None, kind: str) -> Tensor:
    """The eager twin with the arguments of a gate."""
    return bias_activation_reference(x, bias, kind=kind)


def bias_activation_reference(x: Tensor, bias: Tensor | None = None, *, kind: str = "gelu") -> Tensor:
    """Eager twin of :func:`bias_activation` (same arguments, nothing checked)."""
    return activate(x if bias is None else x + bias, kind)
