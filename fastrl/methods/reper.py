"""RePer (arXiv:2504.07165): reflective unlikelihood over policy/critic dialogues.

For turn t of a dialogue with answer y_t, score σ_t in [0, 1] and preceding dialogue o_t (eq. 2):

    L = −Σ_t Σ_k w_tk [ σ_t log π(y_tk | o_t, y_t<k) + α (1 − σ_t) log(1 − π(y_tk | o_t, y_t<k)) ]

One sum raises the probability of good answers and lowers that of bad ones; questions and feedback have no loss. α = 0
is likelihood weighted by the score, σ ≡ 1 supervised fine-tuning on every turn. The paper does not say whether π(y_t)
in the second term is a token's or the whole answer's probability. The latter is about 0 for all but the shortest
answers, and so is log(1 − π), so bad answers would not be pushed down. Tokens are the default; ``level: sequence`` is
the other reading.

There is no reference model and no KL term. The baselines of the paper's table 4 train on the same files: ``kind: sft``,
``dpo`` (the pair with the largest gap) and ``lipo`` read the candidates of each picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastrl.batch import PackedBatch, PromptGroup
from fastrl.data.reflection import SpokenTurn, dialogue_messages, dialogue_of
from fastrl.methods.base import Method, MethodOptions, Prepared
from fastrl_kernels.unlikelihood_loss import unlikelihood_loss

if TYPE_CHECKING:
    from fastrl.data.records import Record


class RePerOptions(MethodOptions):
    """Keys of ``method:`` for RePer. Defaults are the paper's if it states a value."""

    kind: Literal["reper"] = "reper"
    """The method; see RePer."""
    alpha: float = Field(10.0, ge=0)
    """Weight of the unlikelihood; `0`: likelihood weighted by the score."""
    sigma: Literal["score", "best", "one"] = "score"
    """Weight of a turn: its score in the file, divided by the dialogue's best, or 1 for all (supervised
    fine-tuning)."""
    level: Literal["token", "sequence", "mean"] = "token"
    """The probability π in log(1 − π): of a token, of a whole answer, or the geometric mean over its tokens."""
    aggregate: Literal["turn", "token", "sum"] = "turn"
    """Mean over a turn's tokens, then turns, then dialogues; mean over all answer tokens; or a sum divided by the
    number of dialogues (eq. 2 as written)."""
    turns: Literal["all", "last"] = "all"
    """Turns in the loss; `last`: earlier answers are only context."""


class RePer(Method):
    """Reflective unlikelihood on given dialogues."""

    Options: ClassVar[type[MethodOptions]] = RePerOptions

    def prepare(self, records: Sequence[Record]) -> Prepared:
        """One group per record: its question is the prompt, the rest of the dialogue the completion."""
        with self.context.clock.phase("preprocess"):
            groups = [self._group(record) for record in records]
        set_turn_weights(groups, self.options, average=self.context.average)
        turns = [turn for record in records for turn in dialogue_of(record)]
        metrics = {
            "dialogue/turns": len(turns) / max(1, len(groups)),
            "dialogue/score_first": _mean([dialogue_of(r)[0].score for r in records]),
            "dialogue/score_last": _mean([dialogue_of(r)[-1].score for r in records]),
        }
        return Prepared(groups=groups, sampled=groups, metrics=metrics)

    def rows(self, batch: PackedBatch) -> Tensor | None:
        """Answer tokens; the head's backward skips questions and feedback."""
        return batch.per_token["weight"].nonzero()[:, 0]

    def loss(self, logp: Tensor, entropy: Tensor | None, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch (see :func:`reflective_loss`)."""
        return reflective_loss(logp, batch, self.options)

    def _group(self, record: Record) -> PromptGroup:
        turns = dialogue_of(record)
        prompt, completion, seen = self.context.policy.encode_dialogue(
            replace(record, messages=dialogue_messages(record.messages, _without_last_feedback(turns)))
        )
        turn = completion.per_token["turn"]
        score = torch.tensor([1.0 if self.options.sigma == "one" else t.score for t in turns])
        if self.options.sigma == "best":
            score = score / score.max().clamp(min=1e-6)
        completion.per_token["sigma"] = torch.where(turn >= 0, score[turn.clamp(min=0)], 0.0)
        if self.options.turns == "last":
            completion.per_token["mask"] = (turn == len(turns) - 1).float()
        completion.scalars["reward"] = _mean([t.score for t in turns])
        return PromptGroup(prompt, [completion], seen)


def set_turn_weights(
    groups: Sequence[PromptGroup], options: RePerOptions, *, average: Callable[[float], float] = float
) -> None:
    """Write ``per_token["weight"]``, normalised over all dialogues of the step; 0 where ``mask`` is 0.

    Args:
        groups: dialogues with ``mask`` and ``turn`` per token.
        options: ``aggregate`` is read.
        average: mean over ranks (see ``fastrl.methods.base.set_token_weights``).
    """
    completions = [completion for group in groups for completion in group.completions]
    tokens = sum(float(c.per_token["mask"].sum()) for c in completions)
    count = average(tokens if options.aggregate == "token" else float(len(completions)))
    for completion in completions:
        mask, turn = completion.per_token["mask"], completion.per_token["turn"]
        live = turn[mask > 0].unique()
        weight = torch.zeros(len(mask))
        for number in live.tolist():
            own = (turn == number) & (mask > 0)
            fraction = 1.0 / (len(live) * int(own.sum())) if options.aggregate == "turn" else 1.0
            weight[own] = fraction / max(count, 1.0)
        completion.per_token["weight"] = weight


def reflective_loss(logp: Tensor, batch: PackedBatch, options: RePerOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one micro-batch of dialogues. Pure.

    Args:
        logp: [N] log-probs of the batch's predicted rows, with gradient.
        batch: reads per_token ``weight`` and ``sigma`` (and ``turn`` for metrics and sequence level).
        options: the method's options.

    Returns:
        The loss (a scalar that sums over micro-batches to the step's) and metrics: ``prob/high`` and ``prob/low``, mean
        probability of answer tokens with σ above and below one half.
    """
    weight, sigma = batch.per_token["weight"], batch.per_token["sigma"]
    if options.level != "token":
        index = _turn_index(batch, logp.device)
        count = int(index.max()) + 1 if index.numel() else 0
        live = torch.nn.functional.one_hot(index, count).to(logp.dtype) * (weight != 0)[:, None].to(logp.dtype)
        size = live.sum(0).clamp(min=1.0)
        answer, total = torch.where(weight != 0, logp, 0.0) @ live, weight.to(live.dtype) @ live
        # At either level, a turn's likelihood term has the sum of its tokens' weights
        logs, weights = (answer / size, total) if options.level == "mean" else (answer, total / size)
        loss = unlikelihood_loss(
            logs, (sigma.to(live.dtype) @ live / size).float(), alpha=options.alpha, weight=weights.float()
        )
    else:
        loss = unlikelihood_loss(logp, sigma, alpha=options.alpha, weight=weight)
    return loss, _metrics(logp.detach(), sigma, weight)


def _turn_index(batch: PackedBatch, device: torch.device) -> Tensor:
    """[N] index of each token's turn within the batch; tokens between turns get one index per dialogue."""
    turn = batch.per_token["turn"] + 1
    spread = int(turn.max()) + 1 if turn.numel() else 1
    return (batch.completion_of_token * spread + turn).to(device)


def _metrics(logp: Tensor, sigma: Tensor, weight: Tensor) -> dict[str, Tensor]:
    probability, live = logp.float().exp(), weight != 0
    found = {}
    for name, chosen in (("high", live & (sigma >= 0.5)), ("low", live & (sigma < 0.5))):
        total = chosen.sum()
        found[f"prob/{name}"] = torch.where(chosen, probability, 0.0).sum() / total.clamp(min=1)
    return found


def _without_last_feedback(turns: Sequence[SpokenTurn]) -> tuple[SpokenTurn, ...]:
    return (*turns[:-1], turns[-1]._replace(feedback=""))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
