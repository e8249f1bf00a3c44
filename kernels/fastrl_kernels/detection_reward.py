"""Scores detection answers: matches predictions to truths, then location, label, precision, recall, F1, missing.

Perception-R1 (arXiv 2504.07954, Eq. 4) matches an answer's items to the truth so that the sum of their qualities is
largest, and aggregates the matched pairs to a reward. Quality is the IoU of two boxes, or 1 - distance / scale of two
points, at least 0. Pairs of quality 0 contribute nothing and are not matched. Therefore every row of the assignment may
stay unmatched at cost 0 (the cost of a pair is minus its quality): a search may also end by leaving the row of its tree
unmatched that is cheapest to lose, and answers without any hit end after one step.

Why it is fast: one launch scores the batch, with one program per answer. Predictions are spread over the lanes with
their search state in registers; each step of a search recomputes one truth's qualities (about 20 operations per pair)
instead of reading them, so no table of qualities is written. On CPU the same algorithm runs in C++ (``csrc/``), with a
small table per thread and the batch spread over threads.

No gradient: rewards are constants of the policy step.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl_kernels import _native
from fastrl_kernels._box_overlap import load_box, load_boxes, pair_value
from fastrl_kernels._common import (
    FLOATS,
    INTEGERS,
    check,
    check_dtype,
    check_number,
    check_same_device,
    check_shape,
    floating_pair,
    join_batches,
    launch,
    readable,
    use_triton,
)
from fastrl_kernels._triton import tl, triton
from fastrl_kernels.linear_assignment import (
    IN_TREE,
    augment,
    augmenting_paths,
    clamped_count,
    lane_count,
    nearest,
    relax,
)
from fastrl_kernels.pairwise_iou import pairwise_iou_reference

MAX_ITEMS = 2048  # largest number of predictions, or of truths, of an answer on a GPU
METRICS = ("iou", "point")
MATCHINGS = ("optimal", "sequence")


class DetectionReward(NamedTuple):
    """Result of :func:`detection_reward`; float32, or float64 for float64 coordinates."""

    match: Tensor  # [B, n] int64: the truth matched to each prediction, -1: none
    quality: Tensor  # [B, n] in [0, 1], 0 where unmatched
    location: Tensor  # [B] mean quality of the matched pairs
    label: Tensor  # [B] fraction of the matched pairs with equal labels
    precision: Tensor  # [B] hits / predictions; a hit is a matched pair of at least the threshold
    recall: Tensor  # [B] hits / truths
    f1: Tensor  # [B] 2 hits / (predictions + truths)
    missing: Tensor  # [B] -(truths - hits) / truths, 0 where there are no truths


@triton.jit
def _load_items(items, index, mask, BOXES: tl.constexpr):
    """Corners of boxes, or points as (x, y, x, y), as fp32; 0 where masked."""
    if BOXES:
        x1, y1, x2, y2 = load_boxes(items, index, mask)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        at = items + tl.expand_dims(index, -1) * 2 + tl.arange(0, 2)
        x1, y1 = tl.split(tl.load(at, mask=tl.expand_dims(mask, -1), other=0.0).to(tl.float32))
        x2, y2 = x1, y1
    return x1, y1, x2, y2


@triton.jit
def _load_item(items, index, BOXES: tl.constexpr):
    """One of them, as four numbers."""
    if BOXES:
        x1, y1, x2, y2 = load_box(items, index)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        x1, y1 = tl.split(tl.load(items + index * 2 + tl.arange(0, 2)).to(tl.float32))
        x2, y2 = x1, y1
    return x1, y1, x2, y2


@triton.jit
def _quality(px1, py1, px2, py2, gx1, gy1, gx2, gy2, scale, BOXES: tl.constexpr):
    if BOXES:
        q = tl.minimum(pair_value(px1, py1, px2, py2, gx1, gy1, gx2, gy2, 0), 1.0)
    else:
        dx, dy = px1 - gx1, py1 - gy1
        distance = tl.sqrt(dx * dx + dy * dy)
        q = tl.where(distance < scale, 1.0 - distance / scale, 0.0)  # false for NaN
    return q


@triton.jit
def _fraction(part, whole, nothing):
    """part / whole; if whole is 0: 1 for an answer with neither predictions nor truths, else 0."""
    return tl.where(whole > 0, part / tl.maximum(whole, 1).to(tl.float32), nothing)


# Not specialised on the alignment of sizes: vectorised access would need a layout change through shared memory.
@triton.jit(do_not_specialize_on_alignment=["problems", "n", "m"])
def _detection_kernel(
    pred, gt,  # [B, n, 4 | 2], [B, m, 4 | 2]
    n_pred, n_gt, pred_label, gt_label,  # [B], [B], [B, n], [B, m] int64
    match, quality, parts,  # [B, n] int64, [B, n], [6, B] fp32
    problems, n, m, threshold, scale,
    HAS_LABELS: tl.constexpr, BOXES: tl.constexpr, SEQUENCE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    coords = 4 if BOXES else 2
    preds = clamped_count(n_pred, b, n, True)
    truths = clamped_count(n_gt, b, m, True)
    threshold = tl.cast(threshold, tl.float32)
    scale = tl.cast(scale, tl.float32)
    lane = tl.arange(0, LANES)
    inside = lane < preds
    truth = gt + b * m * coords
    px1, py1, px2, py2 = _load_items(pred + b * n * coords, lane, inside, BOXES)

    owner = tl.full([LANES], -1, tl.int32)
    if SEQUENCE:
        owner = tl.where(inside & (lane < truths), lane, -1)
    else:
        v = tl.zeros([LANES], tl.float32)
        for root in range(truths):
            dist = tl.full([LANES], float("inf"), tl.float32)
            before = tl.zeros([LANES], tl.int32)
            at = -1
            row = root
            low = 0.0
            leave = float("inf")  # lowest cost of giving up a row of the tree, and the column it would free
            leave_at = -1
            end = -2  # -2: searching, -1: the root stays unmatched
            while end == -2:
                gx1, gy1, gx2, gy2 = _load_item(truth, row, BOXES)
                q = _quality(px1, py1, px2, py2, gx1, gy1, gx2, gy2, scale, BOXES)
                cost = tl.where(inside, -q, float("inf"))
                dist, before, offset = relax(cost, v, dist, before, lane, at, low, row)
                if offset < leave:
                    leave = offset
                    leave_at = at
                low, code = nearest(dist, owner, before, lane)
                if low < leave:
                    at = (code >> 14) & 0x3FFF
                    row = code & 0x3FFF
                    if code < (1 << 29):
                        end = at
                    else:
                        before = tl.where(lane == at, before | IN_TREE, before)
                else:
                    low = leave
                    end = leave_at
            v = tl.where(before < 0, v + (dist - low), v)
            owner = augment(owner, before, lane, end)

    paired = owner >= 0
    gx1, gy1, gx2, gy2 = _load_items(truth, owner, paired, BOXES)
    q = _quality(px1, py1, px2, py2, gx1, gy1, gx2, gy2, scale, BOXES)
    paired = paired & (q > 0)
    q = tl.where(paired, q, 0.0)
    tl.store(match + b * n + lane, tl.where(paired, owner, -1).to(tl.int64), mask=lane < n)
    tl.store(quality + b * n + lane, q, mask=lane < n)
    same = paired
    if HAS_LABELS:
        mine = tl.load(pred_label + b * n + lane, mask=paired, other=0)
        same = paired & (mine == tl.load(gt_label + b * m + owner, mask=paired, other=0))
    matched = tl.sum(paired.to(tl.int32), 0)
    hits = tl.sum((paired & (q >= threshold)).to(tl.int32), 0)
    nothing = tl.where(preds + truths == 0, 1.0, 0.0)
    to = parts + b
    tl.store(to, _fraction(tl.sum(q, 0), matched, nothing))
    tl.store(to + problems, _fraction(tl.sum(same.to(tl.int32), 0).to(tl.float32), matched, nothing))
    tl.store(to + 2 * problems, _fraction(hits.to(tl.float32), preds, nothing))
    tl.store(to + 3 * problems, _fraction(hits.to(tl.float32), truths, nothing))
    tl.store(to + 4 * problems, _fraction(2.0 * hits.to(tl.float32), preds + truths, nothing))
    tl.store(to + 5 * problems, _fraction((hits - truths).to(tl.float32), truths, 0.0))


def _launch_warps(lanes: int) -> int:
    """One warp, and so no barrier, for up to 256 lanes; beyond that, 128 lanes per warp."""
    return 1 if lanes <= 256 else lanes // 128


def _launch(
    pred: Tensor,
    gt: Tensor,
    counts: tuple[Tensor, Tensor],
    labels: tuple[Tensor | None, Tensor | None],
    boxes: bool,
    sequence: bool,
    threshold: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (problems, n, _), m = pred.shape, gt.shape[1]
    match, quality, parts = _outputs(pred)
    lanes = lane_count(n)
    warps = _launch_warps(lanes)
    unused = counts[0]  # a valid pointer for labels that are not given
    launch(_detection_kernel, problems)(
        pred.contiguous(), gt.contiguous(), counts[0], counts[1],
        unused if labels[0] is None else labels[0], unused if labels[1] is None else labels[1],
        match, quality, parts, problems, n, m, threshold, scale,
        HAS_LABELS=labels[0] is not None, BOXES=boxes, SEQUENCE=sequence, LANES=lanes,
        num_warps=warps, num_stages=1,
        maxnreg=None if warps == 1 else 128,  # otherwise ptxas spills to fit one more program per multiprocessor
    )  # fmt: skip
    return match, quality, parts


def _outputs(pred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    problems, n, _ = pred.shape
    exact = torch.float64 if pred.dtype == torch.float64 else torch.float32
    return (
        pred.new_empty((problems, n), dtype=torch.int64),
        pred.new_empty((problems, n), dtype=exact),
        pred.new_empty((6, problems), dtype=exact),
    )


def _score(
    pred: Tensor,
    gt: Tensor,
    n_pred: Tensor,
    n_gt: Tensor,
    pred_label: Tensor | None,
    gt_label: Tensor | None,
    boxes: bool,
    sequence: bool,
    threshold: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    counts, labels, options = (n_pred, n_gt), (pred_label, gt_label), (boxes, sequence, threshold, scale)
    if pred.shape[0] == 0:
        return _outputs(pred)
    if use_triton(pred) and pred.dtype != torch.float64:
        return _launch(pred, gt, counts, labels, *options)
    if pred.device.type == "cpu" and _native.library() is not None:
        return _native.detection_reward(pred, gt, *counts, *labels, *options)
    return _eager(pred, gt, counts, labels, *options)


_op = torch.library.custom_op("fastrl::detection_reward", _score, mutates_args=())


@_op.register_fake
def _(pred: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(pred)


@_op.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    size = info.batch_size
    tensors = join_batches(size, in_dims[:6], arguments[:6])
    match, quality, parts = _op(*tensors, *arguments[6:])
    problems = match.shape[0] // size
    found = (match.unflatten(0, (size, problems)), quality.unflatten(0, (size, problems)))
    return (*found, parts.unflatten(1, (size, problems))), (0, 0, 1)


def detection_reward(
    pred: Tensor,
    gt: Tensor,
    n_pred: Tensor,
    n_gt: Tensor,
    *,
    pred_label: Tensor | None = None,
    gt_label: Tensor | None = None,
    metric: str = "iou",
    matching: str = "optimal",
    threshold: float = 0.5,
    scale: float = 1.0,
) -> DetectionReward:
    """Reward parts of a batch of answers made of boxes or points.

    Predictions are matched to truths one to one, regardless of labels, so that the summed quality is largest; pairs of
    quality 0 stay unmatched. ``location`` and ``label`` are means over the matched pairs; precision, recall, F1 and
    ``missing`` count those of quality at least ``threshold``. Without labels, all labels count as equal. With neither
    predictions nor truths the five positive parts are 1; any other empty denominator gives 0; ``missing`` is 0 without
    truths. Any coordinates are accepted: a box that is inverted, flat or not finite (or beyond 1e12) has quality 0 with
    every other, and so does a point that is not finite. Values never raise, and nothing is read back from the device.

    Among several optimal matchings, truths are processed in order, and free predictions are preferred, then the lowest
    index. Rounding may break ties between equal sums, so CPU (float64 sums) and GPU (float32) may then differ.

    Args:
        pred, gt: ``[B, n, 4]`` and ``[B, m, 4]`` corners (x1, y1, x2, y2) for ``metric="iou"``, ``[B, n, 2]`` and
            ``[B, m, 2]`` for ``"point"``, in one unit; float32, bfloat16, float16, or float64 (CPU only), one dtype, or
            whole pixels of any integer dtype.
        n_pred, n_gt: ``[B]`` int64 or int32, the number of valid items; clamped to [0, n] and [0, m].
        pred_label, gt_label: ``[B, n]`` and ``[B, m]`` int64 or int32, both or neither.
        metric: ``"iou"``, or ``"point"``: quality 1 - L2 distance / ``scale``, at least 0. For points in a frame, its
            diagonal is the natural scale (0 to 1000 in both axes: 1000 * sqrt(2)).
        matching: ``"optimal"``, or ``"sequence"``: the i-th prediction against the i-th truth.
        threshold: quality that makes a matched pair a hit; 0: every matched pair is one.
        scale: of ``"point"``, positive, in the coordinates' unit.

    Returns:
        :class:`DetectionReward`.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or option; float64 or more than 2048 items on a GPU.
    """
    pred, gt = floating_pair(pred, gt)
    boxes = _check_arguments(pred, gt, n_pred, n_gt, pred_label, gt_label, metric, matching, threshold, scale)
    pred, gt = pred.detach(), gt.detach()
    counts = n_pred.to(torch.int64).contiguous(), n_gt.to(torch.int64).contiguous()
    labels = [None if x is None else x.to(torch.int64).contiguous() for x in (pred_label, gt_label)]
    run = _score if readable(pred, gt, *counts, *labels) else _op
    options = (boxes, matching == "sequence", float(threshold), float(scale))
    match, quality, parts = run(pred, gt, counts[0], counts[1], labels[0], labels[1], *options)
    return DetectionReward(match, quality, *parts.unbind(0))


def _check_arguments(
    pred: Tensor,
    gt: Tensor,
    n_pred: Tensor,
    n_gt: Tensor,
    pred_label: Tensor | None,
    gt_label: Tensor | None,
    metric: str,
    matching: str,
    threshold: float,
    scale: float,
) -> bool:
    """Raise on the first wrong argument; returns whether the items are boxes."""
    check(metric in METRICS, f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    check(matching in MATCHINGS, f"matching: expected one of {', '.join(MATCHINGS)}, got {matching!r}")
    check_number("threshold", threshold, threshold == threshold, "a number")
    check_number("scale", scale, 0 < scale < math.inf, "a positive finite number")
    check_shape("pred", pred, (None, None, 4 if metric == "iou" else 2))
    problems, n, coords = pred.shape
    check_shape("gt", gt, (problems, None, coords))
    check_dtype("pred", pred, FLOATS)
    check_dtype("gt", gt, (pred.dtype,))
    check((pred_label is None) == (gt_label is None), "pred_label, gt_label: give both or neither")
    wanted = {
        "n_pred": (n_pred, (problems,)),
        "n_gt": (n_gt, (problems,)),
        "pred_label": (pred_label, (problems, n)),
        "gt_label": (gt_label, (problems, gt.shape[1])),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None:
            check_shape(name, tensor, shape)
            check_dtype(name, tensor, INTEGERS)
    check_same_device(pred=pred, gt=gt, n_pred=n_pred, n_gt=n_gt, pred_label=pred_label, gt_label=gt_label)
    if pred.is_cuda:
        check(pred.dtype != torch.float64, "pred: float64 is scored on CPU only; pass pred.float() or pred.cpu()")
        most = max(n, gt.shape[1])
        check(most <= MAX_ITEMS, f"pred, gt: at most {MAX_ITEMS} items per answer on a GPU, got {most}")
    return metric == "iou"


def detection_reward_reference(
    pred: Tensor,
    gt: Tensor,
    n_pred: Tensor,
    n_gt: Tensor,
    *,
    pred_label: Tensor | None = None,
    gt_label: Tensor | None = None,
    metric: str = "iou",
    matching: str = "optimal",
    threshold: float = 0.5,
    scale: float = 1.0,
) -> DetectionReward:
    """:func:`detection_reward` in plain torch."""
    pred, gt = floating_pair(pred, gt)
    boxes = _check_arguments(pred, gt, n_pred, n_gt, pred_label, gt_label, metric, matching, threshold, scale)
    labels = (pred_label, gt_label)
    match, quality, parts = _eager(pred, gt, (n_pred, n_gt), labels, boxes, matching == "sequence", threshold, scale)
    return DetectionReward(match, quality, *parts.unbind(0))


def _eager(
    pred: Tensor,
    gt: Tensor,
    counts: tuple[Tensor, Tensor],
    labels: tuple[Tensor | None, Tensor | None],
    boxes: bool,
    sequence: bool,
    threshold: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (problems, n, _), m = pred.shape, gt.shape[1]
    preds, truths = counts[0].long().clamp(0, n), counts[1].long().clamp(0, m)
    table = _quality_table(pred, gt, preds, truths, boxes, scale)  # [B, n, m]
    if sequence:
        owner = torch.arange(n, device=pred.device).expand(problems, -1)
        owner = torch.where(owner < torch.minimum(preds, truths)[:, None], owner, -1)
    else:
        outside = torch.arange(n, device=pred.device) >= preds[:, None]
        owner, _ = augmenting_paths(
            torch.where(outside[:, None, :], torch.inf, -table.mT.double()), truths, optional=True
        )
    picked = table.gather(2, owner.clamp(min=0)[:, :, None])[:, :, 0] if m else table.new_zeros((problems, n))
    quality = torch.where(owner >= 0, picked, 0.0)
    match = torch.where(quality > 0, owner, -1)
    paired = match >= 0
    same = paired
    if labels[0] is not None and labels[1] is not None and m:
        same = paired & (labels[0] == labels[1].gather(1, match.clamp(min=0)))
    matched, hits = paired.sum(1), (paired & (quality >= threshold)).sum(1)
    nothing = (preds + truths == 0).double()

    def fraction(part: Tensor, whole: Tensor, empty: Tensor | float = nothing) -> Tensor:
        return torch.where(whole > 0, part.double() / whole.clamp(min=1), empty)

    parts = (
        fraction(quality.double().sum(1), matched),
        fraction(same.sum(1), matched),
        fraction(hits, preds),
        fraction(hits, truths),
        fraction(2 * hits, preds + truths),
        fraction(hits - truths, truths, 0.0),
    )
    return match, quality, torch.stack(parts).to(quality.dtype)


def _quality_table(pred: Tensor, gt: Tensor, preds: Tensor, truths: Tensor, boxes: bool, scale: float) -> Tensor:
    """Qualities ``[B, n, m]``, 0 beyond the counts."""
    if boxes:
        return pairwise_iou_reference(pred, gt, n_a=preds, n_b=truths).clamp(max=1.0)
    exact = torch.float64 if pred.dtype == torch.float64 else torch.float32
    dx, dy = (pred.to(exact)[:, :, None] - gt.to(exact)[:, None]).unbind(-1)
    distance = (dx * dx + dy * dy).sqrt()
    rows = torch.arange(pred.shape[1], device=pred.device) < preds[:, None]
    cols = torch.arange(gt.shape[1], device=pred.device) < truths[:, None]
    near = (distance < scale) & rows[:, :, None] & cols[:, None, :]
    return torch.where(near, 1 - distance / scale, 0.0)
