"""Attention of one new token per row, where the rows of a group share their prompt's keys and values.

A group of rows samples answers to one prompt. Row r of group g attends to the prompt's keys ``prefix[g]`` and to its
own keys ``own[r]``:

    out[r, h] = softmax(scale * q[r, h] . [prefix_k[g], own_k[r]]) [prefix_v[g], own_v[r]]

Decoding is bound by memory, and repeating the prompt for each row reads (and stores) its keys once per row. Here the
rows of a group times the query heads of one key head form the M dimension of a matrix product, so one program reads a
slice of the prompt once for all of them. Keys are split over programs (flash-decoding); each split stores its
normalised output and its log2-sum-exp, and a second launch merges them:

    lse = log2 sum_s 2^lse_s,    out = sum_s 2^(lse_s - lse) out_s

Softmax is computed in base 2 with the scale folded in. Decoding needs no gradient, so there is no backward.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl_kernels._common import (
    FLOATS,
    KERNEL_FLOATS,
    check,
    check_dtype,
    check_same_device,
    check_shape,
    launch,
    processors,
    readable,
    use_triton,
)
from fastrl_kernels._counting import flops_of
from fastrl_kernels._triton import tl, triton

_LOG2E = math.log2(math.e)
_MAX_SPLITS = 16  # of the prompt, and of a row's own keys: bounds the merge


@triton.jit
def _attend(
    q, k_base, v_base, kv_key, start, stop, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax of queries [M, D] over keys [start, stop): normalised output and log2-sum-exp (-inf: no key)."""
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(start, stop, BLOCK_N):
        key = (first + n).to(tl.int64)
        inside = key < stop
        k = tl.load(k_base + key[None, :] * kv_key + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
        score = tl.dot(q, k, input_precision=PRECISION) * scale_log2
        score = tl.where(inside[None, :], score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))  # finite: the first key of a block is inside
        p = tl.exp2(score - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(p, 1)
        v = tl.load(v_base + key[:, None] * kv_key + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        acc = acc * decay[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        peak = new_peak
    safe = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), peak + tl.log2(safe))
    return acc / safe[:, None], lse


@triton.jit
def _attend_tile(
    q, k_base, v_base, part, part_lse, row, head, valid, q_row, q_head, kv_key, start, stop, scale_log2,
    query_heads, splits, split,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend with the queries (row [M] int64, head [M]) over keys [start, stop) and store the split's part."""
    d = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (d < D)[None, :]
    tile = tl.load(q + (row * q_row + head * q_head)[:, None] + d[None, :], mask=mask, other=0.0)
    out, lse = _attend(tile, k_base, v_base, kv_key, start, stop, scale_log2, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)  # pyright: ignore[reportGeneralTypeIssues]
    at = (row * query_heads + head) * splits + split
    tl.store(part_lse + at, lse, mask=valid)
    tl.store(part + at[:, None] * D + d[None, :], out, mask=mask)


@triton.jit
def _decode_split_kernel(
    q,  # [R, Hq, D]
    prefix_k, prefix_v,  # [B, Hkv, P, D]
    own_k, own_v,  # [R, Hkv, T, D]
    row_offsets, prefix_len, own_len,  # [B+1], [B], [R] int32
    part, part_lse,  # [R, Hq, S, D], [R, Hq, S] fp32, contiguous
    scale_log2,
    heads,  # key heads
    m_blocks, prefix_splits, prefix_chunk, own_splits, own_chunk,  # a chunk: keys per split, a multiple of BLOCK_N
    prefix_programs, q_row, q_head, prefix_group, prefix_head, prefix_key, own_row, own_head, own_key,
    GQ: tl.constexpr,  # query heads per key head
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of one group's prompt for all its rows, or one split of one row's own keys."""
    program = tl.program_id(0)
    if program < prefix_programs:
        split = program % prefix_splits
        block = program // prefix_splits % m_blocks
        pair = program // (prefix_splits * m_blocks)
        key_head = (pair % heads).to(tl.int64)
        group = (pair // heads).to(tl.int64)
        first = tl.load(row_offsets + group)
        stop_row = tl.load(row_offsets + group + 1)
        if first + block * BLOCK_M // GQ < stop_row:
            m = block * BLOCK_M + tl.arange(0, BLOCK_M)
            row = (first + m // GQ).to(tl.int64)
            base = group * prefix_group + key_head * prefix_head
            start = split * prefix_chunk
            stop = tl.minimum(start + prefix_chunk, tl.load(prefix_len + group))
            _attend_tile(
                q, prefix_k + base, prefix_v + base, part, part_lse, row, key_head * GQ + m % GQ, row < stop_row,
                q_row, q_head, prefix_key, start, stop, scale_log2, heads * GQ, prefix_splits + own_splits, split,
                D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
            )  # fmt: skip
    else:
        own = program - prefix_programs
        split = own % own_splits
        pair = own // own_splits
        key_head = (pair % heads).to(tl.int64)
        m = tl.arange(0, BLOCK_OWN)
        one = (pair // heads).to(tl.int64)
        base = one * own_row + key_head * own_head
        start = split * own_chunk
        stop = tl.minimum(start + own_chunk, tl.load(own_len + one))
        _attend_tile(
            q, own_k + base, own_v + base, part, part_lse, one + m * 0, key_head * GQ + m, m < GQ,
            q_row, q_head, own_key, start, stop, scale_log2, heads * GQ, prefix_splits + own_splits,
            prefix_splits + split, D, BLOCK_OWN, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip


@triton.jit
def _decode_merge_kernel(
    part, part_lse,  # [R, Hq, S, D], [R, Hq, S] fp32
    row_offsets,  # [B+1] int32
    out,  # [R, Hq, D], contiguous
    groups, query_heads, prefix_splits, splits, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp merge of one (row, head)'s splits. A row past the last group has no prompt; no key at all gives 0."""
    at = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    in_group = at // query_heads < tl.load(row_offsets + groups)
    valid = (s < splits) & ((s >= prefix_splits) | in_group)
    lse = tl.load(part_lse + at * splits + s, mask=valid, other=float("-inf"))
    peak = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weight, 0)
    mask = valid[:, None] & (d < D)[None, :]
    tile = tl.load(part + (at * splits + s)[:, None] * D + d[None, :], mask=mask, other=0.0)
    merged = tl.sum(tile * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + at * D + d, merged.to(out.dtype.element_ty), mask=d < D)


class _Config(NamedTuple):
    block_m: int  # (row, query head) pairs of a group per program
    block_own: int
    block_n: int  # keys per step
    block_d: int
    m_blocks: int
    prefix_splits: int
    prefix_chunk: int
    own_splits: int
    own_chunk: int
    num_warps: int
    num_stages: int


def _config(
    rows: int, groups: int, max_rows: int, heads: int, gq: int, d: int, p: int, t: int, itemsize: int, units: int
) -> _Config:
    """Launch configuration: splits of 128 keys or more, enough of them to give each multiprocessor two programs."""
    block_d = max(16, _power_of_2(d))
    wide = block_d > 128 or itemsize == 4  # fp32 products do not use tensor cores and take more registers
    block_m = min(max(16, _power_of_2(max_rows * gq)), 16 if wide else 64)
    block_n = 16 if itemsize == 4 and block_d > 128 else 32 if wide else 64  # wider ones spill
    m_blocks = -(-max_rows * gq // block_m)

    def split(keys: int, programs: int) -> tuple[int, int]:
        if keys == 0 or programs == 0:
            return 0, 0
        wanted = min(-(-2 * units // programs), _MAX_SPLITS)
        chunk = max(128, -(-keys // (wanted * block_n)) * block_n)
        return -(-keys // chunk), chunk

    block_own = max(16, _power_of_2(gq))
    splits = (*split(p, groups * heads * m_blocks), *split(t, rows * heads))
    num_warps = 8 if block_m == 64 or (itemsize == 4 and block_d > 64) else 4  # 4 spill there
    return _Config(block_m, block_own, block_n, block_d, m_blocks, *splits, num_warps, num_stages=2)


def _power_of_2(n: int) -> int:
    """The smallest power of two not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def _merge_warps(block_s: int, block_d: int) -> int:
    return 1 if block_s * block_d <= 1024 else 4


def _same_layout(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with equal strides, the last one 1 (copied if necessary)."""
    if k.stride() == v.stride() and k.stride(-1) == 1:
        return k, v
    return k.contiguous(), v.contiguous()


@torch.library.custom_op("fastrl::decode_attention", mutates_args=())
def _decode_attention_op(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, own_k: Tensor, own_v: Tensor,
    row_offsets: Tensor, prefix_len: Tensor, own_len: Tensor, max_rows: int, scale: float,
) -> Tensor:  # fmt: skip
    if not use_triton(q):  # only under torch.compile, which needs one operator, see below
        return _eager(q, prefix_k, prefix_v, own_k, own_v, row_offsets, prefix_len, own_len, max_rows, scale)
    (r, hq, d), (b, hkv, p, _), t = q.shape, prefix_k.shape, own_k.shape[2]
    out = torch.empty((r, hq, d), dtype=q.dtype, device=q.device)
    cfg = _config(r, b, max_rows, hkv, hq // hkv, d, p, t, q.element_size(), processors(q.device))
    splits = cfg.prefix_splits + cfg.own_splits
    if r == 0 or splits == 0:
        return out.zero_()
    q = q if q.stride(-1) == 1 else q.contiguous()
    (prefix_k, prefix_v), (own_k, own_v) = _same_layout(prefix_k, prefix_v), _same_layout(own_k, own_v)
    part = torch.empty((r, hq, splits, d), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((r, hq, splits), dtype=torch.float32, device=q.device)
    prefix_programs = b * hkv * cfg.m_blocks * cfg.prefix_splits
    launch(_decode_split_kernel, prefix_programs + r * hkv * cfg.own_splits)(
        q, prefix_k, prefix_v, own_k, own_v, row_offsets, prefix_len, own_len, part, part_lse, scale * _LOG2E,
        hkv, cfg.m_blocks, cfg.prefix_splits, cfg.prefix_chunk, cfg.own_splits, cfg.own_chunk, prefix_programs,
        *q.stride()[:2], *prefix_k.stride()[:3], *own_k.stride()[:3],
        GQ=hq // hkv, D=d, BLOCK_M=cfg.block_m, BLOCK_OWN=cfg.block_own, BLOCK_N=cfg.block_n, BLOCK_D=cfg.block_d,
        PRECISION="ieee", num_warps=cfg.num_warps, num_stages=cfg.num_stages,
    )  # fmt: skip
    block_s = _power_of_2(splits)
    launch(_decode_merge_kernel, r * hq)(
        part, part_lse, row_offsets, out, b, hq, cfg.prefix_splits, splits,
        D=d, BLOCK_S=block_s, BLOCK_D=cfg.block_d,
        num_warps=_merge_warps(block_s, cfg.block_d),
        # a fused multiply-add in the sum over threads would make copies of an element differ in the last bit
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


@_decode_attention_op.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@flops_of(torch.ops.fastrl.decode_attention)
def _(*, q: Any, prefix_k: Any, own_k: Any, **_: Any) -> int:
    """Two products of every row with its prompt's keys and its own, padding counted."""
    rows, heads, width = q
    return 4 * rows * heads * width * (prefix_k[2] + own_k[2])


def decode_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    *,
    row_offsets: Tensor | None = None,
    prefix_len: Tensor | None = None,
    own_len: Tensor | None = None,
    max_rows: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of one query token per row over its group's shared prompt and its own keys. No gradient.

    Args:
        q: queries [R, Hq, D], float32, bfloat16 or float16 (float64 on the CPU).
        prefix_k, prefix_v: prompts' keys and values [B, Hkv, P, D]; Hq is a multiple of Hkv, and query head h reads key
            head h // (Hq / Hkv).
        own_k, own_v: each row's own keys and values [R, Hkv, T, D].
        row_offsets: [B+1] int32 from 0, non-decreasing: the rows of group g are row_offsets[g] to row_offsets[g+1].
            Rows from row_offsets[B] on belong to no group and attend to their own keys only. None: R / B rows per
            group.
        prefix_len: [B] int32, 0 to P: length of each prompt. None: all P.
        own_len: [R] int32, 0 to T: number of own keys of each row. None: all T.
        max_rows: rows of the largest group, which sets the grid (a GPU does not detect a value that is too small).
            None: R, or R / B without ``row_offsets``.
        scale: factor on the scores. None: D ** -0.5.

    Returns:
        [R, Hq, D] in q's dtype; accumulation in float32 (float64 for float64). A row without any key gives 0. Keys and
        values beyond the lengths do not matter, as long as they are finite (the CPU path multiplies them by 0).

    Raises:
        ValueError: shapes do not match, or tensors are on different devices.
        TypeError: other dtypes than those listed above.
    """
    _check(q, prefix_k, prefix_v, own_k, own_v, row_offsets, prefix_len, own_len)
    r, b = q.shape[0], prefix_k.shape[0]
    factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if not use_triton(q) and readable(q):
        return _eager(q, prefix_k, prefix_v, own_k, own_v, row_offsets, prefix_len, own_len, max_rows, factor)
    if use_triton(q):
        check_dtype("q", q, KERNEL_FLOATS)
    each = r // max(b, 1) if row_offsets is None else r
    if row_offsets is None:
        row_offsets = torch.arange(b + 1, dtype=torch.int32, device=q.device) * each
    if prefix_len is None:
        prefix_len = torch.full((b,), prefix_k.shape[2], dtype=torch.int32, device=q.device)
    if own_len is None:
        own_len = torch.full((r,), own_k.shape[2], dtype=torch.int32, device=q.device)
    return _decode_attention_op(
        q, prefix_k, prefix_v, own_k, own_v, row_offsets.contiguous(), prefix_len.contiguous(), own_len.contiguous(),
        max(max_rows or each, 1), factor,
    )  # fmt: skip


def decode_attention_reference(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    *,
    row_offsets: Tensor | None = None,
    prefix_len: Tensor | None = None,
    own_len: Tensor | None = None,
    max_rows: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Eager twin of :func:`decode_attention` (same arguments): two batched products, one softmax over both parts.

    Raises ``ValueError`` if ``max_rows`` is smaller than the largest group.
    """
    _check(q, prefix_k, prefix_v, own_k, own_v, row_offsets, prefix_len, own_len)
    return _eager(q, prefix_k, prefix_v, own_k, own_v, row_offsets, prefix_len, own_len, max_rows, scale)


@torch.no_grad()
def _eager(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, own_k: Tensor, own_v: Tensor,
    row_offsets: Tensor | None, prefix_len: Tensor | None, own_len: Tensor | None, max_rows: int | None,
    scale: float | None,
) -> Tensor:  # fmt: skip
    (r, hq, d), (b, hkv, p, _), t = q.shape, prefix_k.shape, own_k.shape[2]
    if r == 0 or p + t == 0:
        return torch.zeros_like(q)
    dtype = q.dtype if q.dtype == torch.float64 else torch.float32
    groups = _Groups(row_offsets, b, r, hq // hkv, max_rows)
    scaled = q.to(dtype).view(r, hkv, hq // hkv, d) * (d**-0.5 if scale is None else scale)
    with torch.autocast(q.device.type, enabled=False):  # autocast would round the products
        own_score = _scores(scaled, own_k.to(dtype), own_len)  # [R, Hkv, Hq/Hkv, T]
        shared_score = _scores(groups.to_groups(scaled), prefix_k.to(dtype), prefix_len)
        score = torch.cat([groups.to_rows(shared_score, empty=-torch.inf), own_score], -1)
        weight = torch.softmax(score, -1)
        if own_len is not None or t == 0:  # a row may have no key: its softmax is NaN, its output must be 0
            weight = weight.masked_fill((score == -torch.inf).all(-1, keepdim=True), 0.0)
        shared = torch.matmul(groups.to_groups(weight[..., :p]), prefix_v.to(dtype))
        out = torch.matmul(weight[..., p:], own_v.to(dtype)) + groups.to_rows(shared, empty=0.0)
    return out.reshape(r, hq, d).to(q.dtype)


def _scores(q: Tensor, k: Tensor, length: Tensor | None) -> Tensor:
    """Scores [X, Hkv, M, K] of queries [X, Hkv, M, D] and keys [X, Hkv, K, D], -inf from ``length`` on."""
    score = torch.matmul(q, k.transpose(-1, -2))
    if length is not None:
        beyond = torch.arange(k.shape[2], device=k.device) >= length[:, None]
        score.masked_fill_(beyond[:, None, None], -torch.inf)
    return score


class _Groups:
    """Moves [R, Hkv, Hq/Hkv, K] by rows to [B, Hkv, n Hq/Hkv, K] by groups and back; n: rows of the largest group."""

    def __init__(self, row_offsets: Tensor | None, groups: int, rows: int, gq: int, max_rows: int | None) -> None:
        self.groups, self.rows, self.gq = groups, rows, gq
        self.table: Tensor | None = None  # [B, n]: row in each slot; None: rows are B x n in order
        if row_offsets is None:
            self.n = rows // max(groups, 1)
            return
        offsets = row_offsets.long()
        self.n = int(offsets.diff().max()) if groups else 0
        check(max_rows is None or self.n <= max_rows, f"max_rows: {max_rows}, but a group has {self.n} rows")
        row = torch.arange(rows, device=offsets.device)
        self.table = (offsets[:-1, None] + row[: self.n]).clamp(max=rows - 1)
        group = torch.searchsorted(offsets[1:].contiguous(), row, right=True)
        self.alone = group == groups  # rows that belong to no group
        self.group = group.clamp(max=max(groups - 1, 0))
        self.slot = (row - offsets[self.group]).clamp(max=max(self.n - 1, 0))

    def to_groups(self, x: Tensor) -> Tensor:
        heads, size = x.shape[1], x.shape[3]
        by_group = x.view(self.groups, self.n, heads, self.gq, size) if self.table is None else x[self.table]
        return by_group.transpose(1, 2).reshape(self.groups, heads, self.n * self.gq, size)

    def to_rows(self, x: Tensor, empty: float) -> Tensor:
        heads, size = x.shape[1], x.shape[3]
        if self.groups * self.n == 0:
            return x.new_full((self.rows, heads, self.gq, size), empty)
        by_slot = x.view(self.groups, heads, self.n, self.gq, size).transpose(1, 2)
        if self.table is None:
            return by_slot.reshape(self.rows, heads, self.gq, size)
        return by_slot[self.group, self.slot].masked_fill_(self.alone[:, None, None, None], empty)


def _check(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    row_offsets: Tensor | None,
    prefix_len: Tensor | None,
    own_len: Tensor | None,
) -> None:
    check_shape("q", q, (None, None, None))
    check_shape("prefix_k", prefix_k, (None, None, None, q.shape[2]))
    r, hq, d = q.shape
    b, hkv, p, _ = prefix_k.shape
    check(hkv > 0 and hq % hkv == 0 and hq > 0 and d > 0, f"q: {hq} heads of {d} do not fit {hkv} key heads")
    check_shape("prefix_v", prefix_v, (b, hkv, p, d))
    check_shape("own_k", own_k, (r, hkv, None, d))
    check_shape("own_v", own_v, (r, hkv, own_k.shape[2], d))
    check_dtype("q", q, FLOATS)
    for name, x in (("prefix_k", prefix_k), ("prefix_v", prefix_v), ("own_k", own_k), ("own_v", own_v)):
        check_dtype(name, x, (q.dtype,))
    for name, x, size in (("row_offsets", row_offsets, b + 1), ("prefix_len", prefix_len, b), ("own_len", own_len, r)):
        if x is not None:
            check_shape(name, x, (size,))
            check_dtype(name, x, (torch.int32,))
    if row_offsets is None:
        check(r == 0 if b == 0 else r % b == 0, f"q: {r} rows do not split into {b} equal groups; give row_offsets")
    check_same_device(
        q=q, prefix_k=prefix_k, prefix_v=prefix_v, own_k=own_k, own_v=own_v,
        row_offsets=row_offsets, prefix_len=prefix_len, own_len=own_len,
    )  # fmt: skip
