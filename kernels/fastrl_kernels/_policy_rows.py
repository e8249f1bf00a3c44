"""The rows of the clipped policy loss: one Triton device function and one torch function, used wherever it is computed.

``policy_loss`` calls them over all rows at once, a chunked head over the rows of a chunk. The formula and its gradient
are written in ``policy_loss.py``; this file is where they are computed, once per backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels._common import AotCase, launch, use_triton
from fastrl_kernels._numerics import expm1_tail
from fastrl_kernels._triton import tl, triton

LOG_RATIO_LIMIT = 20.0  # verl clamps here too; exp(20) = 4.9e8 keeps sums finite in fp32
PARTIALS = 8  # loss, kl, low, high, ratio sums; ratio maximum; row count; unused
KL_KINDS = ("k1", "k2", "k3")
_BLOCK = 256  # one warp per program: the seven sums need no barrier
_SCAN = 1024
_TOTALS = 128


class PolicyRows(NamedTuple):
    """Row-local result of ``policy_row_terms``."""

    loss: Tensor  # [N], weighted
    dlogp: Tensor  # [N], d(sum of loss)/dlogp, weighted
    partials: Tensor  # [blocks, PARTIALS], for policy_totals


class RowOptions(NamedTuple):
    """The clip range as bounds of the ratio, and the rest as in ``policy_loss``."""

    low: float
    high: float
    dual_clip: float | None
    beta: float
    kl: str
    kl_gradient: str
    ratio: str


@triton.jit
def _surrogate(log_ratio, advantage, low, high, dual, DUAL: tl.constexpr):
    """The clipped objective of one row: loss, d loss / d log_ratio, ratio, clipped low, clipped high."""
    # not minimum and maximum, which on a GPU give the operand that is not NaN: NaN stays NaN
    clamped = tl.where(log_ratio < -20.0, -20.0, tl.where(log_ratio > 20.0, 20.0, log_ratio))
    ratio = tl.exp(clamped)
    clip_low = (advantage < 0) & (ratio < low)
    clip_high = (advantage > 0) & (ratio > high)
    used = tl.where(clip_low, low, tl.where(clip_high, high, ratio))
    stopped = clip_low | clip_high | (clamped != log_ratio)
    if DUAL:
        beyond = (advantage < 0) & (used > dual)
        used = tl.where(beyond, dual, used)
        stopped = stopped | beyond
    return -advantage * used, tl.where(stopped, 0.0, -advantage * ratio), ratio, clip_low, clip_high


@triton.jit
def _kl_terms(logp, ref, KL: tl.constexpr, K2_GRADIENT: tl.constexpr):
    """KL(policy || reference) estimate of one row and its slope in logp. KL: 1, 2, 3."""
    x = ref - logp
    if KL == 1:
        value = -x
        slope = tl.full(x.shape, 1.0, tl.float32)
    elif KL == 2:
        value = 0.5 * x * x
        slope = -x
    else:
        capped = tl.where(x > 20.0, 20.0, x)
        near = tl.abs(capped) <= 0.7
        small = tl.where(near, capped, 0.0)
        tail = tl.where(near, expm1_tail(small), tl.exp(capped) - 1.0 - capped)
        slope = -(tail + capped)
        value = tail - slope * (x - capped)
    if K2_GRADIENT:
        slope = -x
    return value, slope


@triton.jit
def policy_rows_kernel(
    logp_ptr,  # [n]
    advantage_ptr,  # [n_completions]
    completion_ptr,  # [n]
    weight_ptr,  # [n], 0: the row is not looked at
    old_ptr,  # [n] or None: ratio 1
    ref_ptr,  # [n] or None: no KL
    sequence_ptr,  # [2, n_completions] fp32 (mean log-ratio, weight per token) or None: token ratio
    loss_ptr,  # [n] fp32 out
    dlogp_ptr,  # [n] fp32 out
    partials_ptr,  # [blocks, 8] fp32 out
    n,
    n_completions,
    low,
    high,
    dual,
    beta,
    DUAL: tl.constexpr,
    KL: tl.constexpr,
    K2_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    low, high, dual = tl.cast(low, tl.float32), tl.cast(high, tl.float32), tl.cast(dual, tl.float32)
    beta = tl.cast(beta, tl.float32)
    block = tl.program_id(0).to(tl.int64)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n
    weight = tl.load(weight_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    completion = tl.load(completion_ptr + rows, mask=inside, other=-1)
    live = inside & (weight != 0) & (completion >= 0) & (completion < n_completions)
    weight = tl.where(live, weight, 0.0)
    advantage = tl.load(advantage_ptr + completion, mask=live, other=0.0).to(tl.float32)
    logp = tl.load(logp_ptr + rows, mask=live, other=0.0).to(tl.float32)
    if sequence_ptr is not None:
        log_ratio = tl.load(sequence_ptr + completion, mask=live, other=0.0)
        share = tl.load(sequence_ptr + n_completions + completion, mask=live, other=0.0)
    else:
        share = weight
        if old_ptr is not None:
            log_ratio = logp - tl.load(old_ptr + rows, mask=live, other=0.0).to(tl.float32)
        else:
            log_ratio = tl.zeros([BLOCK], tl.float32)
    pg, slope, ratio, clip_low, clip_high = _surrogate(log_ratio, advantage, low, high, dual, DUAL)  # type: ignore
    loss, dlogp = weight * pg, share * slope
    kl = tl.zeros([BLOCK], tl.float32)
    if ref_ptr is not None:
        ref = tl.load(ref_ptr + rows, mask=live, other=0.0).to(tl.float32)
        kl, kl_slope = _kl_terms(logp, ref, KL, K2_GRADIENT)  # type: ignore
        if beta != 0.0:  # an infinite KL must not turn an unpenalised loss into NaN
            loss += weight * (beta * kl)
            dlogp += weight * (beta * kl_slope)
    loss, dlogp = tl.where(live, loss, 0.0), tl.where(live, dlogp, 0.0)
    tl.store(loss_ptr + rows, loss, mask=inside)
    tl.store(dlogp_ptr + rows, dlogp, mask=inside)
    out = partials_ptr + block * 8
    tl.store(out, tl.sum(loss))
    tl.store(out + 1, tl.sum(tl.where(live, kl, 0.0)))
    tl.store(out + 2, tl.sum((live & clip_low).to(tl.float32)))
    tl.store(out + 3, tl.sum((live & clip_high).to(tl.float32)))
    tl.store(out + 4, tl.sum(tl.where(live, ratio, 0.0)))
    tl.store(out + 5, tl.max(tl.where(live, ratio, 0.0)))
    tl.store(out + 6, tl.sum(live.to(tl.float32)))
    tl.store(out + 7, 0.0)


@triton.jit
def policy_totals_kernel(partials_ptr, loss_ptr, metrics_ptr, n_blocks, BLOCK: tl.constexpr):
    """One program adds the partials in a fixed order: loss [], metrics [5]."""
    loss = tl.zeros([BLOCK], tl.float32)
    kl, low, high, ratio, largest, count = loss, loss, loss, loss, loss, loss
    for start in range(0, n_blocks, BLOCK):
        blocks = start + tl.arange(0, BLOCK)
        inside = blocks < n_blocks
        row = partials_ptr + blocks.to(tl.int64) * 8
        loss += tl.load(row, mask=inside, other=0.0)
        kl += tl.load(row + 1, mask=inside, other=0.0)
        low += tl.load(row + 2, mask=inside, other=0.0)
        high += tl.load(row + 3, mask=inside, other=0.0)
        ratio += tl.load(row + 4, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.load(row + 5, mask=inside, other=0.0))
        count += tl.load(row + 6, mask=inside, other=0.0)
    rows = tl.maximum(tl.sum(count), 1.0)
    tl.store(loss_ptr, tl.sum(loss))
    tl.store(metrics_ptr, tl.sum(kl) / rows)
    tl.store(metrics_ptr + 1, tl.sum(low) / rows)
    tl.store(metrics_ptr + 2, tl.sum(high) / rows)
    tl.store(metrics_ptr + 3, tl.sum(ratio) / rows)
    tl.store(metrics_ptr + 4, tl.max(largest))


@triton.jit
def sequence_ratio_kernel(
    logp_ptr, old_ptr, completion_ptr, weight_ptr, sequence_ptr, n, n_completions, BLOCK: tl.constexpr
):
    """One program per completion, rows in any order: mean log-ratio over its weighted rows, and its weight per row."""
    this = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    count, weights = total, total
    for start in range(0, n, BLOCK):
        rows = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = rows < n
        completion = tl.load(completion_ptr + rows, mask=inside, other=-1)
        weight = tl.load(weight_ptr + rows, mask=inside & (completion == this), other=0.0).to(tl.float32)
        live = weight != 0
        logp = tl.load(logp_ptr + rows, mask=live, other=0.0).to(tl.float32)
        total += logp - tl.load(old_ptr + rows, mask=live, other=0.0).to(tl.float32)
        count += live.to(tl.float32)
        weights += weight
    rows_of_it = tl.maximum(tl.sum(count), 1.0)
    tl.store(sequence_ptr + this, tl.sum(total) / rows_of_it)
    tl.store(sequence_ptr + n_completions + this, tl.sum(weights) / rows_of_it)


def policy_row_terms(
    logp: Tensor,
    advantage: Tensor,
    completion: Tensor,
    weight: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    kl_gradient: str = "value",
    ratio: str = "token",
) -> PolicyRows:
    """The loss's mathematics, row by row, without autograd: what ``policy_loss`` and chunked heads both call.

    Shapes as ``policy_loss``; ``weight [N]`` is required. With ``ratio="token"`` rows are independent, so any chunk of
    rows (with all of ``advantage [C]``) gives the same rows as the whole; concatenate the chunks' ``partials`` for
    ``policy_totals``. ``ratio="sequence"`` needs all rows of its completions in one call. Arguments are not checked.
    Results are fp32 (float64 for float64 ``logp``).
    """
    if ratio == "sequence" and old_logp is None:
        old_logp = logp
    low, high = 1.0 - clip_low, 1.0 + clip_high
    if not use_triton(logp) or logp.dtype == torch.float64:
        options = RowOptions(low, high, dual_clip, beta, kl, kl_gradient, ratio)
        return rows_eager(logp, advantage, completion, weight, old_logp, ref_logp, options)
    n, c = logp.shape[0], advantage.shape[0]
    logp, advantage, completion, weight = (t.contiguous() for t in (logp, advantage, completion, weight))
    old = None if old_logp is None else old_logp.contiguous()
    ref = None if ref_logp is None else ref_logp.contiguous()
    blocks = -(-n // _BLOCK)
    loss, dlogp = (torch.empty(n, dtype=torch.float32, device=logp.device) for _ in range(2))
    partials = torch.empty(blocks, PARTIALS, dtype=torch.float32, device=logp.device)
    if n == 0:
        return PolicyRows(loss, dlogp, partials)
    sequence = None
    if ratio == "sequence":
        sequence = torch.empty(2, c, dtype=torch.float32, device=logp.device)
        if c:
            launch(sequence_ratio_kernel, c)(logp, old, completion, weight, sequence, n, c, BLOCK=_SCAN)
    launch(policy_rows_kernel, blocks)(
        logp, advantage, completion, weight, None if sequence is not None else old, ref, sequence,
        loss, dlogp, partials, n, c, low, high, 0.0 if dual_clip is None else dual_clip, beta,
        DUAL=dual_clip is not None, KL=KL_KINDS.index(kl) + 1, K2_GRADIENT=kl_gradient == "k2",
        BLOCK=_BLOCK, num_warps=1,
    )  # fmt: skip
    return PolicyRows(loss, dlogp, partials)


def policy_totals(partials: Tensor) -> tuple[Tensor, Tensor]:
    """Partial sums ``[P, PARTIALS]`` of any number of ``policy_row_terms`` calls -> loss ``[]``, metrics ``[5]``.

    Metrics in the order of ``PolicyLoss`` after ``loss``. Added in a fixed order, no host read. ``P = 0`` gives zeros.
    """
    if use_triton(partials) and partials.dtype == torch.float32:
        loss = torch.empty((), dtype=torch.float32, device=partials.device)
        metrics = torch.empty(5, dtype=torch.float32, device=partials.device)
        launch(policy_totals_kernel, 1)(
            partials.contiguous(), loss, metrics, partials.shape[0], BLOCK=_TOTALS, num_warps=1
        )
        return loss, metrics
    sums = partials.sum(0)
    largest = partials[:, 5].max() if partials.shape[0] else partials.new_zeros(())
    return sums[0].clone(), torch.cat([sums[1:5] / sums[6].clamp(min=1), largest.view(1)])


def aot_cases() -> list[AotCase]:
    """Token and sequence ratio with every vector present, the on-policy case with none, and the two reductions."""
    rows = dict.fromkeys(("logp_ptr", "advantage_ptr", "weight_ptr", "old_ptr", "ref_ptr"), "*fp32")
    rows |= dict.fromkeys(("sequence_ptr", "loss_ptr", "dlogp_ptr", "partials_ptr"), "*fp32")
    rows |= {"completion_ptr": "*i64", "n": "i32", "n_completions": "i32"}
    rows |= dict.fromkeys(("low", "high", "dual", "beta"), "fp32")
    cases = []
    for name, absent, dual, kl in (
        ("token", ("sequence_ptr",), True, 3),
        ("sequence", ("old_ptr",), False, 3),
        ("on_policy", ("old_ptr", "ref_ptr", "sequence_ptr"), False, 3),
        ("k2", ("sequence_ptr",), False, 2),
    ):
        fixed = {"DUAL": dual, "KL": kl, "K2_GRADIENT": False, "BLOCK": _BLOCK} | dict.fromkeys(absent)
        given = {key: kind for key, kind in rows.items() if key not in absent}
        cases.append(
            AotCase(
                f"policy_rows_kernel/{name}",
                policy_rows_kernel,
                given,
                fixed,
                num_warps=1,
                max_shared=0,
                max_barriers=0,
            )
        )
    totals = {"partials_ptr": "*fp32", "loss_ptr": "*fp32", "metrics_ptr": "*fp32", "n_blocks": "i32"}
    cases.append(AotCase("policy_totals_kernel", policy_totals_kernel, totals, {"BLOCK": _TOTALS}, num_warps=1))
    scan = {key: rows[key] for key in ("logp_ptr", "old_ptr", "completion_ptr", "weight_ptr", "sequence_ptr", "n")}
    scan["n_completions"] = "i32"
    cases.append(AotCase("sequence_ratio_kernel", sequence_ratio_kernel, scan, {"BLOCK": _SCAN}))
    return cases


def rows_eager(
    logp: Tensor,
    advantage: Tensor,
    completion: Tensor,
    weight: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    options: RowOptions,
) -> PolicyRows:
    """The torch form of the rows: float64 inside, whatever comes in; float64 out for float64 ``logp``, else fp32."""
    low, high, dual_clip, beta, kl, kl_gradient, ratio = options
    out = torch.float64 if logp.dtype == torch.float64 else torch.float32
    c = advantage.shape[0]
    live = (weight != 0) & (completion >= 0) & (completion < c)
    w = torch.where(live, weight.double(), 0.0)
    index = torch.where(live, completion, 0).long()
    a = torch.where(live, advantage.double()[index] if c else w, 0.0)
    p = torch.where(live, logp.double(), 0.0)
    share = w
    log_ratio = torch.zeros_like(p) if old_logp is None else p - torch.where(live, old_logp.double(), 0.0)
    if ratio == "sequence":
        count = (
            torch.zeros(max(c, 1), dtype=p.dtype, device=p.device).index_add_(0, index, live.to(p.dtype)).clamp(min=1)
        )
        log_ratio = (torch.zeros_like(count).index_add_(0, index, log_ratio) / count)[index]
        share = (torch.zeros_like(count).index_add_(0, index, w) / count)[index]
        log_ratio, share = torch.where(live, log_ratio, 0.0), torch.where(live, share, 0.0)
    clamped = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    r = clamped.exp()
    clip_low, clip_high = (a < 0) & (r < low), (a > 0) & (r > high)
    used = torch.where(clip_low, low, torch.where(clip_high, high, r))
    stopped = clip_low | clip_high | (clamped != log_ratio)
    if dual_clip is not None:
        beyond = (a < 0) & (used > dual_clip)
        used, stopped = torch.where(beyond, dual_clip, used), stopped | beyond
    loss, dlogp = -w * a * used, torch.where(stopped, 0.0, -share * a * r)
    value = torch.zeros_like(p)
    if ref_logp is not None:
        value, slope = _kl_eager(torch.where(live, ref_logp.double(), 0.0) - p, kl, kl_gradient)
        if beta != 0:
            loss, dlogp = loss + w * beta * value, dlogp + w * beta * slope
    columns = [loss, value, live & clip_low, live & clip_high, torch.where(live, r, 0.0), live]
    sums = [column.sum(dtype=p.dtype) for column in columns]
    largest = torch.where(live, r, 0.0).max() if r.numel() else sums[0]
    partials = torch.stack([*sums[:5], largest, sums[5], torch.zeros_like(largest)]).view(1, PARTIALS)
    return PolicyRows(loss.to(out), dlogp.to(out), partials.to(out))


def _kl_eager(x: Tensor, kl: str, kl_gradient: str) -> tuple[Tensor, Tensor]:
    """Value and slope in logp of the estimator at ``x = ref - logp``."""
    if kl == "k1":
        value, slope = -x, torch.ones_like(x)
    elif kl == "k2":
        value, slope = 0.5 * x * x, -x
    else:
        capped = x.clamp(max=LOG_RATIO_LIMIT)
        growth = torch.expm1(capped)
        value, slope = growth - capped + growth * (x - capped), -growth
    return value, (-x if kl_gradient == "k2" else slope)
