"""UTR (Video-UTR, arXiv:2502.12081): next-token likelihood on dialogues about tracked clips.

The paper's "unhackable temporal rewarding" is in the data: questions about one frame or span, whose answer follows the
subject through all frames (``fastrl build utr``). The training released with it is ordinary supervised fine-tuning,

    L = −Σ_i w_i Σ_k log π(y_ik | frames, question, y_i<k),

over answer tokens only. In the paper, temporal perplexity (``fastrl tpl``, eq. 6) measures and filters data;
``min_tpl`` is that filter. Weighting answers by it in the loss (``weight: tpl``) is an addition of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from fastrl.batch import Completion, PackedBatch, PromptGroup
from fastrl.methods.base import Method, MethodOptions, Prepared, likelihood_loss, set_token_weights

if TYPE_CHECKING:
    from fastrl.data.records import Record


class UTROptions(MethodOptions):
    """Keys of ``method:`` for UTR."""

    kind: Literal["utr"] = "utr"
    """The method; see UTR."""
    aggregate: Literal["token", "sequence"] = "token"
    """Mean over all answer tokens of the step, or over an answer's tokens and then over answers."""
    weight: Literal["none", "tpl"] = "none"
    """`tpl`: weight answers by their temporal perplexity, with 0 for negative ones."""
    min_tpl: float | None = None
    """Exclude answers with a lower temporal perplexity from the loss: the paper's filter during training, whereas
    `fastrl tpl --keep-top` writes a smaller file."""


class UTR(Method):
    """Supervised fine-tuning on given dialogues, optionally filtered or weighted by temporal perplexity."""

    Options: ClassVar[type[MethodOptions]] = UTROptions

    def prepare(self, records: Sequence[Record]) -> Prepared:
        """One group per record, with frames and question as the prompt. Raises ``ValueError`` if a record lacks an
        answer or the temporal perplexity that the options need.
        """
        with self.context.clock.phase("preprocess"):
            groups = [self._group(record) for record in records]
        used = [group for group in groups if group.completions[0].scalars["relative_weight"] > 0]
        set_token_weights(used, aggregate=self.options.aggregate, average=self.context.average)
        self._weigh(used)
        metrics = {"dialogue/used": float(len(used))}
        measured = [record.target["tpl"] for record in records if "tpl" in record.target]
        if measured:
            metrics["dialogue/tpl"] = sum(measured) / len(measured)
        return Prepared(groups=used, sampled=groups, metrics=metrics)

    def loss(self, logp: Tensor, entropy: Tensor | None, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch, and ``prob/answer``, the mean probability of its answer tokens. Pure."""
        loss = likelihood_loss(logp, batch.per_token["weight"])
        return loss, {"prob/answer": logp.detach().float().exp().mean()} if logp.numel() else {}

    def _group(self, record: Record) -> PromptGroup:
        where = record.source or record.id
        answer, tpl = record.target.get("answer"), record.target.get("tpl")
        if not isinstance(answer, str) or not answer:
            raise ValueError(f"{where}: the record has no answer to learn; use --data utr:FILE or scenes:utr")
        if tpl is None and (self.options.weight == "tpl" or self.options.min_tpl is not None):
            raise ValueError(
                f"{where}: the record has no tpl, which method.weight: tpl and method.min_tpl need; measure it with "
                "fastrl tpl, or leave such rows out with min_tpl in the data's spec"
            )
        prompt, record = self.context.policy.encode(record)
        completion = Completion(self.context.policy.encode_text(answer), text=answer)
        completion.scalars["relative_weight"] = self._relative_weight(tpl)
        return PromptGroup(prompt, [completion], record)

    def _relative_weight(self, tpl: float | None) -> float:
        """The weight of an answer relative to the others; 0 if it gets no gradient."""
        if tpl is None:
            return 1.0
        if self.options.min_tpl is not None and tpl < self.options.min_tpl:
            return 0.0
        return max(0.0, tpl) if self.options.weight == "tpl" else 1.0

    def _weigh(self, groups: Sequence[PromptGroup]) -> None:
        """Scale token weights by the answers' relative weights, keeping the sum of the step at 1 (over all ranks)."""
        if self.options.weight == "none":
            return
        answers = [group.completions[0] for group in groups]
        total = sum(a.scalars["relative_weight"] * float(a.per_token["weight"].sum()) for a in answers)
        total = self.context.average(total)
        for answer in answers:
            answer.per_token["weight"] *= answer.scalars["relative_weight"] / total
