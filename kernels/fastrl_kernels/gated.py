"""The gate of a gated MLP: ``act(gate) * up``, forward and backward in one launch each (SwiGLU, GeGLU).

``gate`` and ``up`` are two products of one input, whose biases, where there are any, may be added here.

With ``a = act(gate)`` and the upstream gradient g (Shazeer, arXiv 2002.05202, eq. 6):

    dup = g a,    dgate = g up act'(gate)

Why it is fast: only memory counts here. The forward reads two tensors and writes one; the backward reads three and
writes two. Written in torch it is two kernels forward and three backward that hand whole tensors to each other, and the
activated gate is kept for the backward; here it is computed again. Gradients of biases are summed on the way, per block
of rows and then over blocks in a fixed order: no atomics, bitwise reproducible. ``a`` is rounded to its dtype before
the product, as the layers' own code does; everything else is float32.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from fastrl_kernels import _native_pointwise
from fastrl_kernels._activations import (
    activate,
    activation,
    activation_slope,
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

_BLOCK = 1024
_COLUMNS = 512  # of a program of the backward
_NATIVE_FROM = {"silu": 32768, "gelu_tanh": 8192}  # numbers for which one call of C++ costs less than torch's two


@triton.jit
def gated_kernel(
    gate, up,  # [R, C], contiguous
    gate_bias, up_bias,  # [C], both or neither
    out,  # [R, C], contiguous
    size, columns, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``BLOCK`` numbers of flat tensors."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    if gate_bias is not None:
        c = at % columns
        x += tl.load(gate_bias + c, mask=inside, other=0.0).to(tl.float32)
        y += tl.load(up_bias + c, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    opened = activation(x, KIND).to(kind).to(tl.float32)
    tl.store(out + at, (opened * y).to(kind), mask=inside)


@triton.jit
def gated_backward_kernel(
    grad, gate, up,  # [R, C], contiguous
    gate_bias, up_bias,  # [C], both or neither
    grad_gate, grad_up,  # [R, C], contiguous
    partials,  # [blocks, 2, C] float32, or None: there are no biases, or they take no gradient
    rows, columns, block_rows, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``block_rows`` rows of ``BLOCK`` columns, one after another."""
    across = tl.cdiv(columns, BLOCK)
    block = (tl.program_id(0) // across).to(tl.int64)
    c = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    inside = c < columns
    gate_sum, up_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    kind = grad_gate.dtype.element_ty
    for i in range(block_rows):
        row = block * block_rows + i
        live = inside & (row < rows)
        at = row * columns + c
        x = tl.load(gate + at, mask=live, other=0.0).to(tl.float32)
        y = tl.load(up + at, mask=live, other=0.0).to(tl.float32)
        if gate_bias is not None:
            x += tl.load(gate_bias + c, mask=live, other=0.0).to(tl.float32)
            y += tl.load(up_bias + c, mask=live, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=live, other=0.0).to(tl.float32)
        d_up = g * activation(x, KIND).to(kind).to(tl.float32)
        d_gate = g * y * activation_slope(x, KIND)
        tl.store(grad_up + at, d_up.to(kind), mask=live)
        tl.store(grad_gate + at, d_gate.to(kind), mask=live)
        if partials is not None:  # where a row is none, the gradient is 0
            gate_sum += d_gate
            up_sum += d_up
    if partials is not None:
        tl.store(partials + 2 * block * columns + c, gate_sum, mask=inside)
        tl.store(partials + (2 * block + 1) * columns + c, up_sum, mask=inside)


@torch.library.custom_op("fastrl::gated_mul", mutates_args=())
def _gated_op(
    gate: Tensor,
    up: Tensor,
    gate_bias: Optional[Tensor],  # noqa: UP045 (the schema parser of older torch wants typing.Optional)
    up_bias: Optional[Tensor],  # noqa: UP045
    kind: str,
) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if gate.numel():
        launch(gated_kernel, -(-gate.numel() // _BLOCK))(
            gate, up, contiguous(gate_bias), contiguous(up_bias), out, gate.numel(), gate.shape[-1],
            KIND=kind, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return out


@_gated_op.register_fake
def _(gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None, kind: str) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.custom_op("fastrl::gated_mul_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Optional[Tensor],  # noqa: UP045
    up_bias: Optional[Tensor],  # noqa: UP045
    kind: str,
    partial: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up, and the biases' per block of rows, [blocks, 2, C] (``partial`` False: no block)."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up, partials = _backward_like(gate, partial)
    if gate.numel():
        columns = gate.shape[-1]
        rows = gate.numel() // columns
        per = column_block_rows(rows)
        launch(gated_backward_kernel, -(-rows // per) * -(-columns // _COLUMNS))(
            grad, gate, up, contiguous(gate_bias), contiguous(up_bias), grad_gate, grad_up,
            partials if partial else None, rows, columns, per, KIND=kind, BLOCK=_COLUMNS, num_warps=4,
        )  # fmt: skip
    return grad_gate, grad_up, partials


@_backward_op.register_fake
def _(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    kind: str,
    partial: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_like(gate, partial)


def _backward_like(gate: Tensor, partial: bool) -> tuple[Tensor, Tensor, Tensor]:
    columns = gate.shape[-1]
    blocks = column_blocks(gate.numel() // max(columns, 1)) if partial else 0
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    return grad_gate, torch.empty_like(grad_gate), gate.new_empty((blocks, 2, columns), dtype=torch.float32)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.kind = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> Any:
    gate, up, gate_bias, up_bias = ctx.saved_tensors
    trained = gate_bias is not None and any(ctx.needs_input_grad[2:4])
    *grads, partials = _backward_op(grad, gate, up, gate_bias, up_bias, ctx.kind, trained)
    biases = partials.sum(0).to(gate.dtype).unbind(0) if trained else (None, None)
    return *grads, *biases, None


_gated_op.register_autograd(_backward, setup_context=_setup)


def silu_mul(gate: Tensor, up: Tensor, *, gate_bias: Tensor | None = None, up_bias: Tensor | None = None) -> Tensor:
    """``silu(gate + gate_bias) * (up + up_bias)``, SwiGLU's gate; gradients at the top of this file.

    Args:
        gate, up: [..., C], of the same shape, floating dtype and device (float64 runs in plain torch).
        gate_bias, up_bias: [C] of the same dtype, both or neither, of the products that made ``gate`` and ``up``: added
            here they cost nothing, and their gradients no further pass.

    Returns:
        Like them. Differentiable once in all.

    Raises:
        ValueError: shapes or devices differ, or only one bias is given.
        TypeError: dtypes differ or are not floating.
    """
    return _gated("silu_mul", gate, up, gate_bias, up_bias, "silu")


def gelu_mul(
    gate: Tensor,
    up: Tensor,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    approximate: str = "none",
) -> Tensor:
    """``gelu(gate + gate_bias) * (up + up_bias)``, GeGLU's gate; gradients at the top of this file.

    Args:
        gate, up, gate_bias, up_bias: as for :func:`silu_mul`.
        approximate: ``none`` (the error function) or ``tanh``, as for ``torch.nn.functional.gelu``.

    Raises:
        ValueError: as for :func:`silu_mul`, or ``approximate`` is neither.
        TypeError: as for :func:`silu_mul`.
    """
    return _gated("gelu_mul", gate, up, gate_bias, up_bias, _gelu(approximate))


def _gelu(approximate: str) -> str:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: expected none or tanh, got {approximate!r}")
    return "gelu" if approximate == "none" else "gelu_tanh"


def _gated(name: str, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None, kind: str) -> Tensor:
    if not _fits(gate, up, gate_bias, up_bias):
        _check(gate, up, gate_bias, up_bias)
    refuse_forward_mode(name, gate, up, gate_bias, up_bias)
    if gate.numel() >= _NATIVE_FROM.get(kind, 0) and reads("fastrl_gated", gate, up, gate_bias, up_bias):
        return _native_pointwise.gated(gate, up, gate_bias, up_bias, kind, _eager)
    if use_operator(gate):
        return _gated_op(gate, up, gate_bias, up_bias, kind)
    return _eager(gate, up, gate_bias, up_bias, kind)


def _fits(gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None) -> bool:
    """Whether all is well; where not, ``_check`` says what is not."""
    if gate.shape != up.shape or gate.dim() == 0 or (gate_bias is None) != (up_bias is None):
        return False
    dtype, device = gate.dtype, gate.device
    if dtype not in FLOATS or up.dtype != dtype or up.device != device:
        return False
    return all(
        bias is None or (bias.shape == gate.shape[-1:] and bias.dtype == dtype and bias.device == device)
        for bias in (gate_bias, up_bias)
    )


def _check(gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None) -> None:
    check(gate.dim() > 0, "gate: expected at least one dimension")
    check_shape("up", up, tuple(gate.shape))
    check_dtype("gate", gate, FLOATS)
    check_dtype("up", up, (gate.dtype,))
    check((gate_bias is None) == (up_bias is None), "gate_bias, up_bias: expected both or neither")
    for told, bias in (("gate_bias", gate_bias), ("up_bias", up_bias)):
        if bias is not None:
            check_shape(told, bias, (gate.shape[-1],))
            check_dtype(told, bias, (gate.dtype,))
    check_same_device(gate=gate, up=up, gate_bias=gate_bias, up_bias=up_bias)


def _eager(gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None, kind: str) -> Tensor:
    if gate_bias is not None and up_bias is not None:
        gate, up = gate + gate_bias, up + up_bias
    opened = activate(gate, kind)
    return opened * up if torch.is_grad_enabled() or is_functorch_wrapped_tensor(up) else opened.mul_(up)


def silu_mul_reference(
    gate: Tensor, up: Tensor, *, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> Tensor:
    """Eager twin of :func:`silu_mul` (same arguments, nothing checked)."""
    return _eager(gate, up, gate_bias, up_bias, "silu")


def gelu_mul_reference(
    gate: Tensor,
    up: Tensor,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    approximate: str = "none",
) -> Tensor:
    """Eager twin of :func:`gelu_mul` (same arguments, nothing checked)."""
    return _eager(gate, up, gate_bias, up_bias, _gelu(approximate))
