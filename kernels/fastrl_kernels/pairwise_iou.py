"""Overlap of every box of one set with every box of another: IoU, GIoU, DIoU, CIoU, and their gradients.

With I the intersection, A and B the areas, U = A + B - I the union, C the area of the hull (the smallest box around
both), D = cw^2 + ch^2 + 1e-7 its squared diagonal, R the squared distance of the centres and theta = atan(w / h):

    iou = I / U      giou = iou - (C - U) / C      diou = iou - R / D
    ciou = diou - alpha v,   v = (4 / pi^2) (theta_a - theta_b)^2,   alpha = v / (1 - iou + v + 1e-7)

as torchvision defines them (Rezatofighi et al. 2019; Zheng et al. 2020). Gradients, with respect to a coordinate of a:

    d iou = (1 + iou)/U dI - iou/U dA         d giou = d iou + (dA - dI)/C - U/C^2 dC
    d diou = d iou - dR/D + R/D^2 dD          d ciou = d diou - (2 alpha - alpha^2) dv - alpha^2 d iou

where dI, dC and dD follow the minima and maxima (half each at ties). The last line differentiates alpha too, so it is
the derivative of the value; torchvision holds alpha constant. All kinds are symmetric in (a, b): one backward kernel
serves both sides, with the roles swapped.

Why it is fast: a box is one vectorised load and a pair is one pass in registers, against several [n, m, 2] temporaries
in eager code. A program is one warp, so it needs no barrier; sums and maxima are kept per lane and reduced once, at the
end. ``reduce="max"`` keeps a running row maximum, so the [n, m] table is never written.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastrl_kernels import _native
from fastrl_kernels._box_overlap import EMPTY, FARTHEST, load_boxes, pair_gradient, pair_value
from fastrl_kernels._common import (
    FLOATS,
    INTEGERS,
    check,
    check_dtype,
    check_same_device,
    check_shape,
    floating_pair,
    launch,
    readable,
    refuse_forward_mode,
    use_triton,
)
from fastrl_kernels._triton import tl, triton

KINDS = ("iou", "giou", "diou", "ciou")
_EPS = 1e-7
_STRIDES = ("grad_batch", "grad_i", "grad_j", "best_batch", "best_i", "best_j")
_LANES = 32  # boxes of b per step, one per lane of the warp: no barrier, no shared memory
_TABLE_ROWS, _ROWS = 4, 2  # boxes of a per program: in the table, and where a sum or maximum per pair is kept


# Not specialised on the alignment of sizes: a warp's accesses are contiguous already, and vectorised ones would need
# another layout.
@triton.jit(do_not_specialize_on_alignment=["n", "m"])
def _iou_kernel(
    a, b, n_a, n_b,  # [B, n, 4], [B, m, 4], [B] int64
    out,  # [B, n, m]
    n, m, blocks_n, blocks_m, KIND: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One tile of the table."""
    program = tl.program_id(0)
    batch = (program // (blocks_n * blocks_m)).to(tl.int64)
    i = program // blocks_m % blocks_n * BLOCK_A + tl.arange(0, BLOCK_A)
    j = program % blocks_m * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = (i < tl.load(n_a + batch))[:, None] & (j < tl.load(n_b + batch))[None, :]
    ax1, ay1, ax2, ay2 = load_boxes(a + batch * n * 4, i[:, None], (i < n)[:, None])  # pyright: ignore[reportGeneralTypeIssues]
    bx1, by1, bx2, by2 = load_boxes(b + batch * m * 4, j[None, :], (j < m)[None, :])
    value = tl.where(inside, pair_value(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND), 0.0)
    at = out + batch * n * m + i[:, None].to(tl.int64) * m + j[None, :]
    tl.store(at, value, mask=(i < n)[:, None] & (j < m)[None, :])


@triton.jit(do_not_specialize_on_alignment=["n", "m"])
def _iou_max_kernel(
    a, b, n_a, n_b,  # [B, n, 4], [B, m, 4], [B] int64
    out, best,  # [B, n] fp32 and int32: row maximum and its first column, 0 and -1 where there is none
    n, m, blocks_n, KIND: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch = (program // blocks_n).to(tl.int64)
    i = program % blocks_n * BLOCK_A + tl.arange(0, BLOCK_A)
    lane = tl.arange(0, BLOCK_B)
    rows = i < tl.minimum(tl.load(n_a + batch), n)
    cols = tl.minimum(tl.load(n_b + batch), m).to(tl.int32)
    ax1, ay1, ax2, ay2 = load_boxes(a + batch * n * 4, i[:, None], rows[:, None])  # pyright: ignore[reportGeneralTypeIssues]
    top = tl.full([BLOCK_A, BLOCK_B], float("-inf"), tl.float32)  # of each lane's columns; lanes meet once, at the end
    where = tl.full([BLOCK_A, BLOCK_B], 0x7FFFFFFF, tl.int32)
    for first in range(0, cols, BLOCK_B):
        j = first + lane
        bx1, by1, bx2, by2 = load_boxes(b + batch * m * 4, j[None, :], (j < cols)[None, :])
        value = pair_value(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND)
        higher = (value > top) & (j < cols)[None, :]
        where = tl.where(higher, j[None, :], where)
        top = tl.where(higher, value, top)
    highest = tl.max(top, 1)
    column = tl.min(tl.where(top == highest[:, None], where, 0x7FFFFFFF), 1)
    some = rows & (cols > 0)
    tl.store(out + batch * n + i, tl.where(some, highest, 0.0), mask=i < n)
    tl.store(best + batch * n + i, tl.where(some, column, -1), mask=i < n)


@triton.jit(do_not_specialize_on_alignment=["n", "m", *_STRIDES])
def _iou_backward_kernel(
    a, b, n_a, n_b,  # [B, n, 4], [B, m, 4], [B] int64: a is the side the gradient is for
    grad, best, grad_a,  # upstream gradient, row maxima's columns, [B, n, 4] fp32
    n, m, blocks_n, grad_batch, grad_i, grad_j, best_batch, best_i, best_j,
    KIND: tl.constexpr, SIDE: tl.constexpr,  # 0: no maximum was taken, 1: a has the maxima, 2: b has
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch = (program // blocks_n).to(tl.int64)
    i = program % blocks_n * BLOCK_A + tl.arange(0, BLOCK_A)
    lane = tl.arange(0, BLOCK_B)
    rows = i < tl.minimum(tl.load(n_a + batch), n)
    cols = tl.minimum(tl.load(n_b + batch), m).to(tl.int32)
    ax1, ay1, ax2, ay2 = load_boxes(a + batch * n * 4, i[:, None], rows[:, None])  # pyright: ignore[reportGeneralTypeIssues]
    gx1 = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    gy1 = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    gx2 = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    gy2 = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for first in range(0, cols, BLOCK_B):
        j = first + lane
        mask = rows[:, None] & (j < cols)[None, :]
        bx1, by1, bx2, by2 = load_boxes(b + batch * m * 4, j[None, :], (j < cols)[None, :])
        at = grad + batch * grad_batch + i[:, None].to(tl.int64) * grad_i + j[None, :].to(tl.int64) * grad_j
        g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if SIDE > 0:
            chosen = tl.load(best + batch * best_batch + i[:, None] * best_i + j[None, :] * best_j, mask=mask, other=-1)
            other = j[None, :] if SIDE == 1 else i[:, None]
            g = tl.where(chosen == other, g, 0.0)
        d1, d2, d3, d4 = pair_gradient(g, ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND)
        gx1 += d1
        gy1 += d2
        gx2 += d3
        gy2 += d4
    to = grad_a + (batch * n + i) * 4
    tl.store(to, tl.sum(gx1, 1), mask=i < n)
    tl.store(to + 1, tl.sum(gy1, 1), mask=i < n)
    tl.store(to + 2, tl.sum(gx2, 1), mask=i < n)
    tl.store(to + 3, tl.sum(gy2, 1), mask=i < n)


def _launch_backward(
    grad: Tensor, best: Tensor, a: Tensor, b: Tensor, n_a: Tensor, n_b: Tensor, kind: int, side: int
) -> Tensor:
    """Gradient for ``a``; ``grad`` and ``best`` have a's boxes on their second and b's on their third axis."""
    problems, n, m = a.shape[0], a.shape[1], b.shape[1]
    grad_a = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    if n and m:
        blocks = -(-n // _ROWS)
        launch(_iou_backward_kernel, problems * blocks)(
            a, b, n_a, n_b, grad, best, grad_a, n, m, blocks, *grad.stride(), *best.stride(),
            KIND=kind, SIDE=side, BLOCK_A=_ROWS, BLOCK_B=_LANES,
            num_warps=1,
        )  # fmt: skip
    else:
        grad_a.zero_()
    return grad_a.to(a.dtype)


@torch.library.custom_op("fastrl::pairwise_iou", mutates_args=())
def _op(a: Tensor, b: Tensor, n_a: Tensor, n_b: Tensor, kind: int, reduce: bool) -> tuple[Tensor, Tensor]:
    """The Triton path on ``[B, n, 4]`` and ``[B, m, 4]``, contiguous: values, and the maxima's columns."""
    out, best = _op_fake(a, b, n_a, n_b, kind, reduce)
    (problems, n, _), m = a.shape, b.shape[1]
    rows = _ROWS if reduce else _TABLE_ROWS
    blocks_n, blocks_m = -(-n // rows), -(-m // _LANES)
    if out.numel() == 0:
        return out, best
    common: dict[str, Any] = {"KIND": kind, "BLOCK_A": rows, "BLOCK_B": _LANES, "num_warps": 1}
    if reduce:
        launch(_iou_max_kernel, problems * blocks_n)(a, b, n_a, n_b, out, best, n, m, blocks_n, **common)
    else:
        launch(_iou_kernel, problems * blocks_n * blocks_m)(a, b, n_a, n_b, out, n, m, blocks_n, blocks_m, **common)
    return out, best


@_op.register_fake
def _op_fake(a: Tensor, b: Tensor, n_a: Tensor, n_b: Tensor, kind: int, reduce: bool) -> tuple[Tensor, Tensor]:
    problems, n, m = a.shape[0], a.shape[1], b.shape[1]
    out = a.new_empty((problems, n) if reduce else (problems, n, m), dtype=torch.float32)
    return out, a.new_empty((problems, n) if reduce else (0, 0), dtype=torch.int32)


@torch.library.custom_op("fastrl::pairwise_iou_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    best: Tensor,
    a: Tensor,
    b: Tensor,
    n_a: Tensor,
    n_b: Tensor,
    kind: int,
    reduce: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    if reduce:
        grad, best = grad[:, :, None].expand(-1, -1, b.shape[1]), best[:, :, None].expand(-1, -1, b.shape[1])
    else:
        best = best[:, :, None]
    grad_a, grad_b = _backward_fake(grad, best, a, b, n_a, n_b, kind, reduce, needs)
    if needs[0]:
        grad_a = _launch_backward(grad, best, a, b, n_a, n_b, kind, 1 if reduce else 0)
    if needs[1]:
        grad_b = _launch_backward(grad.mT, best.mT, b, a, n_b, n_a, kind, 2 if reduce else 0)
    return grad_a, grad_b


@_backward_op.register_fake
def _backward_fake(
    grad: Tensor,
    best: Tensor,
    a: Tensor,
    b: Tensor,
    n_a: Tensor,
    n_b: Tensor,
    kind: int,
    reduce: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape if needs[0] else 0), b.new_empty(b.shape if needs[1] else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, n_a, n_b, ctx.kind, ctx.reduce = inputs
    ctx.save_for_backward(a, b, n_a, n_b, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    a, b, n_a, n_b, best = ctx.saved_tensors
    needs = [bool(x) for x in ctx.needs_input_grad[:2]]
    grad_a, grad_b = _backward_op(grad, best, a, b, n_a, n_b, ctx.kind, ctx.reduce, needs)
    return grad_a if needs[0] else None, grad_b if needs[1] else None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def pairwise_iou(
    a: Tensor,
    b: Tensor,
    *,
    kind: str = "iou",
    n_a: Tensor | None = None,
    n_b: Tensor | None = None,
    reduce: str | None = None,
) -> Tensor:
    """Overlap of every box of ``a`` with every box of ``b``; differentiable in both.

    Equal to torchvision's ``box_iou``, ``generalized_``, ``distance_`` and ``complete_box_iou`` where those are finite,
    for boxes with ``x1 <= x2`` and ``y1 <= y2``. An inverted side counts as length 0. If the union is empty (up to
    2^-80, 1e-24) the IoU is 0; if the hull is, GIoU is the IoU. Pairs with a coordinate that is not finite, or of
    magnitude 2^40 (1e12) or more, give 0 for every kind, with gradient 0.

    Args:
        a, b: ``[..., n, 4]`` and ``[..., m, 4]``, corners (x1, y1, x2, y2) in any one unit, float32, bfloat16, float16
            or float64, the same dtype, or whole pixels of any integer dtype; leading dimensions broadcast.
        kind: ``"iou"``, ``"giou"``, ``"diou"`` or ``"ciou"``.
        n_a, n_b: number of valid boxes, integers shaped like the broadcast leading dimensions. Other pairs give 0.
        reduce: ``"max"`` returns each row's maximum over the valid boxes of ``b`` (0 if there is none); its gradient
            goes to the first column that attains it.

    Returns:
        ``[..., n, m]``, or ``[..., n]`` with ``reduce``; float32, or float64 for float64 boxes (eager on any device).

    Raises:
        ValueError, TypeError: wrong shape, dtype, device, ``kind`` or ``reduce``.
    """
    a, b = floating_pair(a, b)
    _check_arguments(a, b, kind, n_a, n_b, reduce)
    native = _takes_native(a, b, n_a, n_b)
    if not native and (not use_triton(a) or a.dtype == torch.float64):
        return pairwise_iou_reference(a, b, kind=kind, n_a=n_a, n_b=n_b, reduce=reduce)
    refuse_forward_mode("pairwise_iou", a, b)
    lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    n, m = a.shape[-2], b.shape[-2]
    problems = math.prod(lead)
    flat_a = a.expand(*lead, n, 4).reshape(problems, n, 4).contiguous()
    flat_b = b.expand(*lead, m, 4).reshape(problems, m, 4).contiguous()
    count_a, count_b = (
        torch.full((problems,), size, dtype=torch.int64, device=a.device)
        if given is None
        else given.expand(lead).reshape(problems).to(torch.int64).contiguous()
        for given, size in ((n_a, n), (n_b, m))
    )
    if native:
        out = _native.pairwise_iou(flat_a, flat_b, count_a, count_b, KINDS.index(kind), reduce == "max")
    else:
        out, _ = _op(flat_a, flat_b, count_a, count_b, KINDS.index(kind), reduce == "max")
    return out.reshape(*lead, n) if reduce else out.reshape(*lead, n, m)


def _takes_native(a: Tensor, b: Tensor, n_a: Tensor | None, n_b: Tensor | None) -> bool:
    """Whether C++ computes this call: values alone, as derivatives (of any order) are those of the eager code."""
    if not readable(a, b, n_a, n_b) or use_triton(a) or forward_ad._current_level >= 0:
        return False
    learned = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return not learned and _native.computes("fastrl_pairwise_iou", a)


def _check_arguments(
    a: Tensor, b: Tensor, kind: str, n_a: Tensor | None, n_b: Tensor | None, reduce: str | None
) -> None:
    for name, boxes in (("a", a), ("b", b)):
        check(
            boxes.dim() >= 2 and boxes.shape[-1] == 4, f"{name}: expected shape [..., any, 4], got {list(boxes.shape)}"
        )
        check_dtype(name, boxes, FLOATS)
    check_dtype("b", b, (a.dtype,))
    check(kind in KINDS, f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    check(reduce in (None, "max"), f"reduce: expected None or 'max', got {reduce!r}")
    try:
        lead = tuple(torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
    except RuntimeError:
        raise ValueError(f"a, b: leading dimensions {list(a.shape[:-2])} and {list(b.shape[:-2])} differ") from None
    for name, counts in (("n_a", n_a), ("n_b", n_b)):
        if counts is not None:
            check_shape(name, counts, lead)
            check_dtype(name, counts, INTEGERS)
    check_same_device(a=a, b=b, n_a=n_a, n_b=n_b)


def pairwise_iou_reference(
    a: Tensor,
    b: Tensor,
    *,
    kind: str = "iou",
    n_a: Tensor | None = None,
    n_b: Tensor | None = None,
    reduce: str | None = None,
) -> Tensor:
    """:func:`pairwise_iou` in plain torch, differentiated by autograd; the CPU path where there is a gradient."""
    a, b = floating_pair(a, b)
    exact = torch.float64 if a.dtype == torch.float64 else torch.float32
    a, b = a.to(exact)[..., :, None, :], b.to(exact)[..., None, :, :]
    # Out-of-range coordinates are replaced before any arithmetic: a NaN that is masked later has a NaN gradient.
    near_a, near_b = a.abs() < FARTHEST, b.abs() < FARTHEST
    ax1, ay1, ax2, ay2 = torch.where(near_a, a, 0.0).unbind(-1)
    bx1, by1, bx2, by2 = torch.where(near_b, b, 0.0).unbind(-1)
    wa, ha, wb, hb = (torch.relu(x) for x in (ax2 - ax1, ay2 - ay1, bx2 - bx1, by2 - by1))
    iw = torch.relu(torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1))
    inter = iw * torch.relu(torch.minimum(ay2, by2) - torch.maximum(ay1, by1))
    union = wa * ha + wb * hb - inter
    value = iou = torch.where(union > EMPTY, inter / torch.where(union > EMPTY, union, 1.0), 0.0)
    if kind != "iou":
        cw = torch.relu(torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1))
        ch = torch.relu(torch.maximum(ay2, by2) - torch.minimum(ay1, by1))
        hull = cw * ch
        if kind == "giou":
            value = torch.where(hull > EMPTY, iou - (hull - union) / torch.where(hull > EMPTY, hull, 1.0), iou)
        else:
            dx, dy = ((ax1 + ax2) - (bx1 + bx2)) / 2, ((ay1 + ay2) - (by1 + by2)) / 2
            value = iou - (dx**2 + dy**2) / (cw**2 + ch**2 + _EPS)
        if kind == "ciou":
            v = (4 / math.pi**2) * (_aspect(wa, ha) - _aspect(wb, hb)) ** 2
            value = value - v * v / (1 - iou + v + _EPS)
    n, m = value.shape[-2:]
    cols = torch.arange(m, device=a.device) < (m if n_b is None else n_b[..., None, None])
    rows = torch.arange(n, device=a.device)[:, None] < (n if n_a is None else n_a[..., None, None])
    value = torch.where((rows & near_a.all(-1)) & (cols & near_b.all(-1)), value, 0.0)
    if reduce is None:
        return value
    if m == 0:
        return value.sum(-1)
    top = torch.where(cols, value, -torch.inf).max(-1).values
    return torch.where(rows[..., 0] & cols.any(-1), top, 0.0)


def _aspect(w: Tensor, h: Tensor) -> Tensor:
    """atan(w / h) with gradient 0 where a side is empty."""
    real = (w > 0) & (h > 0)
    angle = torch.atan(torch.where(real, w, 1.0) / torch.where(real, h, 1.0))
    return torch.where(real, angle, torch.where(w > 0, torch.full_like(w, math.pi / 2), 0.0))
