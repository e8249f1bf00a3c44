"""Low-rank updates of products that read the same input, for decoding: one launch per stack, no gradient.

For layers i = 1 … n (queries, keys and values; gate and up) with adapters A_i, B_i (LoRA, arXiv:2106.09685):

    out_i += s (x A_i^T) B_i^T

In torch that is one product with all A and one per B, each of which moves a few kilobytes and costs a launch. Here a
program owns a block of rows and a block of columns of one output. It computes x A_i^T for its rows, r numbers each, and
from them its part of the update. So x A_i^T is computed once per block of columns instead of once, from tiles that lie
in the L2 cache, and nothing but the outputs is written. That pays for few rows; with many, products of their own do.

Sums are float32; x A_i^T is rounded to the dtype once before the second product, as a product of its own would be, and
the output once. No atomics: results are bitwise reproducible, and a row's do not depend on other rows.
"""

from __future__ import annotations

from typing import List  # noqa: UP035 (the schema parser of older torch wants typing.List)

import torch
from torch import Tensor

from fastrl_kernels._common import (
    FLOATS,
    check,
    check_dtype,
    check_same_device,
    check_shape,
    launch,
    use_triton,
)
from fastrl_kernels._counting import flops_of
from fastrl_kernels._triton import tl, triton
from fastrl_kernels.rms_norm import power_of_two

MOST_OUTPUTS = 3
MOST_RANK = 128  # of the kernel (half as many in float32); larger ones are products of their own


@triton.jit
def _lora_update_kernel(
    x,  # [R, K], contiguous
    low,  # [n r, K], contiguous
    high_0, high_1, high_2,  # [O_i, r], contiguous
    out_0, out_1, out_2,  # [R, O_i], contiguous
    scale, rows, columns, size_0, size_1, size_2,
    COUNT: tl.constexpr, RANK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``BLOCK_R`` rows and ``BLOCK_N`` columns of one output."""
    row_blocks = tl.cdiv(rows, BLOCK_R)
    block = tl.program_id(0) // row_blocks
    high, out, size, first = high_0, out_0, size_0, 0
    if COUNT > 1:
        before = tl.cdiv(size_0, BLOCK_N)
        if block >= before:
            high, out, size, first, block = high_1, out_1, size_1, RANK, block - before
            if COUNT > 2:
                before = tl.cdiv(size_1, BLOCK_N)
                if block >= before:
                    high, out, size, first, block = high_2, out_2, size_2, 2 * RANK, block - before
    row = (tl.program_id(0) % row_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tl.arange(0, BLOCK_RANK)
    reduced = tl.zeros((BLOCK_R, BLOCK_RANK), tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < columns
        tile = tl.load(x + row[:, None] * columns + k[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        at = low + (first + j).to(tl.int64)[None, :] * columns + k[:, None]
        a = tl.load(at, mask=(j < RANK)[None, :] & inside[:, None], other=0.0)
        reduced = tl.dot(tile, a, reduced, input_precision=PRECISION)
    n = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.load(high + n[None, :] * RANK + j[:, None], mask=(n < size)[None, :] & (j < RANK)[:, None], other=0.0)
    update = tl.dot(reduced.to(b.dtype), b, input_precision=PRECISION)
    target = out + row[:, None] * size + n[None, :]
    mask = (row < rows)[:, None] & (n < size)[None, :]
    tl.store(target, (tl.load(target, mask=mask, other=0.0).to(tl.float32) + scale * update).to(b.dtype), mask=mask)


@torch.library.custom_op("fastrl::lora_update", mutates_args=("outputs",))
def _lora_update_op(x: Tensor, low: Tensor, highs: List[Tensor], outputs: List[Tensor], scale: float) -> None:  # noqa: UP006
    rows, columns = x.shape
    rank = highs[0].shape[1]
    sizes = [out.shape[1] for out in outputs]
    block_rank = max(16, power_of_two(rank))
    # float32 products take no tensor cores, and so hold their factors in registers
    block_r, block_k, block_n = (16, 16, 32) if x.dtype == torch.float32 else (32, 2048 // block_rank, 128)
    block_r, block_k = min(block_r, max(16, power_of_two(rows))), min(block_k, 128)
    programs = -(-rows // block_r) * sum(-(-size // block_n) for size in sizes)
    if not programs:
        return
    missing = MOST_OUTPUTS - len(outputs)
    pointers = [[t.contiguous() for t in highs] + missing * [highs[0]], list(outputs) + missing * [outputs[0]]]
    launch(_lora_update_kernel, programs)(
        x.contiguous(), low.contiguous(), *pointers[0], *pointers[1], scale, rows, columns, *sizes, *[0] * missing,
        COUNT=len(outputs), RANK=rank, BLOCK_R=block_r, BLOCK_K=block_k, BLOCK_N=block_n, BLOCK_RANK=block_rank,
        PRECISION="ieee", num_warps=4,
    )  # fmt: skip


@_lora_update_op.register_fake
def _(x: Tensor, low: Tensor, highs: List[Tensor], outputs: List[Tensor], scale: float) -> None:  # noqa: UP006
    return None


@flops_of(torch.ops.fastrl.lora_update)
def _(*, x: tuple[int, int], low: tuple[int, int], highs: list[tuple[int, int]], **_: object) -> int:
    return 2 * x[0] * (low[0] * low[1] + sum(size * rank for size, rank in highs))


def lora_update(x: Tensor, low: Tensor, highs: list[Tensor], outputs: list[Tensor], scale: float) -> None:
    """Add the low-rank updates of one to three layers to their outputs in place. No gradient.

    Args:
        x: [R, K], what the layers read.
        low: [n r, K] of the same dtype: the layers' A, one below the other.
        highs: n tensors [O_i, r] of the same dtype: their B.
        outputs: n tensors [R, O_i] of the same dtype, contiguous, without overlap; changed.
        scale: factor of all updates (alpha / r).

    Raises:
        ValueError: shapes or counts do not match, an output is not contiguous, or tensors are on different devices.
        TypeError: dtypes differ or are not floating.
    """
    if not _fits(x, low, highs, outputs):
        _check(x, low, highs, outputs)
    rank = highs[0].shape[1]
    most = MOST_RANK if x.dtype != torch.float32 else MOST_RANK // 2
    if not use_triton(x) or x.dtype == torch.float64 or not 0 < rank <= most:
        lora_update_reference(x, low, highs, outputs, scale)
    else:
        _lora_update_op(x, low, list(highs), list(outputs), float(scale))


def _fits(x: Tensor, low: Tensor, highs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether all is well; where not, ``_check`` says what is not."""
    count, dtype, device = len(outputs), x.dtype, x.device
    if not (1 <= count <= MOST_OUTPUTS and len(highs) == count and x.dim() == 2 and dtype in FLOATS):
        return False
    rows, columns = x.shape
    rank = highs[0].shape[-1] if highs[0].dim() else -1
    if low.shape != (count * rank, columns) or low.dtype != dtype or low.device != device:
        return False
    for high, out in zip(highs, outputs, strict=True):
        if out.dim() != 2 or len(out) != rows or high.shape != (out.shape[1], rank) or not out.is_contiguous():
            return False
        if high.dtype != dtype or out.dtype != dtype or high.device != device or out.device != device:
            return False
    return True


def _check(x: Tensor, low: Tensor, highs: list[Tensor], outputs: list[Tensor]) -> None:
    check_shape("x", x, (None, None))
    check_dtype("x", x, FLOATS)
    count = len(outputs)
    check(1 <= count <= MOST_OUTPUTS, f"outputs: expected 1 to {MOST_OUTPUTS} tensors, got {count}")
    check(len(highs) == count, f"highs: expected {count} tensors, one for each output, got {len(highs)}")
    check_shape("highs[0]", highs[0], (None, None))
    rank = highs[0].shape[1]
    check_shape("low", low, (count * rank, x.shape[1]))
    check_dtype("low", low, (x.dtype,))
    for i, (high, out) in enumerate(zip(highs, outputs, strict=True)):
        check_shape(f"outputs[{i}]", out, (x.shape[0], None))
        check_shape(f"highs[{i}]", high, (out.shape[1], rank))
        check_dtype(f"highs[{i}]", high, (x.dtype,))
        check_dtype(f"outputs[{i}]", out, (x.dtype,))
        check(out.is_contiguous(), f"outputs[{i}]: changed in place, so it must be contiguous")
        check_same_device(**{"x": x, "low": low, f"highs[{i}]": high, f"outputs[{i}]": out})


@torch.no_grad()
def lora_update_reference(x: Tensor, low: Tensor, highs: list[Tensor], outputs: list[Tensor], scale: float) -> None:
    """Eager twin of :func:`lora_update` (same arguments, nothing checked)."""
    parts = (x @ low.t()).split(highs[0].shape[1] or 1, 1) if len(low) else ()
    for part, high, out in zip(parts, highs, outputs, strict=False):
        out.addmm_(part, high.t(), alpha=scale)
