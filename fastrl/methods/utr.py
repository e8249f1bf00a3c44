"""UTR (Video-UTR, arXiv:2502.12081): next-token likelihood on dialogues about tracked clips.

The paper's "unhackable temporal rewarding" is in the data: questions about one frame or one span whose answer is the
subject through all frames (``fastrl build utr``). The training released with it is ordinary supervised fine-tuning,

    L = −Σ_i w_i Σ_k log π(y_ik | frames, question, y_i<k),

over answer tokens alone. Temporal perplexity (``fastrl tpl``, the paper's eq. 6) is there a measure and a filter of
data; ``min_tpl`` is that filter. Weighting answers by it (``weight: tpl``) is ours, as is any use of it in the loss.
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
    # token: mean over all answer tokens of the step; sequence: over an answer's tokens, then over answers
    aggregate: Literal["token", "sequence"] = "token"
    weight: Literal["none", "tpl"] = "none"  # tpl: answers count by their temporal perplexity (below 0: not at all)
    min_tpl: float | None = None  # answers below carry no gradient


class UTR(Method):
    """Supervised fine-tuning on ready-made dialogues, by temporal perplexity where asked."""

    Options: ClassVar[type[MethodOptions]] = UTROptions

    def prepare(self, records: Sequence[Record]) -> Prepared:
        """One group per record: frames and question, and its answer. Raises ``ValueError``: a record without what the
        options need.
        """
        with self.context.clock.phase("preprocess"):
            groups = [self._group(record) for record in records]
        used = [group for group in groups if group.completions[0].scalars["share"] > 0]
        set_token_weights(used, aggregate=self.options.aggregate, average=self.context.average)
        self._weigh(used)
        metrics = {"dialogue/used": float(len(used))}
        measured = [record.target["tpl"] for record in records if "tpl" in record.target]
        if measured:
            metrics["dialogue/tpl"] = sum(measured) / len(measured)
        return Prepared(groups=used, sampled=groups, metrics=metrics)

    def loss(self, logp: Tensor, entropy: Tensor | None, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch, and ``prob/answer``: the mean probability of its answer tokens. Pure."""
        loss = likelihood_loss(logp, batch.per_token["weight"])
        return loss, {"prob/answer": logp.detach().float().exp().mean()} if logp.numel() else {}

    def _group(self, record: Record) -> PromptGroup:
        where = record.source or record.id
        answer, tpl = record.target.get("answer"), record.target.get("tpl")
        if not isinstance(answer, str) or not answer:
            raise ValueError(f"{where}: a record without an answer to learn; use --data utr:FILE or scenes:utr")
        if tpl is None and (self.options.weight == "tpl" or self.options.min_tpl is not None):
            raise ValueError(
                f"{where}: no tpl, which method.weight: tpl and method.min_tpl need; measure it with fastrl tpl, or "
                "leave such rows out with min_tpl in the data's spec"
            )
        prompt, record = self.context.policy.encode(record)
        completion = Completion(self.context.policy.encode_text(answer), text=answer)
        completion.scalars["share"] = self._share(tpl)
        return PromptGroup(prompt, [completion], record)

    def _share(self, tpl: float | None) -> float:
        """How much an answer counts beside the others; 0: not at all."""
        if tpl is None:
            return 1.0
        if self.options.min_tpl is not None and tpl < self.options.min_tpl:
            return 0.0
        return max(0.0, tpl) if self.options.weight == "tpl" else 1.0

    def _weigh(self, groups: Sequence[PromptGroup]) -> None:
        """Scale the weights of answers by their shares so that those of the step still add up to 1 (over all ranks)."""
        if self.options.weight == "none":
            return
        answers = [group.completions[0] for group in groups]
        total = sum(a.scalars["share"] * float(a.per_token["weight"].sum()) for a in answers)
        total = self.context.average(total)
        for answer in answers:
            answer.per_token["weight"] *= answer.scalars["share"] / total
