"""Policy-gradient losses over packed tokens: GRPO, Dr. GRPO, DAPO, GSPO, RLOO, CISPO, SAPO and their KL penalties.

With ``d = clamp(logp - old, -20, 20)``, ``r = exp(d)``, advantage ``A`` of the row's completion and weight ``w``:

    loss = sum_i w_i [ -min(r_i A_i, clip(r_i, 1 - clip_low, 1 + clip_high) A_i)  +  beta KL_i ]

(PPO eq. 7; GRPO, arXiv 2402.03300 eq. 3; dual clip, arXiv 1912.09729 eq. 5; GSPO, arXiv 2507.18071 eq. 5-7.)
Gradient, row by row: the ratio term gives ``-A r`` where the minimum is the unclipped branch and exactly 0 where the
ratio left the clip range on the side that ``A`` rewards (``A > 0, r > 1 + clip_high`` or ``A < 0, r < 1 - clip_low``),
where ``A < 0, r > dual_clip``, and where ``d`` was clamped. Exactly on a boundary the gradient is kept, as with torch's
``clamp`` and ``min``. KL, with ``x = ref - logp``: k1 ``-x`` (slope 1), k2 ``x^2 / 2`` (slope ``-x``), k3
``exp(x) - x - 1`` (slope ``1 - exp(x)``; above ``x = 20`` continued along its tangent, so the slope stays finite and
still points to the reference). A clipped row keeps its KL gradient.

``loss="cispo"`` (MiniMax-M1, arXiv 2506.13585) is ``-sg(clip(r)) A logp``, gradient ``-clip(r) A``: clipped tokens
still get a gradient. ``loss="sapo"`` (SAPO, arXiv 2511.20347) is ``-A (4 / tau) sigmoid(tau (r - 1))``, gradient
``-4 A s (1 - s) r`` with ``s`` the sigmoid and ``tau`` by the sign of ``A``. Importance weights
``exp(old - sampler)``, truncated or masked, correct for a sampler whose log-probs differ from the trainer's; they
multiply the objective and its gradient, but not the KL, and have no gradient themselves.

Why it is fast: the data is under 1 MB, so launches dominate the cost. One launch reads every vector once and writes
``dloss/dlogp`` and one row of partial sums per block; a second, of one program, adds the partials in a fixed order. No
atomics, no host read, bitwise reproducible. The backward is one multiplication. GSPO adds one launch before these, with
a program per completion.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl_kernels._common import FLOATS, Once, check, check_dtype, check_shape, readable, refuse_forward_mode
from fastrl_kernels._policy_options import PolicyOptions, PolicyTensors, completion_ids, options_schema
from fastrl_kernels._policy_rows import LOG_RATIO_LIMIT, policy_row_terms, policy_totals
from fastrl_kernels.token_weights import token_weights

__all__ = ["PolicyLoss", "policy_loss", "policy_loss_reference"]


class PolicyLoss(NamedTuple):
    """Result of ``policy_loss``, 0-d tensors. Only ``loss`` has a gradient; means are over rows of non-zero weight."""

    loss: Tensor
    kl: Tensor  # mean of the chosen estimator; 0 without ref_logp
    clip_low_fraction: Tensor  # A < 0 and ratio < 1 - clip_low
    clip_high_fraction: Tensor  # A > 0 and ratio > 1 + clip_high
    ratio_mean: Tensor
    ratio_max: Tensor


def _policy_loss(
    logp: Tensor,
    advantage: Tensor,
    completion: Tensor,
    weight: Tensor,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    numbers: Tensor | None = None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = PolicyTensors(advantage, completion, weight, old_logp, ref_logp, sampler_logp)
    rows = policy_row_terms(logp, tensors, PolicyOptions(*options), numbers)
    return (*policy_totals(rows.partials), rows.dlogp)


_policy_loss_op = torch.library.custom_op(
    "fastrl::policy_loss",
    _policy_loss,
    mutates_args=(),
    schema="(Tensor logp, Tensor advantage, Tensor completion, Tensor weight, Tensor? old_logp=None, "
    f"Tensor? ref_logp=None, Tensor? sampler_logp=None, Tensor? numbers=None, {options_schema()}) "
    "-> (Tensor, Tensor, Tensor)",
)


@_policy_loss_op.register_fake
def _(logp: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
    return logp.new_empty((), dtype=dtype), logp.new_empty(5, dtype=dtype), logp.new_empty(logp.shape, dtype=dtype)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, metrics, dlogp = output
    ctx.mark_non_differentiable(metrics, dlogp)
    ctx.save_for_backward(dlogp, inputs[0])
    ctx.count = len(inputs)


def _backward(ctx: Any, grad_loss: Tensor, grad_metrics: Any, grad_dlogp: Any) -> Any:
    dlogp, logp = ctx.saved_tensors
    made = (dlogp * grad_loss).to(logp.dtype)
    return (Once.apply(made, logp, "policy_loss") if torch.is_grad_enabled() else made, *[None] * (ctx.count - 1))


_policy_loss_op.register_autograd(_backward, setup_context=_setup)


class _Direct(torch.autograd.Function):
    """The operator without its dispatch, which on a CPU takes longer than the rows of a small batch."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _policy_loss(*arguments)

    setup_context = staticmethod(_setup)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _backward(ctx, *grads)


def policy_loss(
    logp: Tensor,
    advantage: Tensor,
    completion: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    weight: Tensor | None = None,
    aggregate: str = "token",
    normalizer: float | Tensor | None = None,
    clip_low: float | Tensor = 0.2,
    clip_high: float | Tensor = 0.2,
    dual_clip: float | Tensor | None = None,
    beta: float | Tensor = 0.0,
    kl: str = "k3",
    kl_gradient: str = "value",
    ratio: str = "token",
    loss: str = "clip",
    importance: str | None = None,
    importance_level: str = "token",
    importance_cap: float | Tensor = 2.0,
    tau_positive: float | Tensor = 1.0,
    tau_negative: float | Tensor = 1.05,
) -> PolicyLoss:
    """Policy-gradient loss with optional KL penalty; formulas and gradients at the top of this file.

    Args:
        logp: ``[N]`` log-probs of the taken tokens (fp32, bf16, fp16; float64 runs eagerly). A second derivative
            raises (``policy_loss_reference`` has all).
        advantage: ``[C]``, one per completion. Constant, as are all tensors below.
        completion: ``[N]`` int64 or int32, the completion of each row, any order. Negative: padding. ``>= C``: an error
            on CPU, padding on GPU (no host read). None: ``logp`` and every vector of it are padded, ``[C, L]``, a
            completion a row. (``logp [B, T]`` with ids ``[B, T]`` is taken as well: rows that hold several.)
        mask: like ``logp``, bool or integer; 0 is padding, and may hold NaN.
        old_logp: ``[N]`` of the policy before the update. None: strictly on-policy, ratio 1, gradient ``-A w``.
        ref_logp: ``[N]`` of the reference policy; needed if ``beta != 0``. With ``beta = 0``, KL is only measured.
        sampler_logp: ``[N]`` as reported by the sampler (an inference engine); needs ``importance``. NaN: not
            reported, importance weight 1.
        weight: ``[N]``, loss = sum of weight x row loss. Rows of weight 0 are never evaluated and may hold NaN.
            Default: ``token_weights(completion, aggregate=aggregate, normalizer=normalizer)``.
        clip_low, clip_high: the clip range is ``[1 - clip_low, 1 + clip_high]``. This, ``dual_clip``, ``beta``,
            ``importance_cap`` and the taus may be 0-d tensors: never read by the host, and nothing recompiles.
        dual_clip: upper limit (> 1) of the ratio where the advantage is negative; only for ``loss="clip"``.
        kl: estimator ``"k1"``, ``"k2"`` or ``"k3"``.
        kl_gradient: ``"value"`` differentiates the estimator, ``"k2"`` takes k2's slope for any estimator.
        ratio: ``"token"``, or ``"sequence"`` (GSPO): every token of a completion carries the exponential of the mean
            log-ratio of its rows of non-zero weight, and the gradient goes through that mean.
        loss: ``"clip"``, ``"cispo"`` or ``"sapo"`` (which clips nothing: its two fractions are 0).
        importance: ``"truncate"`` limits the importance weight ``exp(old_logp - sampler_logp)`` to ``importance_cap``,
            ``"mask"`` drops the objective (not the KL) of rows above it.
        importance_level: of each ``"token"``, or of the ``"sequence"``: the product over its rows of non-zero weight.
        tau_positive, tau_negative: SAPO's temperatures by the sign of the advantage (0 counts as negative).

    Returns:
        ``PolicyLoss``, fp32 (float64 in, float64 out). No live row: all zeros. A NaN in a live row gives a NaN loss,
        where the loss depends on it (without ``old_logp`` and ``beta``, ``"clip"`` does not depend on ``logp``).

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or option, before any launch.
    """
    options = PolicyOptions(
        clip_low, clip_high, dual_clip, beta, kl, kl_gradient, ratio, loss, importance, importance_level,
        importance_cap, tau_positive, tau_negative,
    )  # fmt: skip
    vectors = (old_logp, ref_logp, sampler_logp, weight)
    logp, tensors = _tensors(logp, advantage, completion, mask, vectors, aggregate, normalizer)
    options.check(ref_logp, sampler_logp)
    refuse_forward_mode("policy_loss", logp)
    plain, numbers = options.split(logp)
    run = _Direct.apply if readable(logp, *tensors, numbers) else _policy_loss_op
    value, metrics, _ = run(logp, *tensors, numbers, *plain)
    return PolicyLoss(value, *metrics.unbind())


def _tensors(
    logp: Tensor,
    advantage: Tensor,
    completion: Tensor | None,
    mask: Tensor | None,
    vectors: tuple[Tensor | None, ...],
    aggregate: str,
    normalizer: float | Tensor | None,
) -> tuple[Tensor, PolicyTensors]:
    """``logp`` as [N] and the checked constants; computes weights if none are given."""
    check(logp.dim() in (1, 2), f"logp: expected shape [N] or [C, L], got {list(logp.shape)}")
    check_shape("advantage", advantage, (None,))
    completion = completion_ids("logp", tuple(logp.shape), advantage, completion, mask)
    check_dtype("logp", logp, FLOATS)
    old_logp, ref_logp, sampler_logp, weight = vectors
    unset = logp if weight is None else weight  # checked in place of weights that are computed later
    tensors = PolicyTensors(advantage, completion, unset.detach(), old_logp, ref_logp, sampler_logp)
    tensors.check(logp)
    tensors, logp = tensors.rows(lambda t: t.reshape(-1)), logp.reshape(-1)
    if weight is not None:
        check(normalizer is None, "normalizer: only without weight (a given weight is already normalised)")
        return logp, tensors
    dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
    c = advantage.shape[0]
    made = token_weights(tensors.completion, aggregate=aggregate, normalizer=normalizer, n_completions=c, dtype=dtype)
    return logp, tensors._replace(weight=made)


def policy_loss_reference(
    logp: Tensor,
    advantage: Tensor,
    completion: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    weight: Tensor | None = None,
    aggregate: str = "token",
    normalizer: float | Tensor | None = None,
    **options: Any,
) -> PolicyLoss:
    """``policy_loss`` as written in the papers, under autograd, on any device. Same arguments.

    Computes in float64; returns float64 for float64 inputs. Shares no code with the CPU path. Derivatives of every
    order.
    """
    o = PolicyOptions(**options)
    vectors = (old_logp, ref_logp, sampler_logp, weight)
    logp, tensors = _tensors(logp, advantage, completion, mask, vectors, aggregate, normalizer)
    o.check(ref_logp, sampler_logp)
    completion, old_logp, ref_logp, sampler_logp = tensors.completion, *tensors[3:]
    c = advantage.shape[0]
    live = (tensors.weight != 0) & (completion >= 0) & (completion < c)
    index = completion.long().masked_fill(~live, c)  # rows that are not live go to an extra completion

    def rows(x: Tensor) -> Tensor:
        return torch.where(live, x.double(), 0.0)

    def total(x: Tensor) -> Tensor:
        """Sum over the rows of the same completion, at each row."""
        return torch.zeros(c + 1, dtype=x.dtype, device=x.device).index_add(0, index, x)[index]

    lp, w = rows(logp), rows(tensors.weight)
    a = torch.cat([advantage.double(), w.new_zeros(1)])[index]
    old = lp.detach() if old_logp is None else rows(old_logp)
    log_ratio = lp - old
    if o.ratio == "sequence":
        log_ratio = total(log_ratio) / total(live.double()).clamp(min=1)
    r = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    numbers = (1 - o.clip_low, 1 + o.clip_high, o.tau_positive, o.tau_negative)
    low, high, tau_positive, tau_negative = (torch.as_tensor(x, dtype=lp.dtype, device=lp.device) for x in numbers)
    if o.loss == "cispo":
        objective = r.clamp(low, high).detach() * a * lp
    elif o.loss == "sapo":
        tau = torch.where(a > 0, tau_positive, tau_negative)
        objective = torch.sigmoid(tau * (r - 1)) * 4 / tau * a
    else:
        objective = torch.minimum(r * a, r.clamp(low, high) * a)
        if o.dual_clip is not None:
            objective = torch.where((a < 0) & (objective < o.dual_clip * a), o.dual_clip * a, objective)
    if sampler_logp is not None:
        log_weight = torch.where(sampler_logp.isnan(), 0.0, old.detach() - rows(sampler_logp)).where(live, 0.0)
        factor = (
            (total(log_weight) if o.importance_level == "sequence" else log_weight).clamp(max=LOG_RATIO_LIMIT).exp()
        )
        above = o.importance_cap if o.importance == "truncate" else 0.0
        objective = objective * torch.where(factor > o.importance_cap, above, factor)
    kl = torch.zeros_like(lp) if ref_logp is None else _kl_textbook(rows(ref_logp) - lp, o.kl, o.kl_gradient)
    loss = -(w * objective).sum()
    if isinstance(o.beta, Tensor) or o.beta != 0:
        loss = loss + o.beta * (w * kl).sum()
    count, r = live.sum().clamp(min=1).double(), torch.where(live, r, 0.0).detach()
    clipped = (live & (a < 0) & (r < low)), (live & (a > 0) & (r > high))
    fractions = [x.sum() / count if o.loss != "sapo" else torch.zeros_like(loss) for x in clipped]
    largest = r.max() if r.numel() else torch.zeros_like(loss)
    out = torch.float64 if logp.dtype == torch.float64 else torch.float32
    values = (loss, kl.detach().where(live, 0.0).sum() / count, *fractions, r.sum() / count, largest)
    return PolicyLoss(*[x.to(out) for x in values])


def _kl_textbook(x: Tensor, kl: str, gradient: str) -> Tensor:
    """The estimator at ``x = ref - logp``; above the limit, k3 is continued along its tangent."""
    k2 = x * x / 2
    capped = x.clamp(max=LOG_RATIO_LIMIT)
    k3 = torch.expm1(capped) - capped + torch.expm1(capped.detach()) * (x - capped)
    value = {"k1": -x, "k2": k2, "k3": k3}[kl]
    return value.detach() + k2 - k2.detach() if gradient == "k2" else value
