"""Clipped policy-gradient loss over packed tokens: GRPO, Dr. GRPO, DAPO, GSPO, RLOO and their KL penalties.

With ``d = clamp(logp - old, -20, 20)``, ``r = exp(d)``, advantage ``A`` of the row's completion and weight ``w``:

    loss = sum_i w_i [ -min(r_i A_i, clip(r_i, 1 - clip_low, 1 + clip_high) A_i)  +  beta KL_i ]

(PPO eq. 7; GRPO, arXiv 2402.03300 eq. 3; dual clip, arXiv 1912.09729 eq. 5; GSPO, arXiv 2507.18071 eq. 5-7.)
Gradient, row by row: the ratio term gives ``-A r`` where the minimum is the unclipped branch and exactly 0 where the
ratio left the clip range on the side that ``A`` rewards (``A > 0, r > 1 + clip_high`` or ``A < 0, r < 1 - clip_low``),
where ``A < 0, r > dual_clip``, and where ``d`` was clamped. On a boundary itself the gradient flows, as torch's
``clamp`` and ``min`` have it together. KL, with ``x = ref - logp``: k1 ``-x`` (slope 1), k2 ``x^2 / 2`` (slope ``-x``),
k3 ``exp(x) - x - 1`` (slope ``1 - exp(x)``; above ``x = 20`` it goes on along its tangent, so the slope stays finite
and keeps pointing at the reference). A clipped row keeps its KL gradient.

Why it is fast: under 1 MB of data, so launches are the cost. One launch reads every vector once and writes
``dloss/dlogp`` and one row of partial sums per block; a second, of one program, adds the partials in a fixed order. No
atomics, no host read, the same bits twice. The backward is one multiplication. GSPO adds one launch before, a program
per completion.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl_kernels._common import check, check_dtype, check_number, check_same_device, check_shape
from fastrl_kernels._policy_rows import (
    KL_KINDS,
    PARTIALS,
    PolicyRows,
    RowOptions,
    policy_row_terms,
    policy_totals,
    rows_eager,
)
from fastrl_kernels.token_weights import check_ids, token_weights

__all__ = [
    "PARTIALS",
    "PolicyLoss",
    "PolicyRows",
    "policy_loss",
    "policy_loss_reference",
    "policy_row_terms",
    "policy_totals",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class PolicyLoss(NamedTuple):
    """Result of ``policy_loss``, 0-d tensors. Only ``loss`` has a gradient; means are over rows of non-zero weight."""

    loss: Tensor
    kl: Tensor  # mean of the chosen estimator; 0 without ref_logp
    clip_low_fraction: Tensor  # A < 0 and ratio < 1 - clip_low
    clip_high_fraction: Tensor  # A > 0 and ratio > 1 + clip_high
    ratio_mean: Tensor
    ratio_max: Tensor


@torch.library.custom_op("fastrl::policy_loss", mutates_args=())
def _policy_loss_op(
    logp: Tensor,
    advantage: Tensor,
    completion: Tensor,
    weight: Tensor,
    old_logp: Optional[Tensor],  # noqa: UP045 (the schema parser of older torch wants typing.Optional)
    ref_logp: Optional[Tensor],  # noqa: UP045
    clip_low: float,
    clip_high: float,
    dual_clip: Optional[float],  # noqa: UP045
    beta: float,
    kl: str,
    kl_gradient: str,
    ratio: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = policy_row_terms(
        logp, advantage, completion, weight, old_logp=old_logp, ref_logp=ref_logp, clip_low=clip_low,
        clip_high=clip_high, dual_clip=dual_clip, beta=beta, kl=kl, kl_gradient=kl_gradient, ratio=ratio,
    )  # fmt: skip
    return (*policy_totals(rows.partials), rows.dlogp)


@_policy_loss_op.register_fake
def _(logp, advantage, completion, weight, old_logp, ref_logp, *options):
    dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
    return logp.new_empty((), dtype=dtype), logp.new_empty(5, dtype=dtype), logp.new_empty(logp.shape, dtype=dtype)


def _setup(ctx, inputs, output) -> None:
    _, metrics, dlogp = output
    ctx.mark_non_differentiable(metrics, dlogp)
    ctx.save_for_backward(dlogp)
    ctx.logp_dtype = inputs[0].dtype


@once_differentiable
def _backward(ctx, grad_loss, grad_metrics, grad_dlogp):
    (dlogp,) = ctx.saved_tensors
    return ((dlogp * grad_loss).to(ctx.logp_dtype), *[None] * 12)


_policy_loss_op.register_autograd(_backward, setup_context=_setup)


def policy_loss(
    logp: Tensor,
    advantage: Tensor,
    completion: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    weight: Tensor | None = None,
    aggregate: str = "token",
    normalizer: float | Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    kl_gradient: str = "value",
    ratio: str = "token",
) -> PolicyLoss:
    """Clipped policy-gradient loss with optional KL penalty; formula and gradient at the top of this file.

    Args:
        logp: ``[N]`` log-probs of the taken tokens (fp32, bf16, fp16; float64 runs eagerly). First derivatives only.
        advantage: ``[C]``, one per completion. Constant, as are all tensors below.
        completion: ``[N]`` int64 or int32, the completion of each row, any order. Negative: padding. ``>= C``: an error
            on CPU, padding on GPU (no host read).
        old_logp: ``[N]`` of the policy that sampled. None: strictly on-policy, ratio 1, gradient ``-A w``.
        ref_logp: ``[N]`` of the reference policy; needed if ``beta != 0``. With ``beta = 0``, KL is only measured.
        weight: ``[N]``, loss = sum of weight x row loss. Rows of weight 0 are never evaluated and may hold NaN.
            Default: ``token_weights(completion, aggregate=aggregate, normalizer=normalizer)``.
        clip_low, clip_high: the clip range is ``[1 - clip_low, 1 + clip_high]``.
        dual_clip: upper limit (> 1) of the ratio where the advantage is negative.
        kl: estimator ``"k1"``, ``"k2"`` or ``"k3"``.
        kl_gradient: ``"value"`` differentiates the estimator, ``"k2"`` takes k2's slope whatever the value.
        ratio: ``"token"``, or ``"sequence"`` (GSPO): every token of a completion carries the exponential of the mean
            log-ratio of its rows of non-zero weight, and the gradient goes through that mean.

    Returns:
        ``PolicyLoss``, fp32 (float64 in, float64 out). No live row: all zeros. A NaN in a live row gives a NaN loss,
        where the loss depends on it (without ``old_logp`` and ``beta`` it does not depend on ``logp``).

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or option, before any launch.
    """
    _check_tensors(logp, advantage, completion, old_logp, ref_logp, weight)
    _check_options(clip_low, clip_high, dual_clip, beta, kl, kl_gradient, ratio, ref_logp)
    weight = _weight(logp, advantage, completion, weight, aggregate, normalizer)
    loss, metrics, _ = _policy_loss_op(
        logp, advantage, completion, weight, old_logp, ref_logp, float(clip_low), float(clip_high),
        None if dual_clip is None else float(dual_clip), float(beta), kl, kl_gradient, ratio,
    )  # fmt: skip
    return PolicyLoss(loss, *metrics.unbind())


def policy_loss_reference(
    logp: Tensor,
    advantage: Tensor,
    completion: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    weight: Tensor | None = None,
    aggregate: str = "token",
    normalizer: float | Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    kl_gradient: str = "value",
    ratio: str = "token",
) -> PolicyLoss:
    """``policy_loss`` in plain torch on any device: float64 inside, float64 out for float64 in. Same arguments."""
    _check_tensors(logp, advantage, completion, old_logp, ref_logp, weight)
    _check_options(clip_low, clip_high, dual_clip, beta, kl, kl_gradient, ratio, ref_logp)
    weight = _weight(logp, advantage, completion, weight, aggregate, normalizer)
    fixed = logp.detach()
    old_logp = fixed if ratio == "sequence" and old_logp is None else old_logp
    options = RowOptions(1.0 - clip_low, 1.0 + clip_high, dual_clip, beta, kl, kl_gradient, ratio)
    rows = rows_eager(fixed, advantage, completion, weight, old_logp, ref_logp, options)
    loss, metrics = policy_totals(rows.partials)
    # The value from the rows, the gradient from dlogp: a linear term that is 0 at this point.
    step = torch.where(rows.dlogp != 0, logp - fixed, 0.0).to(rows.dlogp.dtype)
    return PolicyLoss(loss + (rows.dlogp * step).sum(), *metrics.unbind())


def _weight(
    logp: Tensor,
    advantage: Tensor,
    completion: Tensor,
    weight: Tensor | None,
    aggregate: str,
    normalizer: float | Tensor | None,
) -> Tensor:
    if weight is not None:
        check(normalizer is None, "normalizer: only without weight (a given weight is already normalised)")
        return weight
    dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
    return token_weights(
        completion, aggregate=aggregate, normalizer=normalizer, n_completions=advantage.shape[0], dtype=dtype
    )


def _check_tensors(
    logp: Tensor,
    advantage: Tensor,
    completion: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    weight: Tensor | None,
) -> None:
    check_shape("logp", logp, (None,))
    check_shape("advantage", advantage, (None,))
    per_row = {"completion": completion, "old_logp": old_logp, "ref_logp": ref_logp, "weight": weight}
    for name, tensor in per_row.items():
        if tensor is not None:
            check_shape(name, tensor, (logp.shape[0],))
    floats = {"logp": logp, "advantage": advantage, "old_logp": old_logp, "ref_logp": ref_logp, "weight": weight}
    for name, tensor in floats.items():
        if tensor is not None:
            check_dtype(name, tensor, FLOATS)
    check_dtype("completion", completion, (torch.int64, torch.int32))
    check_same_device(**floats, completion=completion)
    check_ids("completion", completion, advantage.shape[0])


def _check_options(
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    beta: float,
    kl: str,
    kl_gradient: str,
    ratio: str,
    ref_logp: Tensor | None,
) -> None:
    check_number("clip_low", clip_low, clip_low >= 0, ">= 0")
    check_number("clip_high", clip_high, clip_high >= 0, ">= 0")
    check_number("dual_clip", dual_clip, dual_clip is None or dual_clip > 1, "> 1 or None")
    check_number("beta", beta, 0 <= beta < math.inf, "a finite number >= 0")
    check(kl in KL_KINDS, f"kl: expected one of {', '.join(KL_KINDS)}, got {kl!r}")
    check(kl_gradient in ("value", "k2"), f"kl_gradient: expected value or k2, got {kl_gradient!r}")
    check(ratio in ("token", "sequence"), f"ratio: expected token or sequence, got {ratio!r}")
    check(beta == 0 or ref_logp is not None, "ref_logp: needed because beta is not 0, got None")
