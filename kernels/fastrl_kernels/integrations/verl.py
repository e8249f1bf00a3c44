"""verl with these kernels: policy losses in its registry, and its log-prob functions on the fused head.

Call :func:`register` once in every process that trains. verl imports what ``actor_rollout_ref.model.external_lib`` (or
the variable ``VERL_USE_EXTERNAL_MODULES``) names, so a file of two lines does it::

    from fastrl_kernels.integrations.verl import register

    register()

and ``actor_rollout_ref.actor.policy_loss.loss_mode=fastrl`` chooses the loss. Values, gradients and metrics equal those
of verl's ``vanilla``, ``gspo``, ``cispo`` and ``sapo`` up to rounding; losses are normalised by verl's own
``agg_loss``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrl_kernels.linear_logprob import linear_logprob
from fastrl_kernels.policy_loss import policy_loss
from fastrl_kernels.token_logprob import token_logprob

_RATIO_LIMIT = 20.0  # bound of log-ratios, the same in verl and policy_loss
_SEQUENCE_LIMIT = 10.0  # bound of sequence log-ratios in verl's GSPO


def register(*, replace: bool = False, heads: bool = True) -> None:
    """Make verl use these kernels, in this process.

    Args:
        replace: also register under verl's own names (``vanilla``, ``gspo``, ``cispo``, ``sapo``), so that no config
            must change. Otherwise only ``fastrl``, ``fastrl_gspo``, ``fastrl_cispo`` and ``fastrl_sapo`` are added.
        heads: also replace verl's log-prob functions: ``linear_cross_entropy`` and ``FusedLinearForPPO``
            (``model.use_fused_kernels``, both backends), and ``logprobs_from_logits``.
    """
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY  # type: ignore[import-not-found]

    for name, loss in LOSSES.items():
        POLICY_LOSS_REGISTRY["fastrl" if name == "vanilla" else f"fastrl_{name}"] = loss
        if replace:
            POLICY_LOSS_REGISTRY[name] = loss
    if heads:
        from verl.utils import torch_functional  # type: ignore[import-not-found]
        from verl.utils.experimental.torch_functional import FusedLinearForPPO  # type: ignore[import-not-found]
        from verl.utils.kernel import linear_cross_entropy as kernel  # type: ignore[import-not-found]

        kernel.linear_cross_entropy = linear_cross_entropy  # looked up on each call
        FusedLinearForPPO.forward = _fused_linear
        # logprobs_from_logits itself is imported by name in many places, so replace the function that it calls
        torch_functional.logprobs_from_logits_flash_attn = logprobs_from_logits
        torch_functional.logprobs_from_logits_v2 = lambda logits, labels: logprobs_from_logits(logits, labels, False)


def vanilla_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's ``vanilla``: PPO's clip with a dual clip. All tensors [B, T]; returns (loss, metrics)."""
    low, high, dual = *_clip_range(config), config.get("clip_ratio_c", 3.0)
    weight = _weights(response_mask, loss_agg_mode, config, rollout_is_weights)
    loss = _loss(log_prob, old_log_prob, advantages, weight, clip_low=low, clip_high=high, dual_clip=dual)
    with torch.no_grad():
        log_ratio = _log_ratio(log_prob, old_log_prob)
        beyond = (log_ratio.exp() > dual) & (advantages < 0)
        return loss, _metrics(response_mask, log_ratio, _clipped(log_ratio.exp(), advantages, low, high), beyond)


def gspo_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's ``gspo``: one ratio per sequence, whose gradient reaches each token through that token's own log-prob.

    If a sequence's mean log-ratio exceeds 10, verl stops its gradient; here it is kept.
    """
    low, high = _clip_range(config)
    weight = _weights(response_mask, loss_agg_mode, config, rollout_is_weights)
    with torch.no_grad():
        log_ratio = log_prob - old_log_prob
        mean = (log_ratio * response_mask).sum(-1) / response_mask.sum(-1).clamp(min=1)
        mean = mean.clamp(max=_SEQUENCE_LIMIT)[:, None].expand_as(log_prob)
        old = log_prob - mean  # makes every token's ratio that of its sequence
        clipped = _clipped(mean.exp(), advantages, low, high)
    loss = _loss(log_prob, old, advantages, weight, clip_low=low, clip_high=high)
    with torch.no_grad():
        return loss, _metrics(response_mask, log_ratio, clipped)


def cispo_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's ``cispo``: the clipped ratio is a constant factor of the log-prob's gradient."""
    low, high = _clip_range(config)
    weight = _weights(response_mask, loss_agg_mode, config, rollout_is_weights)
    loss = _loss(log_prob, old_log_prob, advantages, weight, clip_low=low, clip_high=high, loss="cispo")
    with torch.no_grad():
        log_ratio = _log_ratio(log_prob, old_log_prob)
        ratio = log_ratio.exp()
        return loss, _metrics(response_mask, log_ratio, (ratio < 1 - low) | (ratio > 1 + high))


def sapo_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's ``sapo``: a smooth gate instead of the clip; always a mean of sequence means, regardless of the mode."""
    weight = _weights(response_mask, "seq-mean-token-mean", config, rollout_is_weights)
    tau = {"tau_positive": float(config.tau_pos), "tau_negative": float(config.tau_neg)}
    loss = _loss(log_prob, old_log_prob, advantages, weight, loss="sapo", **tau)
    return loss, _metrics(response_mask, _log_ratio(log_prob.detach(), old_log_prob))


LOSSES = {"vanilla": vanilla_loss, "gspo": gspo_loss, "cispo": cispo_loss, "sapo": sapo_loss}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl's ``linear_cross_entropy``: (log-probs, entropy) of hidden [..., H] under weight [V, H], flat [N].

    With a group of W processes, ``weight`` is this process's slice [V / W, H] and labels index the whole vocabulary;
    the gradient of ``hidden`` is this slice's part, which Megatron's layers sum.

    Raises:
        ValueError: ``reduction`` is not none, sum or mean.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction: expected none, sum or mean, got {reduction!r}")
    flat, options = hidden.reshape(-1, hidden.shape[-1]), {"temperature": temperature, "return_entropy": True}
    if dist_process_group is not None and torch.distributed.get_world_size(dist_process_group) > 1:
        from fastrl_kernels.sharding import vocab_parallel_logprob

        options |= {"group": dist_process_group, "reduce_hidden": False}
        out = vocab_parallel_logprob(flat, weight, labels.reshape(-1), **options)
    else:
        out = linear_logprob(flat, weight, labels.reshape(-1), **options)
    assert out.entropy is not None
    logp = out.logp if reduction == "none" else getattr(out.logp, reduction)()
    return logp, out.entropy


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """verl's ``logprobs_from_logits``: log-probs of labels [...] under logits [..., V], fp32."""
    out = token_logprob(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, inplace_backward=inplace_backward)
    return out.logp.view(labels.shape)


def _fused_linear(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``FusedLinearForPPO.forward``: ``linear_cross_entropy`` with results in the ids' shape."""
    logp, entropy = linear_cross_entropy(hidden_states, vocab_weights, input_ids.long(), temperature)
    return logp.view(input_ids.shape), entropy.view(input_ids.shape)


def _clip_range(config: Any) -> tuple[float, float]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return (config.clip_ratio if low is None else low), (config.clip_ratio if high is None else high)


def _weights(mask: Tensor, mode: str, config: Any, rollout_is_weights: Tensor | None) -> Tensor:
    """[B, T]: the weight of each token's loss in verl's ``agg_loss``, which is linear: its gradient."""
    from verl.trainer.ppo.core_algos import agg_loss  # type: ignore[import-not-found]

    with torch.enable_grad():
        rows = torch.zeros(mask.shape, device=mask.device, requires_grad=True)
        total = agg_loss(loss_mat=rows, loss_mask=mask, loss_agg_mode=mode, **config.global_batch_info)
        (weight,) = torch.autograd.grad(total, rows)
    return weight if rollout_is_weights is None else weight * rollout_is_weights.detach()


def _loss(log_prob: Tensor, old: Tensor, advantages: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """``policy_loss`` with one advantage per token: every token is its own completion."""
    each = torch.arange(log_prob.numel(), device=log_prob.device)
    flat = [tensor.reshape(-1) for tensor in (log_prob, advantages, old, weight)]
    return policy_loss(flat[0], flat[1], each, old_logp=flat[2], weight=flat[3], **options).loss


def _clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    return ((advantages < 0) & (ratio < 1 - low)) | ((advantages > 0) & (ratio > 1 + high))


def _log_ratio(log_prob: Tensor, old: Tensor) -> Tensor:
    return (log_prob - old).clamp(-_RATIO_LIMIT, _RATIO_LIMIT)


def _metrics(mask: Tensor, log_ratio: Tensor, *clipped: Tensor) -> dict[str, float]:
    """verl's three masked means, in one copy to the host. ``clipped``: where the ratio was clipped, and where by the
    dual clip."""
    given = [*clipped, *[torch.zeros_like(log_ratio)] * (2 - len(clipped))]
    rows = torch.stack([-log_ratio, *[flags.to(log_ratio.dtype) for flags in given]])
    means = (rows.where(mask.bool(), 0) * mask).sum((1, 2)) / (mask.sum() + 1e-8)
    names = ("actor/ppo_kl", "actor/pg_clipfrac", "actor/pg_clipfrac_lower")
    return dict(zip(names, means.tolist(), strict=True))
