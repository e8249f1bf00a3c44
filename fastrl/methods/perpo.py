"""PerPO (arXiv:2502.04371): listwise preference over ranked answers, with reward gaps as margins; and its baselines.

A list is one prompt with answers y_i and rewards R_i, one prefix-shared group. With the frozen reference,

    s_i = log π(y_i|x) − log π_ref(y_i|x)                            summed over the answer's tokens
    perpo    L = Σ_{R_i > R_j} w_ij · log(1 + exp(−β (s_i − s_j))),  w_ij = |R_i − R_j|^γ / Σ |R_a − R_b|^γ
    lipo     γ = 0: all pairs weigh the same                         listmle: likelihood of the order (no pairs)
    dpo      the best answer against the worst: −log σ(β (s_b − s_w))    sft: −log π of the best, per token

and the step's loss is the mean over its lists (sft: over its tokens). Lists without two different rewards have no
order: they are skipped and counted. Each list is trained with its own rewards; the authors' released loader uses those
of one fixed item for all lists, which is not reproduced here.

Lists come from the data (``--data lists:FILE``). For records without a list training is online: every ``online_every``
steps, answers to the prompts of the next steps are sampled from the current policy (``rollout.group_size`` each) and
ranked by the task's reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastrl.batch import Completion, PackedBatch, PromptGroup
from fastrl.data.lists import ranked_list
from fastrl.methods.base import Context, Method, MethodOptions, Prepared, likelihood_loss, set_token_weights
from fastrl.methods.ranking import Unreadable, rank, worst_reward
from fastrl.methods.rollouts import RecipeRewards, sample_groups
from fastrl_kernels.listwise_loss import listwise_loss

if TYPE_CHECKING:
    from fastrl.data.records import Record


class PerPOOptions(MethodOptions):
    """Keys of ``method:`` for PerPO and its baselines. Defaults are those of the released scripts."""

    kind: Literal["perpo", "lipo", "listmle", "dpo", "sft"] = "perpo"
    """The method or one of its baselines."""
    beta: float = Field(0.1, gt=0)
    """Scale of the log-ratios; ignored by `sft`."""
    gamma: float = Field(0.5, ge=0)
    """Exponent of the reward gaps that weight pairs; only for `perpo`."""
    score: Literal["sum", "mean"] = "sum"
    """An answer's log-ratio: the sum over its tokens, or their mean (the authors' "norm" variant)."""
    min_gap: float = Field(0.0, ge=0)
    """Skip lists whose best and worst rewards differ by less."""
    unreadable: Unreadable = "drop"
    """Answers that cannot be parsed, where rewards are computed here: `drop` them, or keep them as the `worst` of their
    list, 1 below its lowest reward and 0. Truncated answers are always dropped."""
    online_every: int = Field(1, ge=1)
    """For data without lists: number of steps for which lists are sampled at once, so that they are at most that many −
    1 updates old."""


class PerPO(Method):
    """Preference learning from ranked lists."""

    Options: ClassVar[type[MethodOptions]] = PerPOOptions
    samples = True
    temperature = 1.0  # independent of the temperature at which lists were sampled

    def __init__(self, options: PerPOOptions, context: Context) -> None:
        super().__init__(options, context)
        # The paper's reward is the overlap only, without a format component.
        self._rewards = RecipeRewards(context.reward, context.rewards, without_format=True, functions=context.functions)
        self._lists: dict[str, list[Completion]] = {}  # online: ranked answers by record id
        self._steps_left = 0  # steps before the lists are sampled again

    @classmethod
    def reads_reference(cls, options: PerPOOptions) -> bool:
        """True except for supervised fine-tuning."""
        return options.kind != "sft"

    @classmethod
    def steps_at_once(cls, options: PerPOOptions) -> int:
        """``online_every``."""
        return options.online_every

    @classmethod
    def answers_used(cls, options: PerPOOptions, given: int) -> int:
        """dpo: 2 (best and worst); sft: 1 (best); else the whole list."""
        return min(given, {"dpo": 2, "sft": 1}.get(options.kind, given))

    def prepare(self, records: Sequence[Record]) -> Prepared:
        """One group per record with its ranked answers; groups without different rewards are only counted."""
        metrics: dict[str, float] = {}
        given = [ranked_list(record) is not None for record in records]
        if any(given) and not all(given):
            first, second = (records[given.index(which)] for which in (True, False))
            raise ValueError(
                f"{first.source or first.id} has ranked answers and {second.source or second.id} has none: either all "
                "records of the data must have them, or none"
            )
        if all(given):
            with self.context.clock.phase("preprocess"):
                groups = [self._given_group(record) for record in records]
            self._recompute([g for g in groups if any("reward" not in c.scalars for c in g.completions)])
        else:
            groups, metrics = self._online_groups(records)
        chosen = [self._choose(group) for group in groups]
        used = [group for group in chosen if group is not None]
        self._weigh(groups, used)
        answered = [group for group in groups if group.completions]
        return Prepared(groups=used, sampled=answered, metrics=metrics | self._counts(groups, chosen))

    def loss(self, logp: Tensor, entropy: Tensor | None, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch (see :func:`preference_loss`)."""
        return preference_loss(logp, batch, self.options)

    def state(self) -> dict[str, Any]:
        """For checkpoints: the lists that the next steps will use."""
        lists = {
            name: [[c.token_ids.tolist(), c.text, c.scalars["reward"], c.rewards] for c in answers]
            for name, answers in self._lists.items()
        }
        return {"steps_left": self._steps_left, "lists": lists if self._steps_left else {}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state`."""
        self._steps_left = state["steps_left"]
        self._lists = {
            name: [_completion(torch.tensor(ids, dtype=torch.int64), *rest) for ids, *rest in answers]
            for name, answers in state["lists"].items()
        }

    def _given_group(self, record: Record) -> PromptGroup:
        """A record's own list, every answer with its end of turn."""
        prompt, record = self.context.policy.encode(record)
        found = ranked_list(record)
        assert found is not None
        answers, rewards, resized = found
        seen = tuple((view.resized_width, view.resized_height) for view in record.views)
        if resized is not None and seen != resized:
            raise ValueError(
                f"{record.source or record.id}: the answers refer to images of {_sizes(resized)} pixels, this model "
                f"sees {_sizes(seen)}; set model.min_pixels and model.max_pixels as they were when the list was built"
            )
        completions = [Completion(self.context.policy.encode_text(text), text=text) for text in answers]
        for completion, reward in zip(completions, rewards or (), strict=rewards is not None):
            completion.scalars["reward"] = reward
        return PromptGroup(prompt, completions, record)

    def _recompute(self, groups: Sequence[PromptGroup]) -> None:
        """Compute rewards for lists without them, from each record's target."""
        places = [(group, i) for group in groups for i in range(len(group.completions))]
        with self.context.clock.phase("reward"):
            for (group, i), found in zip(places, self._rewards.scores(places), strict=True):
                completion = group.completions[i]
                completion.rewards, completion.scalars["reward"] = found.components, found.total
            if self.options.unreadable == "worst":
                for group in groups:
                    self._lower_unreadable(group)

    def _lower_unreadable(self, group: PromptGroup) -> None:
        """Put the unreadable answers of a given list below all others."""
        readable = self._rewards.readable(group)
        pairs = list(zip(group.completions, readable, strict=True))
        below = worst_reward([completion.scalars["reward"] for completion, parsed in pairs if parsed])
        for completion, parsed in pairs:
            if not parsed:
                completion.rewards, completion.scalars["reward"] = {}, below

    def _online_groups(self, records: Sequence[Record]) -> tuple[list[PromptGroup], dict[str, float]]:
        """This step's lists; every ``online_every`` steps, those of the next steps are sampled at once."""
        every = self.options.online_every
        metrics: dict[str, float] = {}
        if self._steps_left == 0 or any(record.id not in self._lists for record in records):
            metrics = self._sample([*records, *self.context.stream.peek((every - 1) * len(records))])
            self._steps_left = every
        self._steps_left -= 1
        with self.context.clock.phase("preprocess"):
            encoded = [self.context.policy.encode(record) for record in records]
        # Copied because a record may occur twice in a step, and completions carry the step's weights.
        groups = [PromptGroup(prompt, [_copy(c) for c in self._lists[record.id]], record) for prompt, record in encoded]
        return groups, metrics

    def _sample(self, records: Sequence[Record]) -> dict[str, float]:
        """Sample and rank lists for ``records`` from the current policy."""
        context = self.context
        unique = list({record.id: record for record in records}.values())
        self._rewards.check(unique, context.policy.encode)
        groups = sample_groups(context, unique)
        self._lists = {}
        left, total = 0, sum(len(g.completions) for g in groups)
        with context.clock.phase("reward"):
            rankings = rank(groups, self._rewards.readable, self._rewards.scores, self.options.unreadable)
            for group, ranking in zip(groups, rankings, strict=True):
                assert group.record is not None
                left += len(ranking.order)
                self._lists[group.record.id] = [
                    _completion(group.completions[i].token_ids, group.completions[i].text, value, parts)
                    for i, value, parts in zip(ranking.order, ranking.rewards, ranking.components, strict=True)
                ]
        return {"lists/resampled": float(len(unique)), "lists/answers_kept": left / max(1, total)}

    def _choose(self, group: PromptGroup) -> PromptGroup | None:
        """The group with the completions that this kind of loss uses; None if it is skipped."""
        rewards = [c.scalars["reward"] for c in group.completions]
        gap = max(rewards) - min(rewards) if rewards else 0.0
        if gap <= 0 or gap < self.options.min_gap:
            return None
        best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
        chosen = {"dpo": [best, worst], "sft": [best]}.get(self.options.kind)
        return group if chosen is None else replace(group, completions=[group.completions[i] for i in chosen])

    def _weigh(self, groups: Sequence[PromptGroup], used: Sequence[PromptGroup]) -> None:
        """Write weights normalised over all lists of the step; unused answers get weight 0."""
        completions = [completion for group in groups for completion in group.completions]
        if self.options.kind == "sft":
            for completion in completions:
                completion.per_token["weight"] = torch.zeros(len(completion.token_ids))
            set_token_weights(used, aggregate="token", average=self.context.average)
            return
        count = self.context.average(float(len(used)))
        for completion in completions:
            completion.scalars["list_weight"] = 0.0
        for group in used:
            for completion in group.completions:
                completion.scalars["list_weight"] = 1.0 / count

    def _counts(self, groups: Sequence[PromptGroup], chosen: Sequence[PromptGroup | None]) -> dict[str, float]:
        """Number of lists used, and of lists skipped for each reason."""
        single = sum(len(g.completions) < 2 for g in groups)
        rewards = [[c.scalars["reward"] for c in g.completions] for g in groups if len(g.completions) > 1]
        equal = sum(max(values) == min(values) for values in rewards)
        used = sum(group is not None for group in chosen)
        counts = {"used": used, "single": single, "equal": equal, "small_gap": len(groups) - used - single - equal}
        return {f"lists/{name}": float(value) for name, value in counts.items()}


def preference_loss(logp: Tensor, batch: PackedBatch, options: PerPOOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one micro-batch of lists. Pure.

    Args:
        logp: [N] log-probs of the batch's predicted rows, with gradient.
        batch: reads per_token ``ref_logp`` and per_completion ``reward`` and ``list_weight`` (1 ÷ number of lists in
            the step, the same for all answers of a list); for sft, only per_token ``weight``.
        options: the method's options.

    Returns:
        The loss (a scalar that sums over micro-batches to the step's) and metrics, means over the lists:
        ``list/margin`` (score of the best answer minus that of the worst), ``list/accuracy`` (how often the margin is
        positive), ``list/best`` and ``list/worst`` (the two scores: both may fall while the margin grows).
    """
    if options.kind == "sft":
        loss = likelihood_loss(logp, batch.per_token["weight"])
        return loss, {"list/best": logp.detach().mean()} if logp.numel() else {}
    ratio = logp - batch.per_token["ref_logp"]
    lengths = [len(c.token_ids) for c in batch.completions]
    score = _padded_rows(ratio, lengths).sum(1)
    if options.score == "mean":
        score = score / torch.tensor([max(1, n) for n in lengths], device=score.device)
    sizes = [len(span.completions) for span in batch.segments.spans]
    mask = _padded_rows(torch.ones_like(score), sizes) != 0
    scores, rewards = _padded_rows(score, sizes), _padded_rows(batch.per_completion["reward"], sizes)
    losses = listwise_loss(
        scores,
        rewards,
        mask=mask,
        kind="listmle" if options.kind == "listmle" else "perpo",
        beta=options.beta,
        gamma=options.gamma if options.kind == "perpo" else 0.0,
    )
    weight = _padded_rows(batch.per_completion["list_weight"], sizes)[:, 0]
    return (weight * losses).sum(), _list_metrics(scores.detach(), rewards, mask)


def _list_metrics(score: Tensor, reward: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Metrics from the scores of the best and the worst answer of each list; inputs are [B, K]."""
    best = reward.masked_fill(~mask, -torch.inf).argmax(1, keepdim=True)
    worst = reward.masked_fill(~mask, torch.inf).argmin(1, keepdim=True)
    high, low = score.gather(1, best), score.gather(1, worst)
    margin = high - low
    metrics = {"margin": margin, "accuracy": (margin > 0).float(), "best": high, "worst": low}
    return {f"list/{name}": value.mean() for name, value in metrics.items()}


def _padded_rows(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Consecutive runs of ``values`` as rows [len(sizes), longest], zero-padded on the right.

    Uses an index copy, whose gradient is a gather and so deterministic on a GPU; that of an index add is not.
    """
    longest = max([1, *sizes])
    places = torch.cat([torch.arange(size) + row * longest for row, size in enumerate(sizes)])
    rows = values.new_zeros(len(sizes) * longest).index_copy(0, places.to(values.device), values)
    return rows.view(len(sizes), longest)


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{width}x{height}" for width, height in sizes)


def _completion(token_ids: Tensor, text: str, reward: float, parts: dict[str, float]) -> Completion:
    return Completion(token_ids, text=text, rewards=parts, scalars={"reward": reward})


def _copy(completion: Completion) -> Completion:
    return replace(completion, per_token={}, scalars=dict(completion.scalars))
