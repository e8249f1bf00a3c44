"""Exact batched rectangular assignment: assigns columns to rows so that the total cost is lowest.

Shortest augmenting paths (Crouse 2016; Jonker and Volgenant 1987): rows are matched one after another, each by a
Dijkstra search over reduced costs ``c[r, j] - u[r] - v[j]`` that ends at the nearest free column and moves the matches
on its path one step along. Detection-like costs have few conflicts, so most rows are matched in one step.

Why it is fast. On a GPU one program solves one problem and keeps all state in registers: a lane is a column of the
longer side and holds its dual ``v``, its row, its distance and the column before it on its path. The row duals are
never stored (``u[r] = c[r, j] - v[j]`` at r's column j), nor is the inverse matching, since paths are kept as columns.
The only memory access of the inner loop is the cost row, read-only: no scratch, no race, and with one warp no barrier.
Distances are mapped to integers of the same order, so minimum and arg-minimum are one ``REDUX`` each. The longer side
is laid across the lanes by swapping strides, without a transposed copy. On CPU the same algorithm runs in C++
(``csrc/``), preceded by augmenting row reduction, with SIMD inner loops and the batch spread over threads.

No gradient: a matching is piecewise constant in the costs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from fastrl_kernels import _native
from fastrl_kernels._common import (
    FLOATS,
    INTEGERS,
    check,
    check_dtype,
    check_same_device,
    check_shape,
    join_batches,
    launch,
    readable,
    use_triton,
)
from fastrl_kernels._triton import tl, triton

COUNTABLE = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)  # integer costs are converted to floats
OK, INFEASIBLE, INVALID = 0, 1, 2  # status bits
MAX_LANES = 4096  # longer side on a GPU; row and column numbers are packed in 14 bits each
IN_TREE = tl.constexpr(-(1 << 31))  # sign bit of ``before``


class Assignment(NamedTuple):
    """Result of :func:`linear_assignment`, all on the device of the costs."""

    match: Tensor  # [B, n] int64: the column of each row, -1: none
    total: Tensor  # [B] sum of the matched costs; float64 for float64 costs, else float32
    status: Tensor  # [B] int32: OK (0), or INFEASIBLE (1) and INVALID (2) added up


# ---- search steps, shared with detection_reward ----------------------------------------------------------------------


@triton.jit
def value_at(x, lane, j):
    """x[j] of an fp32 lane vector, as an integer sum with one non-zero term (a single REDUX)."""
    bits = tl.where(lane == j, x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def relax(cost, v, dist, before, lane, at, low, row):
    """Lower ``dist`` through ``row``, reached over column ``at`` (-1: the root) at distance ``low``.

    ``before`` packs (column before + 1) << 14 | row that lowered it; the sign bit marks columns in the tree. Also
    returns the offset, which is the reduced cost of leaving this row unmatched.
    """
    reduced = cost - v
    offset = tl.where(at >= 0, low - value_at(reduced, lane, at), 0.0)
    candidate = reduced + offset
    better = (candidate < dist) & (before >= 0)
    return tl.where(better, candidate, dist), tl.where(better, ((at + 1) << 14) | row, before), offset


@triton.jit
def nearest(dist, owner, before, lane):
    """Lowest distance outside the tree, and a code of its column: taken << 29 | column << 14 | owner.

    Among equals the lowest code wins: free columns first, then the lowest index. +inf or NaN: nothing reachable.
    """
    bits = dist.to(tl.int32, bitcast=True)
    key = tl.where(before >= 0, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)  # integers in the order of the floats
    best = tl.min(key, 0)
    low = (best ^ ((best >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    code = tl.where(owner >= 0, 1 << 29, 0) | (lane << 14) | (owner & 0x3FFF)
    return low, tl.min(tl.where(key == best, code, 0x7FFFFFFF), 0)


@triton.jit
def augment(owner, before, lane, end):
    """Give every column on the path that ends at ``end`` (-1: no path) the row that reached it."""
    j = end
    while j >= 0:
        packed = tl.sum(tl.where(lane == j, before & 0x7FFFFFFF, 0), 0)
        owner = tl.where(lane == j, packed & 0x3FFF, owner)
        j = (packed >> 14) - 1
    return owner


@triton.jit
def clamped_count(counts, b, size, GIVEN: tl.constexpr):
    """counts[b] within [0, size], as int32; size where no counts were given."""
    if GIVEN:
        return tl.minimum(tl.maximum(tl.load(counts + b), 0), size).to(tl.int32)
    else:
        return size


# Not specialised on the alignment of sizes: vectorised access would need a layout change through shared memory.
@triton.jit(do_not_specialize_on_alignment=["n", "m", "stride_b", "stride_n", "stride_m"])
def _assignment_kernel(
    cost,  # [B, n, m]
    n_rows, n_cols,  # [B] int64
    match, total, status,  # [B, n] int64, [B] fp32, [B] int32
    n, m, stride_b, stride_n, stride_m,
    HAS_ROWS: tl.constexpr, HAS_COLS: tl.constexpr, MAXIMIZE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    rows = clamped_count(n_rows, b, n, HAS_ROWS)
    cols = clamped_count(n_cols, b, m, HAS_COLS)
    swap = rows > cols
    short = tl.minimum(rows, cols)
    step_short = tl.where(swap, stride_m, stride_n)
    step_lane = tl.where(swap, stride_n, stride_m)
    lane = tl.arange(0, LANES)
    inside = lane < tl.maximum(rows, cols)
    base = cost + b * stride_b

    v = tl.zeros([LANES], tl.float32)
    owner = tl.full([LANES], -1, tl.int32)
    invalid = tl.zeros([LANES], tl.int32)
    infeasible = 0
    for root in range(short):
        dist = tl.full([LANES], float("inf"), tl.float32)
        before = tl.zeros([LANES], tl.int32)
        at = -1
        row = root
        low = 0.0
        end = -2  # -2: searching, -1: no free column can be reached
        while end == -2:
            c = tl.load(base + row * step_short + lane * step_lane, mask=inside, other=float("inf"))
            c = c.to(tl.float32)
            if MAXIMIZE:
                c = tl.where(inside, -c, float("inf"))
            usable = c > float("-inf")  # false for NaN too
            invalid = invalid | tl.where(usable, 0, 1)
            c = tl.where(usable, c, float("inf"))
            dist, before, _ = relax(c, v, dist, before, lane, at, low, row)
            low, code = nearest(dist, owner, before, lane)
            at = (code >> 14) & 0x3FFF
            row = code & 0x3FFF
            if low < float("inf"):
                if code < (1 << 29):
                    end = at
                else:
                    before = tl.where(lane == at, before | IN_TREE, before)
            else:
                end = -1
        if end >= 0:
            v = tl.where(before < 0, v + (dist - low), v)
            owner = augment(owner, before, lane, end)
        else:
            infeasible = 1
            if rows <= cols:
                tl.store(match + b * n + root, tl.full([], -1, tl.int64))
    # Rows past the count are distinct from matched and unmatched ones, so no address is stored to twice.
    if swap:
        tl.store(match + b * n + lane, owner.to(tl.int64), mask=lane < n)
    else:
        tl.store(match + b * n + owner, lane.to(tl.int64), mask=owner >= 0)
        first = rows
        while first < n:
            tl.store(match + b * n + first + lane, tl.full([LANES], -1, tl.int64), mask=first + lane < n)
            first += LANES
    c = tl.load(base + owner * step_short + lane * step_lane, mask=owner >= 0, other=0.0)
    tl.store(total + b, tl.sum(c.to(tl.float32), 0))
    tl.store(status + b, infeasible | (tl.max(invalid, 0) << 1))


def lane_count(longest: int) -> int:
    """Lanes of a program for this many columns: the next power of two, at least a warp."""
    return max(32, 1 << max(longest - 1, 0).bit_length())


def launch_warps(lanes: int) -> int:
    """Warps of a program with this many lanes: one (and so no barrier) as long as its registers can hold the state."""
    return 1 if lanes <= 256 else lanes // 128 if lanes > 2048 else lanes // 256


def _launch(
    cost: Tensor, n_rows: Tensor | None, n_cols: Tensor | None, maximize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    problems, n, m = cost.shape
    if sum((size - 1) * stride for size, stride in zip(cost.shape[1:], cost.stride()[1:], strict=True)) >= 2**31:
        cost = cost.contiguous()  # offsets within one problem are 32 bits
    match = torch.empty((problems, n), dtype=torch.int64, device=cost.device)
    total = torch.empty(problems, dtype=torch.float32, device=cost.device)
    status = torch.empty(problems, dtype=torch.int32, device=cost.device)
    lanes = lane_count(max(n, m))
    unused = status  # a valid pointer for what is not given
    launch(_assignment_kernel, problems)(
        cost,
        unused if n_rows is None else n_rows,
        unused if n_cols is None else n_cols,
        match,
        total,
        status,
        n,
        m,
        *cost.stride(),
        HAS_ROWS=n_rows is not None,
        HAS_COLS=n_cols is not None,
        MAXIMIZE=maximize,
        LANES=lanes,
        num_warps=launch_warps(lanes),
        num_stages=1,
    )
    return match, total, status


# ---- operator --------------------------------------------------------------------------------------------------------


def _solve(cost: Tensor, n_rows: Tensor | None, n_cols: Tensor | None, maximize: bool) -> tuple[Tensor, Tensor, Tensor]:
    if cost.shape[0] == 0:
        return _op_fake(cost, n_rows, n_cols, maximize)  # nothing to fill in
    if use_triton(cost) and cost.dtype != torch.float64:
        return _launch(cost, n_rows, n_cols, maximize)
    if cost.device.type == "cpu" and _native.library() is not None:
        return _native.linear_assignment(cost, n_rows, n_cols, maximize)
    out = linear_assignment_reference(cost, n_rows=n_rows, n_cols=n_cols, maximize=maximize)
    return out.match, out.total, out.status


_op = torch.library.custom_op("fastrl::linear_assignment", _solve, mutates_args=())


@_op.register_fake
def _op_fake(
    cost: Tensor, n_rows: Tensor | None, n_cols: Tensor | None, maximize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    problems, n, _ = cost.shape
    exact = torch.float64 if cost.dtype == torch.float64 else torch.float32
    return (
        cost.new_empty((problems, n), dtype=torch.int64),
        cost.new_empty((problems,), dtype=exact),
        cost.new_empty((problems,), dtype=torch.int32),
    )


@_op.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    size, maximize = info.batch_size, arguments[3]
    cost, n_rows, n_cols = join_batches(size, in_dims[:3], arguments[:3])
    found = _op(cost, n_rows, n_cols, maximize)
    return tuple(x.unflatten(0, (size, x.shape[0] // size)) for x in found), (0, 0, 0)


def linear_assignment(
    cost: Tensor,
    *,
    n_rows: Tensor | None = None,
    n_cols: Tensor | None = None,
    maximize: bool = False,
    strict: bool = False,
) -> Assignment:
    """Optimal one-to-one matching of rows to columns, for a batch of problems.

    Every problem matches ``min(rows, cols)`` pairs at the lowest total cost (the highest with ``maximize``). An entry
    of +inf (-inf with ``maximize``) forbids its pair. NaN and the other infinity also forbid theirs, and set the status
    bit ``INVALID`` (2). If the allowed pairs do not admit a complete matching, bit ``INFEASIBLE`` (1) is set and the
    matching has as many pairs as possible: rows (or columns) of the shorter side are added in order if they can be
    matched, and those added are matched at the lowest cost. Nothing is read back from the device.

    Exact: CPU solves in float64; a GPU in float32 (integers below 2^24 exactly, else optimal up to rounding of path
    sums, relative to the largest cost). Keep finite costs below 1e37 in magnitude (1e307 in float64): sums that
    overflow count as forbidden. Deterministic: the same input gives the same matching. If several matchings are
    optimal, CPU and GPU may return different ones; on CPU, problems at least twice as long as wide break ties as SciPy
    nearly always does: shorter side in order, free lines first, then the lowest index.

    Args:
        cost: ``[B, n, m]``, or one ``[n, m]``, whose results have no batch dimension: float32, bfloat16, float16, or
            float64 (CPU only), any strides. Integers become float64 on CPU (int8 to int16: float32) and float32 on a
            GPU, as does ``total`` then.
        n_rows, n_cols: ``[B]`` int64 or int32, the valid size of each problem; clamped to [0, n] and [0, m].
        maximize: maximise the total instead.
        strict: raise on a nonzero status. This reads the status, which synchronises a GPU.

    Returns:
        :class:`Assignment`: ``match [B, n]``, ``total [B]``, ``status [B]``. ``total`` carries no gradient; gather the
        matched costs for one.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device; float64 or more than 4096 lines on a GPU; ``strict``.
    """
    single = cost.dim() == 2
    if single:
        check(n_rows is None and n_cols is None, "cost: counts need a batch, [B, n, m]")
        cost = cost.unsqueeze(0)
    if cost.dtype in COUNTABLE:
        cost = cost.float() if cost.is_cuda or cost.dtype in (torch.int8, torch.uint8, torch.int16) else cost.double()
    n_rows, n_cols = _check_arguments(cost, n_rows, n_cols)
    cost = cost.detach()
    run = _solve if readable(cost, n_rows, n_cols) else _op
    out = Assignment(*run(cost, n_rows, n_cols, bool(maximize)))
    if strict and is_batchedtensor(out.status):
        raise ValueError("strict: the status cannot be read under vmap; read Assignment.status after it")
    if strict and bool((out.status != OK).any()):
        first = int((out.status != OK).nonzero()[0])
        raise ValueError(
            f"cost: problem {first} has status {int(out.status[first])} "
            f"({INFEASIBLE}: no complete matching, {INVALID}: NaN or an infinity of the wrong sign)"
        )
    return Assignment(*(x[0] for x in out)) if single else out


def _check_arguments(cost: Tensor, n_rows: Tensor | None, n_cols: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    check_shape("cost", cost, (None, None, None))
    check_dtype("cost", cost, FLOATS)
    for name, counts in (("n_rows", n_rows), ("n_cols", n_cols)):
        if counts is not None:
            check_shape(name, counts, (cost.shape[0],))
            check_dtype(name, counts, INTEGERS)
    check_same_device(cost=cost, n_rows=n_rows, n_cols=n_cols)
    if cost.is_cuda:
        check(cost.dtype != torch.float64, "cost: float64 is solved on CPU only; pass cost.float() or cost.cpu()")
        longest = max(cost.shape[1:])
        check(longest <= MAX_LANES, f"cost: at most {MAX_LANES} rows and columns on a GPU, got {longest}")
    return (
        None if n_rows is None else n_rows.to(torch.int64).contiguous(),
        None if n_cols is None else n_cols.to(torch.int64).contiguous(),
    )


# ---- eager twin ------------------------------------------------------------------------------------------------------


def linear_assignment_reference(
    cost: Tensor,
    *,
    n_rows: Tensor | None = None,
    n_cols: Tensor | None = None,
    maximize: bool = False,
) -> Assignment:
    """:func:`linear_assignment` in plain torch, in float64; the searches of all problems advance together."""
    problems, n, m = cost.shape
    index = torch.arange(max(n, m), device=cost.device)
    rows = _counts(n_rows, problems, n, cost.device)
    cols = _counts(n_cols, problems, m, cost.device)
    c = -cost.double() if maximize else cost.double()
    inside = (index[:n] < rows[:, None])[:, :, None] & (index[:m] < cols[:, None])[:, None, :]
    usable = c > -torch.inf
    invalid = (inside & ~usable).flatten(1).any(1)
    c = torch.where(inside & usable, c, torch.inf)

    swap = rows > cols
    short, long = min(n, m), max(n, m)
    straight = c.new_full((problems, short, long), torch.inf)
    turned = straight.clone()
    straight[:, :, :m] = c[:, :short]
    turned[:, :, :n] = c.mT[:, :short]
    owner, complete = augmenting_paths(
        torch.where(swap[:, None, None], turned, straight), torch.minimum(rows, cols), optional=False
    )
    of_row = owner[:, :n]  # swapped problems: lanes are rows
    of_lane = torch.full((problems, n + 1), -1, dtype=torch.int64, device=cost.device)
    lanes = index[None, :].expand(problems, -1)
    of_lane.scatter_(1, torch.where((owner >= 0) & ~swap[:, None], owner, n), lanes)  # column n is discarded
    match = torch.where(swap[:, None], of_row, of_lane[:, :n])
    picked = cost.double().gather(2, match.clamp(min=0)[:, :, None])[:, :, 0] if m else torch.zeros_like(match.double())
    total = torch.where(match >= 0, picked, 0.0).sum(1)
    exact = torch.float64 if cost.dtype == torch.float64 else torch.float32
    return Assignment(match, total.to(exact), (~complete).to(torch.int32) * INFEASIBLE + invalid.int() * INVALID)


def _counts(counts: Tensor | None, problems: int, size: int, device: torch.device) -> Tensor:
    if counts is None:
        return torch.full((problems,), size, dtype=torch.int64, device=device)
    return counts.to(torch.int64).clamp(0, size)


def augmenting_paths(cost: Tensor, rows: Tensor, *, optional: bool) -> tuple[Tensor, Tensor]:
    """Match rows ``0 .. rows[b]`` of ``cost [B, S, L]`` (float64, +inf: forbidden) to columns at least cost.

    ``optional``: a row may stay unmatched at cost 0. Returns the row of each column ``[B, L]`` (-1: free) and whether
    every row found a column ``[B]``. One iteration is one step of the search of every unfinished problem.
    """
    problems, _, width = cost.shape
    b = torch.arange(problems, device=cost.device)
    lane = torch.arange(width, device=cost.device)
    owner = torch.full((problems, width), -1, dtype=torch.int64, device=cost.device)
    complete = torch.ones(problems, dtype=torch.bool, device=cost.device)
    v, dist = torch.zeros_like(owner, dtype=cost.dtype), torch.full_like(owner, torch.inf, dtype=cost.dtype)
    before, tree = torch.full_like(owner, -1), torch.zeros_like(owner, dtype=torch.bool)
    root, at = torch.zeros_like(b), torch.full_like(b, -1)
    low, leave = torch.zeros_like(b, dtype=cost.dtype), torch.full_like(b, torch.inf, dtype=cost.dtype)
    leave_at = at.clone()
    while width and bool((active := root < rows).any()):
        row = torch.where(at < 0, root, owner[b, at])
        reduced = cost[b, row.clamp(0, cost.shape[1] - 1)] - v
        offset = torch.where(at < 0, 0.0, low - reduced[b, at])
        better = ~tree & (reduced + offset[:, None] < dist)
        dist = torch.where(better, reduced + offset[:, None], dist)
        before = torch.where(better, at[:, None], before)
        low, pick = _nearest(torch.where(tree, torch.inf, dist), owner, lane)
        end = torch.where(owner[b, pick] < 0, pick, -2)  # -2: searching, -1: end without a new column
        end = torch.where(low < torch.inf, end, -1)
        if optional:
            leave_at = torch.where(offset < leave, at, leave_at)
            leave = torch.minimum(leave, offset)
            give_up = ~(low < leave)
            end, low = torch.where(give_up, leave_at, end), torch.where(give_up, leave, low)
        else:
            complete = complete & ~(active & (end == -1))
        ended = active & (end != -2)
        moved = ended & (low < torch.inf)
        v = torch.where(moved[:, None] & tree, v + dist - low[:, None], v)
        _augment(owner, before, root, torch.where(moved, end, -1))
        tree = (tree | (lane == pick[:, None])) & ~ended[:, None]
        at = torch.where(ended, -1, pick)
        dist, before = torch.where(ended[:, None], torch.inf, dist), torch.where(ended[:, None], -1, before)
        leave, root = torch.where(ended, torch.inf, leave), root + ended.long()
    return owner, complete & ((rows == 0) | torch.tensor(width > 0, device=cost.device))


def _nearest(dist: Tensor, owner: Tensor, lane: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest distance per problem and its column: among equals a free one first, then the lowest index."""
    low = dist.min(1).values
    code = lane + torch.where(owner >= 0, lane.numel(), 0)
    return low, torch.where(dist == low[:, None], code, 2 * lane.numel()).argmin(1)


def _augment(owner: Tensor, before: Tensor, root: Tensor, end: Tensor) -> None:
    b = torch.arange(owner.shape[0], device=owner.device)
    j = end
    while bool((j >= 0).any()):
        on = j >= 0
        previous = before[b, j]
        row = torch.where(previous < 0, root, owner[b, previous])
        owner[b[on], j[on]] = row[on]
        j = torch.where(on, previous, -1)
