"""A padded batch as TRL's trainer has it, its packed equivalent, and the trainer attributes that TRL's loss reads."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import torch
from torch import Tensor

from fastrl_kernels.policy_loss import PolicyLoss, policy_loss

B, T, LONGEST = 6, 9, 11  # answers, tokens of the longest, a constant length
LOW, HIGH = 0.15, 0.25


class Batch:
    """A padded batch and its packed equivalent: ragged answers, one of them fully masked; no NaN, as peers multiply
    by 0."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.tensor([9, 1, 4, 0, 7, 3])
        self.mask = (torch.arange(T) < lengths.unsqueeze(1)).double()
        self.logp = (-2 * torch.rand(B, T, generator=generator, dtype=torch.float64)).requires_grad_()
        noise = torch.randn(2, B, T, generator=generator, dtype=torch.float64) * 0.3
        self.old, self.ref = self.logp.detach() + noise[0], self.logp.detach() + noise[1]
        self.advantage = torch.randn(B, generator=generator, dtype=torch.float64)
        self.rows = self.mask.bool()
        self.ids = torch.arange(B).repeat_interleave(lengths)
        self.tokens = float(lengths.sum())

    def ours(self, **options) -> PolicyLoss:
        """``policy_loss`` of the packed rows; old and reference log-probs if the options are True, weights or
        aggregate as given."""
        if options.pop("old", True):
            options["old_logp"] = self.old[self.rows]
        if options.get("beta", 0) or options.pop("ref", False):
            options["ref_logp"] = self.ref[self.rows]
        options.setdefault("clip_low", LOW)
        options.setdefault("clip_high", HIGH)
        return policy_loss(self.logp[self.rows], self.advantage, self.ids, **options)

    def same(self, got: Tensor, want: Tensor, *, value: bool = True) -> None:
        """Equal gradients in the padded log-probs, and equal values."""
        assert want.requires_grad
        if value:
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        grads = [torch.autograd.grad(loss, self.logp, retain_graph=True)[0] for loss in (got, want)]
        assert grads[1].abs().max() > 1e-3
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


AGGREGATES = {
    "grpo": {"aggregate": "sequence", "normalizer": B},
    "bnpo": {"aggregate": "token"},
    "dr_grpo": {"aggregate": "constant", "normalizer": B * LONGEST},
    "dapo": {"aggregate": "token", "normalizer": 100},
}


class TrlTrainer(SimpleNamespace):
    """The attributes that ``GRPOTrainer._compute_loss`` reads of its trainer."""

    def __init__(self, batch: Batch, **settings) -> None:
        metrics: dict = {"train": defaultdict(list)}
        accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
        super().__init__(
            _get_per_token_logps_and_entropies=lambda *a, **k: (batch.logp, torch.zeros(B, T).double(), None),
            loss_type=settings.pop("loss_type"), importance_sampling_level=settings.pop("level", "token"),
            beta=settings.pop("beta", 0.0), epsilon_low=LOW, epsilon_high=settings.pop("epsilon_high", HIGH),
            args=SimpleNamespace(
                delta=settings.pop("delta", None), use_bias_correction_kl=False, steps_per_generation=1,
                sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
            ),
            aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
            vllm_importance_sampling_correction=False, model=SimpleNamespace(training=True), _metrics=metrics,
            current_gradient_accumulation_steps=1, max_completion_length=LONGEST, accelerator=accelerator,
            _entropy_bonus_enabled=False,
        )  # fmt: skip
