"""Supervised fine-tuning on the truth, the baseline that Perception-R1 calls SFT (arXiv:2504.07954, table 5).

    L = −Σ_i w_i Σ_k log π(y_ik | x_i, y_i<k),        y_i: the truth of record i as the model's family writes answers

over answer tokens only; nothing is sampled. (The authors' released baseline also trains on the prompt's tokens, which
is not reproduced.) Where a truth is a list of objects, every order of them is right; the loss knows one at a time.
``order: random`` shows another at each visit, ``truth`` always that of the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from fastrl.answers.write import format_answer, unwritable
from fastrl.batch import Completion, PackedBatch, PromptGroup
from fastrl.methods.base import Method, MethodOptions, Prepared, likelihood_loss, set_token_weights

if TYPE_CHECKING:
    from fastrl.data.records import Record

# task -> keys of its truth that have an entry for each object
LISTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"counting": ("boxes", "points"), "detection": ("boxes", "labels", "crowd"), "caption": ("references",)}
)


class SFTOptions(MethodOptions):
    """Keys of ``method:`` for supervised fine-tuning on the truth."""

    kind: Literal["sft-truth"] = "sft-truth"
    """Supervised fine-tuning on the truth."""
    aggregate: Literal["token", "sequence"] = "token"
    """Mean over all answer tokens of the step, or over an answer's tokens and then over answers."""
    order: Literal["truth", "random"] = "truth"
    """Order of the objects of counting and detection: that of the data, or a new random one at each visit; of several
    reference captions `random` learns one at a time, `truth` the first."""


class SFT(Method):
    """Next-token likelihood of the truth, for every task."""

    Options: ClassVar[type[MethodOptions]] = SFTOptions

    @classmethod
    def misfit(cls, options: SFTOptions, record: Record) -> str | None:
        """Why a record's truth has no answer text."""
        return None if _dialogue(record) else unwritable(record.task, record.target)

    def prepare(self, records: Sequence[Record]) -> Prepared:
        """One group per record with its truth as the only answer. Raises ``ValueError`` for a truth that the model's
        family has no answer for."""
        with self.context.clock.phase("preprocess"):
            groups = [self._group(record) for record in records]
        set_token_weights(groups, aggregate=self.options.aggregate, average=self.context.average)
        return Prepared(groups=groups, sampled=groups)

    def loss(self, logp: Tensor, entropy: Tensor | None, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch, and ``prob/answer``, the mean probability of its answer tokens. Pure."""
        loss = likelihood_loss(logp, batch.per_token["weight"])
        return loss, {"prob/answer": logp.detach().float().exp().mean()} if logp.numel() else {}

    def _group(self, record: Record) -> PromptGroup:
        prompt, seen = self.context.policy.encode(record)
        try:
            text = self._answer(seen)
        except ValueError as error:
            raise ValueError(f"{record.source or record.id}: {error}") from None
        return PromptGroup(prompt, [Completion(self.context.policy.encode_text(text), text=text)], seen)

    def _answer(self, record: Record) -> str:
        """The truth as the family writes it, in pixels as the model sees the first picture."""
        if _dialogue(record):
            return record.target["answer"]
        target = record.target
        if self.options.order == "random":
            target = in_random_order(record.task, target, self.context.rng)
        return format_answer(record.task, target, record.style, record.views[0] if record.views else None)


def in_random_order(task: str, target: Mapping[str, Any], rng: torch.Generator) -> Mapping[str, Any]:
    """A truth with its objects (or reference captions) in a random order; truths of other tasks are returned unchanged.

    All entries of an object move together. ``rng`` is advanced only where there are two objects or more.
    """
    lists = {key: target[key] for key in LISTS.get(task, ()) if target.get(key)}
    n = max(map(len, lists.values()), default=0)
    if n < 2:
        return target
    order = torch.randperm(n, generator=rng).tolist()
    return {**target, **{key: [values[i] for i in order] for key, values in lists.items()}}


def _dialogue(record: Record) -> bool:
    """Whether the record brings the text to learn (UTR's dialogues)."""
    return record.task == "trajectory" and isinstance(record.target.get("answer"), str)
