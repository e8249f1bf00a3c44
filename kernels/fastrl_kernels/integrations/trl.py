"""TRL's ``GRPOTrainer`` with the head and the loss from these kernels::

    from fastrl_kernels.integrations.trl import FusedGRPOMixin
    from trl import GRPOTrainer

    class Trainer(FusedGRPOMixin, GRPOTrainer):
        pass

Everything else (data, generation, rewards, advantages, logging) is TRL's, and losses, metrics and weights agree up to
rounding. What changes:

- The head: ``linear_logprob`` replaces TRL's tiles. Rows whose gradient is exactly 0 (a group whose completions all got
  the same reward; clipped tokens) are left out of the backward's matmuls.
- The loss: ``policy_loss`` computes value, gradient and KL in one launch.

TRL's own code is used where these kernels have no equivalent: the loss in the cases that :func:`loss_stays` names, the
head under DeepSpeed ZeRO-3, for an MoE's router loss, and for an output embedding that is quantised or has an adapter.
One difference is intended: a log-ratio beyond 20 is clamped to 20 and gets no gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.utils import FusedCausalLMOutput, nanmax, nanmin

from fastrl_kernels.integrations._head import (
    IGNORED,
    Logits,
    backbone_output,
    named_arguments,
    plain_head,
    replace_forward,
    score,
)
from fastrl_kernels.policy_loss import policy_loss
from fastrl_kernels.token_weights import token_weights

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # PPO's clipped ratio, with different normalisations
LOSSES = (*CLIPPED, "cispo", "sapo")
_OF_ALL_TOKENS = ("dapo", "cispo")  # normalised over the whole optimizer step


def padded_states(model: Any, named: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Hidden states [B, L, H] and the label that each predicts [B, L] (-100: none), for a call by TRL."""
    hidden, labels = backbone_output(model, named).last_hidden_state, named.get("shift_labels")
    return (hidden[:, :-1], named["labels"][:, 1:]) if labels is None else (hidden, labels)


def fuse_head(
    model: Any,
    *,
    temperature: float,
    float32: bool = False,
    return_entropy: bool = True,
    states: Callable[[Any, dict[str, Any]], tuple[Tensor, Tensor]] = padded_states,
) -> None:
    """Score labels with ``linear_logprob`` in ``model(..., labels=labels, fused_lm_head=True)``.

    ``model`` has been through TRL's ``add_fused_lm_head``; without ``fused_lm_head``, or if TRL's head must be used,
    its previous forward is called. ``float32``: hidden states are cast, and autocast is off (the weight is fp32).
    ``states``: (model, arguments by name) → (hidden states, labels).
    """
    before, logits = model.forward, Logits.of(model.config)
    text = model.config.get_text_config()

    def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        head = plain_head(model)
        routed = kwargs.get("output_router_logits") or getattr(text, "output_router_logits", False)
        if not fused_lm_head or head is None or routed or is_deepspeed_zero3_enabled():
            return before(*args, fused_lm_head=fused_lm_head, **kwargs)
        named = named_arguments(model, args, kwargs)
        hidden, labels = states(model, named)
        device = hidden.device.type
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not float32):
            out = score(
                head,
                hidden.float() if float32 else hidden,
                labels,
                logits,
                temperature=temperature,
                return_entropy=return_entropy,
            )
        mask = labels != IGNORED
        counted = named.get("num_items_in_batch")
        loss = -out.logp.sum() / (mask.sum().clamp(min=1) if counted is None else counted)
        return FusedCausalLMOutput(loss=loss, log_probs=out.logp, entropy=out.entropy, label_mask=mask)

    replace_forward(model, forward)


class FusedGRPOMixin:
    """Mixin to put before ``GRPOTrainer`` in a class's bases; same arguments and results."""

    accelerator: Any
    args: Any  # GRPOConfig
    model: Any
    ref_model: Any
    temperature: float
    loss_type: str
    beta: float
    epsilon_low: float
    epsilon_high: float
    importance_sampling_level: str
    top_entropy_quantile: float
    off_policy_mask_threshold: float | None
    use_vllm: bool
    vllm_importance_sampling_correction: bool
    max_completion_length: int
    current_gradient_accumulation_steps: int
    get_off_policy_mask: Any
    get_high_entropy_mask: Any
    _get_per_token_logps_and_entropies: Any
    _metrics: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for model, entropy in ((self.model, True), (self.ref_model, False)):
            if model is not None:
                self._fuse(_without_adapter(self.accelerator.unwrap_model(model)), return_entropy=entropy)

    def _fuse(self, model: Any, *, return_entropy: bool) -> None:
        """Change the forward of the policy, or of its reference."""
        float32 = self.args.cast_lm_head_to_fp32
        fuse_head(model, temperature=self.temperature, float32=float32, return_entropy=return_entropy)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if loss_stays(self, inputs) is not None:
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
        logp, entropy, _ = self._completion_logps(model, inputs)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        loss, kl = self._fused_loss(logp, entropy, mask, inputs)
        self._fused_metrics(logp.detach(), entropy.detach(), mask, kl, inputs)
        if self.loss_type not in _OF_ALL_TOKENS and self.model.training:
            loss = loss / self.current_gradient_accumulation_steps
        return loss

    def _completion_logps(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, None]:
        """Log-probs and entropy of the completions, [B, T] each, by TRL's method with all inputs that it accepts."""
        taken = inspect.signature(super()._get_per_token_logps_and_entropies).parameters  # type: ignore[misc]
        return self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].shape[1],
            compute_entropy=True,
            **{name: value for name, value in inputs.items() if name in taken},
        )

    def _fused_loss(
        self, logp: Tensor, entropy: Tensor, mask: Tensor, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """(loss before gradient accumulation, mean KL or None)."""
        completion = torch.arange(mask.shape[0], device=mask.device).repeat_interleave(mask.shape[1])
        weight = self._token_weights(completion, mask, inputs)
        factor = self._row_factor(logp, entropy, mask, inputs)
        advantage, old, ref = inputs["advantages"], inputs.get("old_per_token_logps"), None
        if self.beta != 0.0:
            ref = inputs["ref_per_token_logps"].flatten()
        together = ref is not None and factor is None and not self.args.use_bias_correction_kl
        out = policy_loss(
            logp.flatten(),
            advantage,
            completion,
            old_logp=None if old is None else old.flatten(),
            ref_logp=ref if together else None,
            beta=self.beta if together else 0.0,
            weight=weight if factor is None else weight * factor.expand_as(mask).flatten(),
            ratio=self.importance_sampling_level,
            **self._objective(),
        )
        if ref is None or together:
            return out.loss, out.kl if together else None
        if self.args.use_bias_correction_kl:
            penalty = self._corrected_kl(logp, mask, inputs)
            return out.loss + self.beta * (penalty.flatten() @ weight), (penalty.detach() * mask).sum() / mask.sum()
        # a factor applies to the policy term only: the penalty is the loss with advantages 0
        kl = policy_loss(
            logp.flatten(), torch.zeros_like(advantage), completion, ref_logp=ref, beta=self.beta, weight=weight
        )
        return out.loss + kl.loss, kl.kl

    def _objective(self) -> dict[str, Any]:
        """TRL's loss type as options of ``policy_loss``."""
        if self.loss_type == "sapo":
            tau = {"tau_positive": self.args.sapo_temperature_pos, "tau_negative": self.args.sapo_temperature_neg}
            return {"loss": "sapo", **tau}
        # its epsilon_high is the upper bound of the ratio itself; there is no lower bound
        if self.loss_type == "cispo":
            return {"loss": "cispo", "clip_low": 1.0, "clip_high": self.epsilon_high - 1}
        return {"clip_low": self.epsilon_low, "clip_high": self.epsilon_high, "dual_clip": self.args.delta}

    def _corrected_kl(self, logp: Tensor, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        """[B, T]: the KL estimate times the ratio, which makes it unbiased off-policy (DeepSeek-V3.2, section 3.1)."""
        x = inputs["ref_per_token_logps"] - logp
        return (x.exp() - x - 1) * self._log_ratio(logp, mask, inputs).exp()

    def _token_weights(self, completion: Tensor, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        """[B * T]: each token's weight under TRL's normalisation, before gradient accumulation."""
        rows, aggregate, normalizer = mask.shape[0], "token", None
        if self.loss_type in ("grpo", "sapo"):
            aggregate, normalizer = "sequence", rows
        elif self.loss_type == "dr_grpo":
            aggregate, normalizer = "constant", rows * self.max_completion_length
        elif self.loss_type == "luspo":
            aggregate, normalizer = "constant", rows
        elif self.loss_type in _OF_ALL_TOKENS:  # of the whole generation batch: rescaled to one window of accumulation
            normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            if self.model.training:
                normalizer = normalizer * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return token_weights(
            completion, aggregate=aggregate, mask=mask.flatten(), normalizer=normalizer, n_completions=rows
        )

    def _row_factor(self, logp: Tensor, entropy: Tensor, mask: Tensor, inputs: dict[str, Any]) -> Tensor | None:
        """The factor on the policy term of each token, [B, T] or [B, 1]; None: no factor."""
        factors = []
        if self.off_policy_mask_threshold is not None:
            sampled = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps"))
            factors.append(
                self.get_off_policy_mask(
                    inputs["advantages"].unsqueeze(1),
                    logp,
                    logp.detach() if sampled is None else sampled,
                    mask,
                    self.off_policy_mask_threshold,
                )
            )
        if self.top_entropy_quantile < 1.0:
            factors.append(self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile))
        if self.use_vllm and self.vllm_importance_sampling_correction:
            factors.append(inputs["importance_sampling_ratio"])
        factor = None
        for one in factors:
            factor = one.to(logp.dtype) if factor is None else factor * one
        return factor

    @torch.no_grad()
    def _fused_metrics(
        self, logp: Tensor, entropy: Tensor, mask: Tensor, kl: Tensor | None, inputs: dict[str, Any]
    ) -> None:
        """TRL's metrics, their sums over all processes in one reduction."""
        tokens = mask.sum()
        sums = {"entropy": ((entropy * mask).sum(), tokens)}
        low, high = self._clipped(logp, mask, inputs)
        counted = mask if low.shape == mask.shape else torch.ones_like(low)  # one ratio per sequence counts once
        lows, highs, ratios = (low * counted).sum(), (high * counted).sum(), counted.sum()
        if self.loss_type in CLIPPED:
            sums["clip_ratio/low_mean"] = (lows, ratios)
            sums["clip_ratio/high_mean"] = (highs, ratios)
            sums["clip_ratio/region_mean"] = (lows + highs, ratios)
        elif self.loss_type == "cispo":
            sums["cispo_clip_ratio"] = (highs, ratios)
        if kl is not None:
            sums["kl"] = (kl * tokens, tokens)
        local = torch.stack([torch.stack([total.float(), count.float()]) for total, count in sums.values()])
        total, count = self.accelerator.reduce(local, reduction="sum").unbind(1)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, mean in zip(sums, (total / count.clamp(min=1)).tolist(), strict=True):
            metrics[name].append(mean)
        if self.loss_type not in CLIPPED:
            return
        rows = torch.stack([(low * counted).sum(1), (high * counted).sum(1)]) / counted.sum(1)  # NaN if nothing counts
        rows = self.accelerator.gather(rows.T.contiguous())
        metrics["clip_ratio/low_min"].append(nanmin(rows[:, 0]).item())
        metrics["clip_ratio/high_max"].append(nanmax(rows[:, 1]).item())

    def _clipped(self, logp: Tensor, mask: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """1 for ratios beyond the clip range on the side that their advantage rewards, else 0: [B, T] or [B, 1]."""
        ratio, advantage = self._log_ratio(logp, mask, inputs).exp(), inputs["advantages"].unsqueeze(1)
        low = (ratio < 1 - self.epsilon_low) & (advantage < 0)
        high = (ratio > (self.epsilon_high if self.loss_type == "cispo" else 1 + self.epsilon_high)) & (advantage > 0)
        return low.float(), high.float()

    def _log_ratio(self, logp: Tensor, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Log-ratio of the policy to the sampling policy: [B, T], or [B, 1] at sequence level."""
        old = inputs.get("old_per_token_logps")
        log_ratio = logp - (logp.detach() if old is None else old)
        if self.importance_sampling_level == "sequence":
            return (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return log_ratio


def loss_stays(trainer: Any, inputs: dict[str, Any]) -> str | None:
    """The reason why TRL's own code computes this loss; None: ``policy_loss`` does."""
    args = trainer.args
    if trainer.loss_type not in LOSSES:
        return f"loss_type={trainer.loss_type}"
    if inputs["advantages"].ndim != 1:
        return "an advantage per token"
    if trainer._entropy_bonus_enabled:
        return "an entropy bonus"
    if trainer.aux_loss_enabled:
        return "a router loss"
    if trainer.loss_type == "cispo" and trainer.epsilon_high < 1:
        return "a cap of cispo's ratio below 1"
    if trainer.loss_type in CLIPPED and args.delta is not None and args.delta <= max(1.0, 1 + trainer.epsilon_high):
        return "delta within the clip range"
    masked = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    masked = masked and trainer.vllm_importance_sampling_mode == "token_mask"
    if trainer.importance_sampling_level == "sequence" and (trainer.top_entropy_quantile < 1 or masked):
        return "sequence ratios of which some tokens do not count"
    return None


def _without_adapter(model: Any) -> Any:
    """The model under PEFT's wrapper, which adapters are hooked into."""
    from accelerate.utils import is_peft_model

    return model.get_base_model() if is_peft_model(model) else model
