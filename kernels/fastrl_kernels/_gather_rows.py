"""Rows gathered several times each, and in the backward the sum of every row's copies.

    gathered[j] = rows[index[j]];    d rows[i] = sum over j with index[j] = i of d gathered[j]

Why it is fast: keys and values are copied in one launch. In the backward a program owns a row: it reads the gradients
of its copies, whose places a table lists, sums them in float32 and writes the sum once. Written in torch that is, for
each copy of a prompt, a gather, a cast and an addition of the whole prompt, for keys and for values. No atomics: the
order of a row's sum is that of the table, bitwise reproducible.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from fastrl_kernels._common import launch, use_triton
from fastrl_kernels._triton import tl, triton

_NUMBERS = 1024  # of each tensor that a program of the gather copies
_WIDEST = 1024  # columns of a program


@triton.jit
def gather_rows_kernel(
    a, b,  # rows of ``width`` numbers; b may be None
    index,  # [K] int64
    out_a, out_b,  # [K, width], contiguous
    a_row, b_row, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows of ``BLOCK`` columns; ``a_row``, ``b_row``: strides between rows."""
    across = tl.cdiv(width, BLOCK)
    at = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(index + at, mask=at < rows, other=0)[:, None]
    inside = (at < rows)[:, None] & (c < width)[None, :]
    to = at[:, None] * width + c[None, :]
    tl.store(out_a + to, tl.load(a + source * a_row + c[None, :], mask=inside, other=0.0), mask=inside)
    if b is not None:
        tl.store(out_b + to, tl.load(b + source * b_row + c[None, :], mask=inside, other=0.0), mask=inside)


@triton.jit
def sum_copies_kernel(
    a, b,  # [K, width], contiguous; b may be None
    places,  # [K] int64
    begins,  # [rows + 1] int64
    out_a, out_b,  # [rows, width], contiguous
    width, BLOCK: tl.constexpr,
):  # fmt: skip
    """``BLOCK`` columns of one row: the sum over ``places[begins[row] : begins[row + 1]]``."""
    across = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64)
    c = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    first = tl.load(begins + row)
    last = tl.load(begins + row + 1)
    total_a, total_b = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for at in range(first, last):
        place = tl.load(places + at) * width
        total_a += tl.load(a + place + c, mask=inside, other=0.0).to(tl.float32)
        if b is not None:
            total_b += tl.load(b + place + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_a + row * width + c, total_a.to(out_a.dtype.element_ty), mask=inside)
    if b is not None:
        tl.store(out_b + row * width + c, total_b.to(out_b.dtype.element_ty), mask=inside)


class Copies(NamedTuple):
    """What to gather. ``index`` [K] int64: the row of each place. For the backward, ``places`` [K] int64: the places of
    row 0, of row 1, …, ascending for each; ``begins`` [rows + 1] int64: where each row's begin."""

    index: Tensor
    places: Tensor
    begins: Tensor

    @classmethod
    def of(cls, index: Tensor, rows: int) -> Copies:
        """The tables of ``index``, whose entries are less than ``rows``."""
        places = torch.argsort(index, stable=True)
        begins = torch.searchsorted(index[places], torch.arange(rows + 1, device=index.device))
        return cls(index, places, begins)

    def to(self, device: torch.device) -> Copies:
        return Copies(*(table.to(device) for table in self))


def gather_rows(rows: Tensor, copies: Copies) -> Tensor:
    """``rows[copies.index]``; gradient at the top of this file.

    Args:
        rows: [R, ...], floating.
        copies: on the device of the rows.

    Returns:
        [K, ...]. Differentiable once; sums are float32 or wider.
    """
    return _gather_op(rows, None, *copies)[0]


def gather_pair(a: Tensor, b: Tensor, copies: Copies) -> tuple[Tensor, Tensor]:
    """:func:`gather_rows` of two tensors of one shape and dtype, in one launch each way."""
    return _gather_op(a, b, *copies)


@torch.library.custom_op("fastrl::gather_rows", mutates_args=())
def _gather_op(
    a: Tensor,
    b: Optional[Tensor],  # noqa: UP045 (the schema parser of older torch wants typing.Optional)
    index: Tensor,
    places: Tensor,
    begins: Tensor,
) -> tuple[Tensor, Tensor]:
    """``places`` and ``begins`` are the backward's. Without ``b`` the second result is empty."""
    if not _takes_kernel(a):
        return a.index_select(0, index), a.new_empty(0) if b is None else b.index_select(0, index)
    out, other = _like(a, b, len(index))
    if out.numel():
        width = out[0].numel()
        block = _block(width)
        rows = max(_NUMBERS // block, 1)
        a, b = _flat(a), None if b is None else _flat(b)
        launch(gather_rows_kernel, -(-len(index) // rows) * -(-width // block))(
            a, b, index, out, None if b is None else other, a.stride(0), 0 if b is None else b.stride(0), len(index),
            width, ROWS=rows, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out, other


@_gather_op.register_fake
def _(a: Tensor, b: Tensor | None, index: Tensor, places: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
    return _like(a, b, index.shape[0])


@torch.library.custom_op("fastrl::sum_copies", mutates_args=())
def _sum_op(
    a: Tensor,
    b: Optional[Tensor],  # noqa: UP045
    places: Tensor,
    begins: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gather's backward: [K, ...] → [rows, ...]."""
    out, other = _like(a, b, len(begins) - 1)
    if not _takes_kernel(a):
        return sum_copies_reference(a, places, begins), other if b is None else sum_copies_reference(b, places, begins)
    if out.numel():
        width = out[0].numel()
        block = _block(width)
        launch(sum_copies_kernel, len(out) * -(-width // block))(
            a.contiguous(), None if b is None else b.contiguous(), places, begins, out, None if b is None else other,
            width, BLOCK=block, num_warps=min(max(block // 256, 1), 4),
        )  # fmt: skip
    return out, other


@_sum_op.register_fake
def _(a: Tensor, b: Tensor | None, places: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
    return _like(a, b, begins.shape[0] - 1)


def sum_copies_reference(rows: Tensor, places: Tensor, begins: Tensor) -> Tensor:
    """Eager twin of the gather's backward for one tensor; on any device in a fixed order."""
    wide = rows.index_select(0, places).to(torch.promote_types(rows.dtype, torch.float32))
    return torch.segment_reduce(wide, "sum", offsets=begins, axis=0, initial=0, unsafe=True).to(rows.dtype)


def _takes_kernel(rows: Tensor) -> bool:
    return use_triton(rows) and rows.dtype != torch.float64


def _like(a: Tensor, b: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    shape = (count, *a.shape[1:])
    return a.new_empty(shape), a.new_empty(0) if b is None else b.new_empty(shape)


def _block(width: int) -> int:
    return min(1 << max(width - 1, 0).bit_length(), _WIDEST)


def _flat(rows: Tensor) -> Tensor:
    """[rows, width] with a row's numbers one after another; no copy where they lie so, as of a joint projection."""
    return (rows if rows[0].is_contiguous() else rows.contiguous()).reshape(len(rows), -1)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, b, _, places, begins = inputs
    ctx.pair = b is not None
    ctx.save_for_backward(places, begins)


def _backward(ctx: Any, grad: Tensor, other: Tensor) -> Any:
    a, b = _sum_op(grad, other if ctx.pair else None, *ctx.saved_tensors)
    return a, b if ctx.pair else None, None, None, None


_gather_op.register_autograd(_backward, setup_context=_setup)
