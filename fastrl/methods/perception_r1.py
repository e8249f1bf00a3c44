"""Perception-R1 (arXiv:2504.07954): GRPO on rule rewards for grounding, counting, detection and OCR.

G answers per prompt are sampled from the policy, scored by the task's rules, and compared within their group:

    A_i = (r_i − mean r) / (std r + ε)                       (GRPO; other baselines and scales are options)
    L = Σ_t w_t · [ −min(ρ_t A, clip(ρ_t, 1 − ε_low, 1 + ε_high) A) + β KL_t ]

with token weights w normalised over all answers of the optimizer step. The authors' released trainer makes one update
per rollout, so ρ = 1 and nothing is clipped; several updates per rollout are supported too.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastrl.batch import PackedBatch, PromptGroup
from fastrl.methods.base import Context, Method, MethodOptions, Prepared, set_token_weights
from fastrl.methods.rollouts import RecipeRewards, sample_groups
from fastrl.methods.scoring import check_advantages
from fastrl.rewards.judge import LABEL as JUDGE
from fastrl_kernels.group_advantage import GroupAdvantage, group_advantage
from fastrl_kernels.linear_policy_loss import LinearPolicyLoss, linear_policy_loss
from fastrl_kernels.policy_loss import PolicyLoss, policy_loss

if TYPE_CHECKING:
    from fastrl.data.records import Record


_OF_SEQUENCES = ("gspo", "gspo-token")  # losses whose ratio is the whole answer's


class PerceptionR1Options(MethodOptions):
    """Keys of ``method:`` for Perception-R1. Defaults are the paper's and the released trainer's."""

    kind: Literal["perception-r1"] = "perception-r1"
    """The method; see the loss by its names elsewhere."""
    loss: Literal["grpo", "cispo", "sapo", "gspo", "gspo-token"] = "grpo"
    """The loss: the clipped ratio (`grpo`), `cispo` (arXiv:2506.13585), `sapo` (arXiv:2511.20347), `gspo` or
    `gspo-token` (arXiv:2507.18071)."""
    baseline: Literal["mean", "leave_one_out", "rloo"] = "mean"
    """Baseline of an answer's reward: the mean of its group, or of the other answers (`leave_one_out`); `rloo`: the
    latter, with `scale: none` regardless of that key (arXiv:2402.14740)."""
    scale: Literal["std", "none"] = "std"
    """Whether advantages are divided by the group's standard deviation (`none`: Dr. GRPO, arXiv:2503.20783)."""
    unbiased: bool = True
    """Standard deviation with n − 1, as in the released trainer; `false`: with n, as in some others."""
    eps: float = Field(1e-4, ge=0)
    """Added to the standard deviation."""
    normalise: Literal["sum", "each"] = "sum"
    """`each`: normalise every reward component within the group separately, then standardise their weighted sum over a
    rank's answers of the step (GDPO, arXiv:2601.05242). Use it if one component dominates the others."""
    beta: float = Field(0.04, ge=0)
    """Weight of the KL term; `0`: no KL term and no reference model."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence."""
    kl_gradient: Literal["value", "k2"] = "value"
    """`k2`: use the gradient of k2, which is unbiased, regardless of the logged estimator; `value`: use the estimator's
    own gradient, as in the released trainer."""
    clip_low: float = Field(0.2, ge=0, le=1)
    """The ratio is clipped at 1 − this."""
    clip_high: float = Field(0.2, ge=0)
    """The ratio is clipped at 1 + this; a value above `clip_low` is DAPO's clip-higher."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound on the ratio for answers with a negative advantage (dual-clip PPO; 3 is usual). Use it with several updates
    per batch."""
    tau_positive: float = Field(1.0, gt=0)
    """With `sapo`: temperature for answers with a positive advantage."""
    tau_negative: float = Field(1.05, gt=0)
    """With `sapo`: temperature for the other answers."""
    ratio: Literal["token", "sequence"] = "token"
    """The ratio of each token, or of the whole answer; with `gspo` and `gspo-token` always the latter."""
    importance: Literal["none", "truncate", "mask"] = "none"
    """Correct for a sampler whose log-probs differ from the trainer's (`sampler/gap_mean`): weight by their ratio,
    truncated at `importance_cap`, or mask what exceeds it."""
    importance_level: Literal["token", "sequence"] = "token"
    """Use the ratio of each token, or their product over the answer."""
    importance_cap: float = Field(2.0, gt=0)
    """Largest importance weight."""
    aggregate: Literal["sequence", "token", "constant"] = "sequence"
    """`sequence`: mean over an answer, then over answers; `token`: mean over all tokens; `constant`: sum over a
    constant length (Dr. GRPO)."""
    constant_length: int | None = Field(None, ge=1)
    """With `constant`: the length in tokens; none: `rollout.max_new_tokens`."""
    mask_truncated: bool = False
    """Exclude answers truncated at `rollout.max_new_tokens` from the loss; their reward still counts in the group."""
    zero_variance: Literal["keep", "drop", "resample"] = "keep"
    """Groups whose rewards are all equal: keep them in the denominators, drop them, or replace them by other prompts
    (DAPO's dynamic sampling)."""
    max_resample: int = Field(3, ge=1)
    """With `resample`: additional rounds of prompts that a step may draw. Raise it if `groups/kept` stays below the
    prompts of a step."""

    @model_validator(mode="after")
    def _consistent(self) -> PerceptionR1Options:
        if self.constant_length is not None and self.aggregate != "constant":
            raise ValueError("constant_length is only read with aggregate: constant")
        if self.dual_clip is not None and self.loss in ("cispo", "sapo"):
            raise ValueError(f"dual_clip bounds the clipped ratio, which loss: {self.loss} does not have")
        if self.loss == "gspo-token" and self.importance != "none" and self.importance_level == "token":
            raise ValueError("loss: gspo-token needs importance_level: sequence (or importance: none)")
        return self


class PerceptionR1(Method):
    """GRPO on rule rewards."""

    Options: ClassVar[type[MethodOptions]] = PerceptionR1Options
    samples = True
    least_group = 2
    needs_entropy = True  # for the log
    keeps_prompts = True
    adds_overlong = True

    def __init__(self, options: PerceptionR1Options, context: Context) -> None:
        super().__init__(options, context)
        self.temperature = context.rollout.temperature
        self._rewards = RecipeRewards(context.reward, context.rewards, functions=context.functions)
        self._counts: dict[str, list[int]] = {}  # parser counts of the step's answers, which explain low rewards

    @classmethod
    def reads_reference(cls, options: PerceptionR1Options) -> bool:
        """Whether there is a KL term."""
        return options.beta > 0

    @classmethod
    def row_local_obstacle(cls, options: PerceptionR1Options) -> str | None:
        """What makes a row's gradient depend on the other rows of its answer."""
        if _ratio_of(options) == "sequence":
            key = f"loss: {options.loss}" if options.loss in _OF_SEQUENCES else "ratio: sequence"
            return f"method.{key} needs all rows of an answer before the gradient of one is known"
        if options.importance != "none" and options.importance_level == "sequence":
            return "method.importance_level: sequence needs all rows of an answer before the weight of one is known"
        return None

    @classmethod
    def loss_note(cls, options: PerceptionR1Options, updates: int) -> str:
        """With one update per batch, the value of the loss is uninformative."""
        if updates > 1:
            return ""
        rest = "only its KL term has a value of its own" if options.beta > 0 else "its value is near 0"
        return (
            "About the loss: with one update per batch all ratios are 1 and the advantages of a group sum to 0, so "
            f"{rest} although its gradient trains the model. See reward/mean for progress."
        )

    def prepare(self, records: Sequence[Record]) -> Prepared:
        """Sample and score G answers to each record; return the groups that carry gradient, with their token weights.

        In groups of equal rewards all advantages are 0. ``keep``: they still count in the denominators (and get the KL
        term if β > 0). ``drop``: they do not. ``resample``: other prompts replace them, drawn in at most
        ``max_resample`` rounds; the step is smaller if groups are still missing after that.
        """
        options = self.options
        sampled: list[PromptGroup] = []
        kept: list[PromptGroup] = []
        wanted, constant_groups, rounds = len(records), 0, 0
        self._counts = {}
        while True:
            groups = self._sample(records)
            constant = self._compare(groups)
            sampled += groups
            constant_groups += sum(constant)
            kept += [g for g, c in zip(groups, constant, strict=True) if options.zero_variance == "keep" or not c]
            self.context.keep_only(kept)
            missing = wanted - len(kept)
            if options.zero_variance != "resample" or missing <= 0 or rounds >= options.max_resample:
                break
            rounds += 1
            records = self.context.stream.take(missing)
        self._weigh(sampled, kept)
        metrics = {
            "groups/sampled": float(len(sampled)),
            "groups/zero_variance": float(constant_groups),
            "groups/kept": float(len(kept)),
            "groups/resample_rounds": float(rounds),
            **{name: statistics.fmean(counts) for name, counts in self._counts.items()},
        }
        return Prepared(groups=[g for g in kept if self._carries_gradient(g)], sampled=sampled, metrics=metrics)

    def rows(self, batch: PackedBatch) -> Tensor | None:
        """Rows with a nonzero weight and, if β = 0, a nonzero advantage."""
        live = batch.per_token["weight"] != 0
        if self.options.beta == 0:
            live &= batch.per_completion["advantage"][batch.completion_of_token] != 0
        return None if bool(live.all()) else live.nonzero().squeeze(-1)

    def loss(self, logp: Tensor, entropy: Tensor | None, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped policy loss of one micro-batch (see :func:`grpo_loss`)."""
        return grpo_loss(logp, entropy, batch, self.options)

    def row_local_loss(
        self, hidden: Tensor, head_weight: Tensor, batch: PackedBatch, rows: Tensor | None, **head: Any
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """:meth:`loss` from hidden states, with gradients computed in the forward (recipe: row_local_head).

        Also returns the log-probs, infinite for rows that were skipped.
        """
        result = linear_policy_loss(
            hidden,
            head_weight,
            batch.targets,
            batch.per_completion["advantage"],
            batch.completion_of_token,
            temperature=self.temperature,
            rows=rows,
            **_loss_arguments(batch, self.options),
            **head,
        )
        return result.loss, _loss_metrics(result), result.logp

    def _sample(self, records: Sequence[Record]) -> list[PromptGroup]:
        self._rewards.check(records, self.context.policy.encode)
        return sample_groups(self.context, records)

    def _score(self, groups: Sequence[PromptGroup]) -> None:
        """Compute reward components and their weighted sum for every answer, with one batched call per reward."""
        places = [(group, i) for group in groups for i in range(len(group.completions))]
        for (group, i), found in zip(places, self._rewards.scores(places), strict=True):
            completion = group.completions[i]
            completion.rewards, completion.scalars["reward"] = found.components, found.total
        for group in groups:
            self._add_overlong(group)
            assert group.record is not None
            if self._rewards.section_of(group.record.origin).judge is not None:
                missing = [int(JUDGE not in completion.rewards) for completion in group.completions]
                self._counts.setdefault("answers/unjudged", []).extend(missing)
        for reward, members in self._rewards.members(groups):
            answers = [(c, g.record) for g in members for c in g.completions]
            texts, records = [c.text for c, _ in answers], [r for _, r in answers if r is not None]
            for name, counts in reward.diagnose(texts, records).items():
                self._counts.setdefault(f"answers/{name}", []).extend(counts)

    def _compare(self, groups: Sequence[PromptGroup]) -> list[bool]:
        """Write the advantages of each group; return which groups have no nonzero one."""
        with self.context.clock.phase("reward"):
            self._score(groups)
            result = self._advantages(groups)
            sizes = [len(g.completions) for g in groups]
            check_advantages(groups, result.advantage.split(sizes))
            values = iter(result.advantage.tolist())
            for group in groups:
                for completion in group.completions:
                    completion.scalars["advantage"] = next(values)
            return result.constant.tolist()

    def _advantages(self, groups: Sequence[PromptGroup]) -> GroupAdvantage:
        """Advantages of all answers, concatenated, in float64."""
        options, answers = self.options, [c for g in groups for c in g.completions]
        sizes = torch.tensor([len(g.completions) for g in groups])
        owner = torch.repeat_interleave(torch.arange(len(groups)), sizes)
        leave_out = options.baseline != "mean"
        how = {
            "n_groups": len(groups),
            "baseline": "leave_one_out" if leave_out else "mean",
            "scale": "none" if options.baseline == "rloo" else options.scale,
            "unbiased": options.unbiased,
            "eps": options.eps,
        }
        rewards = torch.tensor([c.scalars["reward"] for c in answers], dtype=torch.float64)
        result = group_advantage(rewards, owner, **how)
        if options.normalise == "sum" or not answers:
            return result
        per_group = [self._component_weights(group) for group in groups]
        columns = dict.fromkeys(name for weights in per_group for name in weights)
        total, constant = torch.zeros_like(rewards), torch.ones(len(groups), dtype=torch.bool)
        for name in columns:
            of_group = [weights.get(name, 0.0) for weights in per_group]
            weight = torch.tensor(of_group, dtype=torch.float64)[owner]
            has = torch.tensor([name in c.rewards for c in answers]) & (weight != 0)
            column = torch.tensor([c.rewards.get(name, 0.0) for c in answers], dtype=torch.float64)
            each = group_advantage(column, torch.where(has, owner, -1), **how)
            total += torch.where(has, each.advantage, 0.0) * weight
            constant &= each.constant
        whole = group_advantage(total, len(answers), unbiased=options.unbiased, eps=options.eps).advantage
        return result._replace(advantage=torch.where(constant[owner], 0.0, whole), constant=constant)

    def _component_weights(self, group: PromptGroup) -> dict[str, float]:
        """The weight of each reward component of the group's answers."""
        assert group.record is not None
        weights = self._rewards.weights_of(group.record)
        return {name: weights.get(name, 1.0) for c in group.completions for name in c.rewards}

    def _add_overlong(self, group: PromptGroup) -> None:
        """Add DAPO's penalty for long answers to components and rewards if the recipe sets ``reward.overlong``."""
        assert group.record is not None
        section = self._rewards.section_of(group.record.origin)
        if section.overlong is None:
            return
        for completion in group.completions:
            length = len(completion.token_ids)
            penalty = overlong_penalty(length, self.context.rollout.max_new_tokens, section.overlong)
            completion.rewards = {**completion.rewards, "overlong": penalty}
            completion.scalars["reward"] += section.weights.get("overlong", 1.0) * penalty

    def _weigh(self, sampled: Sequence[PromptGroup], kept: Sequence[PromptGroup]) -> None:
        """Write token weights normalised over the whole step; groups that are not kept get weight 0."""
        options = self.options
        for group in sampled:
            for completion in group.completions:
                completion.per_token["weight"] = torch.zeros(len(completion.token_ids))
        length = None
        if options.aggregate == "constant":
            length = float(options.constant_length or self.context.rollout.max_new_tokens)
        set_token_weights(
            kept,
            aggregate=options.aggregate,
            live=(lambda group, i: group.completions[i].finished) if options.mask_truncated else None,
            length=length,
            average=self.context.average,
        )

    def _carries_gradient(self, group: PromptGroup) -> bool:
        return any(
            (self.options.beta > 0 or c.scalars["advantage"] != 0) and bool((c.per_token["weight"] != 0).any())
            for c in group.completions
        )


def overlong_penalty(length: int, most: int, cache: int) -> float:
    """DAPO's soft punishment of long answers (arXiv:2503.14476, eq. 13), in [-1, 0].

    Args:
        length: tokens of the answer.
        most: largest length; longer ones get -1.
        cache: tokens before ``most`` over which the penalty goes from 0 to -1; at least 1.
    """
    return -min(1.0, max(0.0, (length - (most - cache)) / cache))


def grpo_loss(
    logp: Tensor, entropy: Tensor | None, batch: PackedBatch, options: PerceptionR1Options
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO's loss of one micro-batch. Pure.

    Args:
        logp: [N] log-probs of the batch's predicted rows, with gradient.
        entropy: [N] or None, only for the metrics.
        batch: reads per_token ``weight``, ``old_logp`` (absent in the first update, which uses the detached ``logp``),
            ``ref_logp`` (needed if β > 0), per_completion ``advantage`` and ``completion_of_token``.
        options: the method's options.

    Returns:
        The loss (a scalar that sums over micro-batches to the step's) and metrics: ``kl``, ``clip/low``, ``clip/high``,
        ``ratio/mean``, ``ratio/max``, ``entropy``.
    """
    advantage, completion = batch.per_completion["advantage"], batch.completion_of_token
    result = policy_loss(logp, advantage, completion, **_loss_arguments(batch, options))
    metrics = _loss_metrics(result)
    if entropy is not None and entropy.numel():
        metrics["entropy"] = entropy.detach().mean()
    return result.loss, metrics


def _ratio_of(options: PerceptionR1Options) -> str:
    """Whose probabilities the ratio compares: each token's, or the whole answer's."""
    return "sequence" if options.loss in _OF_SEQUENCES else options.ratio


def _loss_arguments(batch: PackedBatch, options: PerceptionR1Options) -> dict[str, Any]:
    """Arguments of the policy loss, from the batch's coefficients and the method's options."""
    sampler = None
    if options.importance != "none":
        sampler = batch.per_token.get("sampler_logp")
        if sampler is None:
            raise ValueError(
                f"method.importance: {options.importance} needs the sampler's log-probs, which the batch does not have"
            )
    return {
        "loss": options.loss if options.loss in ("cispo", "sapo") else "clip",
        "ratio": _ratio_of(options),
        "importance": options.importance if sampler is not None else None,
        "sampler_logp": sampler,
        "old_logp": batch.per_token.get("old_logp"),
        "ref_logp": batch.per_token["ref_logp"] if options.beta > 0 else None,
        "weight": batch.per_token["weight"],
        **{
            name: getattr(options, name)
            for name in (
                *("clip_low", "clip_high", "dual_clip", "beta", "kl", "kl_gradient"),
                *("importance_level", "importance_cap", "tau_positive", "tau_negative"),
            )
        },
    }


def _loss_metrics(result: PolicyLoss | LinearPolicyLoss) -> dict[str, Tensor]:
    return {
        "kl": result.kl,
        "clip/low": result.clip_low_fraction,
        "clip/high": result.clip_high_fraction,
        "ratio/mean": result.ratio_mean,
        "ratio/max": result.ratio_max,
    }
