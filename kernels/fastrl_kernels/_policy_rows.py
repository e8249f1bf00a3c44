"""The row terms of the clipped policy loss: one Triton kernel and one torch function, the only implementations.

``policy_loss`` calls them for all rows at once, a chunked head for the rows of each chunk. The formula and its gradient
are documented in ``policy_loss.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels import _native
from fastrl_kernels._common import launch, readable, use_triton
from fastrl_kernels._numerics import expm1_tail, sigmoid
from fastrl_kernels._policy_options import IMPORTANCE, KL_KINDS, LOSSES, PolicyOptions, PolicyTensors
from fastrl_kernels._triton import tl, triton

LOG_RATIO_LIMIT = 20.0  # the same as verl's clamp; exp(20) = 4.9e8 keeps sums finite in fp32
PARTIALS = 8  # loss, kl, low, high, ratio sums; ratio maximum; row count; unused
_BLOCK = 256  # one warp per program: the seven sums need no barrier
_SCAN = 1024
_TOTALS = 128


class PolicyRows(NamedTuple):
    """Row-local result of ``policy_row_terms``."""

    loss: Tensor  # [N], weighted
    dlogp: Tensor  # [N], d(sum of loss)/dlogp, weighted
    partials: Tensor  # [blocks, PARTIALS], for policy_totals


@triton.jit
def _surrogate(
    log_ratio, logp, advantage, low, high, dual, tau_positive, tau_negative, LOSS: tl.constexpr, DUAL: tl.constexpr
):
    """The objective of one row: loss, its slope, ratio, clipped low, clipped high. LOSS indexes LOSSES.

    The slope is in log_ratio, under cispo (LOSS 1) in logp.
    """
    # not minimum and maximum, which on a GPU return the operand that is not NaN: NaN must stay NaN
    clamped = tl.where(log_ratio < -20.0, -20.0, tl.where(log_ratio > 20.0, 20.0, log_ratio))
    ratio = tl.exp(clamped)
    clip_low = (advantage < 0) & (ratio < low)
    clip_high = (advantage > 0) & (ratio > high)
    if LOSS == 0:
        used = tl.where(clip_low, low, tl.where(clip_high, high, ratio))
        stopped = clip_low | clip_high | (clamped != log_ratio)
        if DUAL:
            beyond = (advantage < 0) & (used > dual)
            used = tl.where(beyond, dual, used)
            stopped = stopped | beyond
        loss = -advantage * used
        slope = tl.where(stopped, 0.0, -advantage * ratio)
    elif LOSS == 1:
        slope = -advantage * tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
        loss = slope * logp
    else:
        tau = tl.where(advantage > 0, tau_positive, tau_negative)
        gate = sigmoid(tau * (ratio - 1.0))
        loss = -advantage * gate * 4.0 / tau
        slope = -advantage * 4.0 * gate * sigmoid(tau * (1.0 - ratio)) * ratio
        slope = tl.where(clamped != log_ratio, 0.0, slope)
        clip_low = clip_low & False
        clip_high = clip_high & False
    return loss, slope, ratio, clip_low, clip_high


@triton.jit
def _importance(log_weight, cap, IMPORTANCE: tl.constexpr):
    """min(w, cap) (IMPORTANCE 1), or w up to cap and else 0 (2), of w = exp(log_weight); 1 for NaN (no log-prob from
    the sampler)."""
    log_weight = tl.where(log_weight == log_weight, log_weight, 0.0)
    weight = tl.exp(tl.minimum(tl.maximum(log_weight, -20.0), 20.0))
    return tl.where(weight > cap, cap if IMPORTANCE == 1 else 0.0, weight)


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
    weight_ptr,  # [n], 0: the row is skipped
    old_ptr,  # [n] or None: ratio 1
    ref_ptr,  # [n] or None: no KL
    sampler_ptr,  # [n] or None: no importance weights, or those of sequences
    sequence_ptr,  # [3, n_completions] fp32 of sequence_sums_kernel, or None: everything is per token
    numbers_ptr,  # [7] fp64 or None: replaces the following numbers if one of them is a tensor
    loss_ptr,  # [n] fp32 out
    dlogp_ptr,  # [n] fp32 out
    partials_ptr,  # [blocks, 8] fp32 out
    n,
    n_completions,
    low,
    high,
    dual,
    beta,
    cap,
    tau_positive,
    tau_negative,
    DUAL: tl.constexpr,
    KL: tl.constexpr,
    K2_GRADIENT: tl.constexpr,
    LOSS: tl.constexpr,
    SEQUENCE: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    IMPORTANCE_SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if numbers_ptr is not None:
        low, high = tl.load(numbers_ptr), tl.load(numbers_ptr + 1)
        dual, beta, cap = tl.load(numbers_ptr + 2), tl.load(numbers_ptr + 3), tl.load(numbers_ptr + 4)
        tau_positive, tau_negative = tl.load(numbers_ptr + 5), tl.load(numbers_ptr + 6)
    low, high, dual = tl.cast(low, tl.float32), tl.cast(high, tl.float32), tl.cast(dual, tl.float32)
    beta, cap = tl.cast(beta, tl.float32), tl.cast(cap, tl.float32)
    tau_positive, tau_negative = tl.cast(tau_positive, tl.float32), tl.cast(tau_negative, tl.float32)
    block = tl.program_id(0).to(tl.int64)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n
    weight = tl.load(weight_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    completion = tl.load(completion_ptr + rows, mask=inside, other=-1)
    live = inside & (weight != 0) & (completion >= 0) & (completion < n_completions)
    weight = tl.where(live, weight, 0.0)
    advantage = tl.load(advantage_ptr + completion, mask=live, other=0.0).to(tl.float32)
    logp = tl.load(logp_ptr + rows, mask=live, other=0.0).to(tl.float32)
    old = logp
    if old_ptr is not None:
        old = tl.load(old_ptr + rows, mask=live, other=0.0).to(tl.float32)
    of_sequence = 1.0
    if IMPORTANCE_SEQUENCE:
        log_weight = tl.load(sequence_ptr + 2 * n_completions + completion, mask=live, other=0.0)
        of_sequence = _importance(log_weight, cap, IMPORTANCE)
        slope_weight = weight * of_sequence
    elif IMPORTANCE > 0:
        log_weight = old - tl.load(sampler_ptr + rows, mask=live, other=0.0).to(tl.float32)
        slope_weight = weight * _importance(log_weight, cap, IMPORTANCE)
    else:
        slope_weight = weight
    loss = slope_weight
    if SEQUENCE:
        log_ratio = tl.load(sequence_ptr + completion, mask=live, other=0.0)
        if LOSS != 1:  # the gradient goes through the mean, equally to every row of the completion
            slope_weight = tl.load(sequence_ptr + n_completions + completion, mask=live, other=0.0) * of_sequence
    elif old_ptr is not None:
        log_ratio = logp - old
    else:
        log_ratio = tl.zeros([BLOCK], tl.float32)
    pg, slope, ratio, clip_low, clip_high = _surrogate(  # type: ignore
        log_ratio, logp, advantage, low, high, dual, tau_positive, tau_negative, LOSS, DUAL
    )
    loss, dlogp = loss * pg, slope_weight * slope
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
def sequence_sums_kernel(
    logp_ptr, old_ptr, sampler_ptr, completion_ptr, weight_ptr, numbers_ptr,
    sequence_ptr,  # [3, n_completions] fp32 out
    n, n_completions, cap, IMPORTANCE: tl.constexpr, IMPORTANCE_SEQUENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums over a completion that its rows need; one program per completion, over its weighted rows in any order.

    Mean log-ratio; weight (importance weights of tokens included) per row; log importance weight of the sequence.
    """
    this = tl.program_id(0)
    if numbers_ptr is not None:
        cap = tl.load(numbers_ptr + 4)
    cap = tl.cast(cap, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    count, weights, log_weight = total, total, total
    for start in range(0, n, BLOCK):
        rows = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = rows < n
        completion = tl.load(completion_ptr + rows, mask=inside, other=-1)
        weight = tl.load(weight_ptr + rows, mask=inside & (completion == this), other=0.0).to(tl.float32)
        live = weight != 0
        logp = tl.load(logp_ptr + rows, mask=live, other=0.0).to(tl.float32)
        old = logp
        if old_ptr is not None:
            old = tl.load(old_ptr + rows, mask=live, other=0.0).to(tl.float32)
        total += logp - old
        count += live.to(tl.float32)
        if IMPORTANCE > 0:
            gap = old - tl.load(sampler_ptr + rows, mask=live, other=0.0).to(tl.float32)
            if IMPORTANCE_SEQUENCE:
                log_weight += tl.where(gap == gap, gap, 0.0)
            else:
                weight = weight * _importance(gap, cap, IMPORTANCE)
        weights += weight
    rows_of_it = tl.maximum(tl.sum(count), 1.0)
    tl.store(sequence_ptr + this, tl.sum(total) / rows_of_it)
    tl.store(sequence_ptr + n_completions + this, tl.sum(weights) / rows_of_it)
    tl.store(sequence_ptr + 2 * n_completions + this, tl.sum(log_weight))


def policy_row_terms(
    logp: Tensor, tensors: PolicyTensors, options: PolicyOptions, numbers: Tensor | None = None
) -> PolicyRows:
    """The loss row by row, without autograd; used by ``policy_loss`` and by chunked heads.

    Unless an option ``needs_sums``, rows are independent, so any chunk of rows (with all of ``advantage [C]``) gives
    the same results as the whole; concatenate the chunks' ``partials`` for ``policy_totals``. Otherwise all rows of a
    completion must be in one call. ``numbers``: from ``options.split``. Arguments are not checked. Results are fp32
    (float64 for float64 ``logp``).
    """
    if not use_triton(logp) or logp.dtype == torch.float64:
        advantage, _, *others = tensors
        if _native.computes("fastrl_policy_rows", logp, advantage, *others):
            return _rows_native(logp, tensors, options, numbers)
        return rows_eager(logp, tensors, options, numbers)
    n, c = logp.shape[0], tensors.advantage.shape[0]
    logp, tensors = logp.contiguous(), tensors.rows(Tensor.contiguous)
    advantage, completion, weight, old, ref, sampler = tensors
    blocks = -(-n // _BLOCK)
    loss, dlogp = (torch.empty(n, dtype=torch.float32, device=logp.device) for _ in range(2))
    partials = torch.empty(blocks, PARTIALS, dtype=torch.float32, device=logp.device)
    if n == 0:
        return PolicyRows(loss, dlogp, partials)
    low, high, dual, beta, cap, *tau = options.bounds(numbers) if numbers is None else [0.0] * 7
    importance = IMPORTANCE.index(options.importance)
    whole = importance > 0 and options.importance_level == "sequence"
    sequence = None
    if options.needs_sums:
        sequence = _sequence_sums(logp, tensors, numbers, cap, importance, whole)
    launch(policy_rows_kernel, blocks)(
        logp, advantage.contiguous(), completion, weight, old, ref, sampler, sequence, numbers,
        loss, dlogp, partials, n, c, low, high, dual, beta, cap, *tau,
        DUAL=options.dual_clip is not None, KL=KL_KINDS.index(options.kl) + 1,
        K2_GRADIENT=options.kl_gradient == "k2", LOSS=LOSSES.index(options.loss),
        SEQUENCE=options.ratio == "sequence", IMPORTANCE=importance, IMPORTANCE_SEQUENCE=whole,
        BLOCK=_BLOCK, num_warps=1,
    )  # fmt: skip
    return PolicyRows(loss, dlogp, partials)


def _rows_native(logp: Tensor, tensors: PolicyTensors, options: PolicyOptions, numbers: Tensor | None) -> PolicyRows:
    importance = IMPORTANCE.index(options.importance)
    choices = (
        LOSSES.index(options.loss),
        KL_KINDS.index(options.kl) + 1,
        options.kl_gradient == "k2",
        numbers is not None or bool(options.beta != 0),
        options.dual_clip is not None,
        options.ratio == "sequence",
        importance,
        importance > 0 and options.importance_level == "sequence",
    )
    bounds = options.bounds(None) if numbers is None else numbers
    return PolicyRows(*_native.policy_rows((logp, *tensors), bounds, choices))


def _sequence_sums(
    logp: Tensor, tensors: PolicyTensors, numbers: Tensor | None, cap: float, importance: int, whole: bool
) -> Tensor:
    """[3, C]: see ``sequence_sums_kernel``."""
    c = tensors.advantage.shape[0]
    sums = torch.empty(3, c, dtype=torch.float32, device=logp.device)
    if c:
        launch(sequence_sums_kernel, c)(
            logp, tensors.old_logp, tensors.sampler_logp, tensors.completion, tensors.weight, numbers, sums,
            logp.shape[0], c, cap, IMPORTANCE=importance, IMPORTANCE_SEQUENCE=whole, BLOCK=_SCAN,
        )  # fmt: skip
    return sums


def sequence_importance(old: Tensor, sampler: Tensor, completion: Tensor, weight: Tensor, completions: int) -> Tensor:
    """[N]: the log importance weight of each row's sequence, over its rows of non-zero weight, in a fixed order."""
    index = completion.clamp(0, max(completions - 1, 0)).long()
    if use_triton(old) and weight.dtype != torch.float64 and completions:
        vectors = (old, completion, weight, sampler)
        old, completion, weight, sampler = (t.contiguous() for t in vectors)
        tensors = PolicyTensors(weight.new_empty(completions), completion, weight, old, None, sampler)
        return _sequence_sums(old, tensors, None, 1.0, 1, True)[2][index]
    log_weight = torch.where((weight != 0) & ~sampler.isnan(), old.double() - sampler.double(), 0.0)
    return log_weight.new_zeros(max(completions, 1)).index_add_(0, index, log_weight)[index].to(weight.dtype)


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
    if partials.shape[0] == 1 and partials.dtype == torch.float32 and readable(partials):
        loss, kl, low, high, ratio, largest, count, _ = partials[0].tolist()
        rows = max(count, 1.0)  # quotients of two floats, rounded once
        return torch.tensor(loss), torch.tensor([kl / rows, low / rows, high / rows, ratio / rows, largest])
    sums = partials.sum(0)
    largest = partials[:, 5].max() if partials.shape[0] else partials.new_zeros(())
    return sums[0].clone(), torch.cat([sums[1:5] / sums[6].clamp(min=1), largest.view(1)])


def rows_eager(logp: Tensor, tensors: PolicyTensors, options: PolicyOptions, numbers: Tensor | None) -> PolicyRows:
    """The torch implementation: always computes in float64; returns float64 for float64 ``logp``, else fp32."""
    advantage, completion, weight, old_logp, ref_logp, sampler_logp = tensors
    low, high, dual, beta, cap, tau_positive, tau_negative = options.bounds(numbers)
    out = torch.float64 if logp.dtype == torch.float64 else torch.float32
    c = advantage.shape[0]
    live = (weight != 0) & (completion >= 0) & (completion < c)
    w = torch.where(live, weight.double(), 0.0)
    index = torch.where(live, completion, 0).long()
    a = torch.where(live, advantage.double()[index] if c else w, 0.0)
    p = torch.where(live, logp.double(), 0.0)
    old = p if old_logp is None else torch.where(live, old_logp.double(), 0.0)
    log_ratio = torch.zeros_like(p) if old_logp is None else p - old
    empty = torch.zeros(max(c, 1), dtype=p.dtype, device=p.device)
    own = w  # weight of the row's objective; that of its KL stays w
    if sampler_logp is not None:
        log_weight = torch.where(live & ~sampler_logp.isnan(), old - sampler_logp.double(), 0.0)
        if options.importance_level == "sequence":
            log_weight = empty.index_add(0, index, log_weight)[index]
        factor = log_weight.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        own = w * torch.where(factor > cap, cap if options.importance == "truncate" else 0.0, factor)
    slope_weight = own
    if options.ratio == "sequence":
        count = empty.index_add(0, index, live.to(p.dtype)).clamp(min=1)
        log_ratio = torch.where(live, (empty.index_add(0, index, log_ratio) / count)[index], 0.0)
        if options.loss != "cispo":
            slope_weight = torch.where(live, (empty.index_add(0, index, own) / count)[index], 0.0)
    clamped = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    r = clamped.exp()
    clip_low, clip_high = (a < 0) & (r < low), (a > 0) & (r > high)
    stopped = clamped != log_ratio
    if options.loss == "cispo":
        slope = -a * torch.where(r < low, low, torch.where(r > high, high, r))
        value = slope * p
    elif options.loss == "sapo":
        tau = torch.where(
            a > 0, *(torch.as_tensor(x, dtype=a.dtype, device=a.device) for x in (tau_positive, tau_negative))
        )
        gate = torch.sigmoid(tau * (r - 1))
        value, slope = -a * gate * 4 / tau, -a * 4 * gate * torch.sigmoid(tau * (1 - r)) * r
        slope, clip_low, clip_high = torch.where(stopped, 0.0, slope), clip_low & False, clip_high & False
    else:
        used, stopped = torch.where(clip_low, low, torch.where(clip_high, high, r)), stopped | clip_low | clip_high
        if options.dual_clip is not None:
            beyond = (a < 0) & (used > dual)
            used, stopped = torch.where(beyond, dual, used), stopped | beyond
        value, slope = -a * used, torch.where(stopped, 0.0, -a * r)
    loss, dlogp = own * value, slope_weight * slope
    kl = torch.zeros_like(p)
    if ref_logp is not None:
        kl, kl_slope = _kl_eager(torch.where(live, ref_logp.double(), 0.0) - p, options.kl, options.kl_gradient)
        if numbers is not None or beta != 0:  # an infinite KL must not turn an unpenalised loss into NaN
            loss, dlogp = loss + w * beta * kl, dlogp + w * beta * kl_slope
    columns = [loss, kl, live & clip_low, live & clip_high, torch.where(live, r, 0.0), live]
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
