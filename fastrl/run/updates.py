"""The optimizer updates of a step: groups → micro-batches → log-probs → loss → gradients → new weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrl.batch import Completion, PackedBatch, PromptGroup, pack, pack_row
from fastrl.engine.base import Engine, NonFiniteError, StepInfo
from fastrl.methods import Context, Method, Prepared
from fastrl.run.agreement import Agreement
from fastrl.run.metrics import Meter, sampler_gap

if TYPE_CHECKING:
    from fastrl.config.sections import OptimRecipe
    from fastrl.data.records import Record
    from fastrl.models.families import VisionFeatures


class TrainingError(RuntimeError):
    """Training stopped because continuing would damage the weights, which are those of the last good update."""


@dataclass
class MicroBatch:
    """A packed row and its groups."""

    packed: PackedBatch
    groups: list[PromptGroup] = field(default_factory=list)
    scale: float = 1.0  # 0: only keeps ranks in step


class Updates:
    """Makes the updates of a run's steps.

    Args:
        optim: the recipe's section.
        context: the policy, the clock, and what a step's passes share.
        engine: has the optimizer.
        method: has the loss.
    """

    def __init__(self, optim: OptimRecipe, context: Context, engine: Engine, method: Method) -> None:
        self.optim, self.context, self.engine, self.method = optim, context, engine, method
        self.policy, self.clock = context.policy, context.clock
        rollout, policy = context.rollout, context.policy
        self._agreement: Agreement | None = None  # with the servers that sample
        if rollout.backend == "vllm" and method.temperature == rollout.temperature:
            self._agreement = Agreement(rollout, tied=policy.ties_head, adapter=policy.peft is not None)

    def pack(self, prepared: Prepared, records: Sequence[Record]) -> list[MicroBatch]:
        """Pack groups into micro-batches, the same number on every rank; extra ones have weight 0. Frees the shared
        vision features that no pass reads any more."""
        groups = prepared.groups
        batches = [MicroBatch(b) for b in pack(groups, self.optim.token_budget)]
        offset = 0
        for batch in batches:
            batch.groups = groups[offset : offset + batch.packed.n_groups]
            offset += batch.packed.n_groups
        missing = int(self.engine.maximum(len(batches))) - len(batches)
        if missing:
            any_group = next(iter((*groups, *prepared.sampled)), None)
            prompt = any_group.prompt if any_group is not None else self.policy.encode(records[0])[0]
            nothing = Completion(torch.tensor([self.policy.end_of_turn_id]))  # any token, as its loss has weight 0
            filler = pack_row([PromptGroup(prompt, [nothing])])
            batches += [MicroBatch(filler, scale=0.0) for _ in range(missing)]
        self._drop_features(batches)
        return batches

    def _drop_features(self, batches: Sequence[MicroBatch]) -> None:
        """Keep only the shared vision features that later passes read: groups may have been dropped, or belong to later
        steps."""
        features = self.context.features
        if features:
            used = {image.key for batch in batches for image in batch.packed.images}
            for key in features.keys() - used:
                del features[key]

    def score_reference(self, batches: Sequence[MicroBatch]) -> None:
        """Log-probs under the reference, once per step (skipped if the method has set them)."""
        with self.policy.reference(), self.engine.gathered(self.policy.core):
            for batch in batches:
                if batch.scale and "ref_logp" not in batch.packed.per_token:
                    packed = batch.packed.to(self.policy.device)
                    features = self._vision(packed)
                    result = self.policy.logprob(packed, temperature=self.method.temperature, features=features)
                    batch.packed.per_token["ref_logp"] = result.logp

    def _vision(self, packed: PackedBatch) -> dict[str, VisionFeatures] | None:
        """Vision features shared by the step's passes, including the rollout; None: each pass computes its own."""
        features = self.context.features
        if features is None or not packed.images:
            return None
        missing = [image for image in packed.images if image.key not in features]
        if missing:
            with torch.no_grad(), self.clock.phase("vision"):
                features.update(self.policy.features(missing))
        return features

    def make(
        self, number: int, batches: Sequence[MicroBatch], meter: Meter, *, first: bool
    ) -> tuple[float, StepInfo | None]:
        """One optimizer update over all micro-batches; none if there is nothing to learn from."""
        if not batches:
            return 0.0, None
        keep_old = first and self.optim.updates_per_batch > 1
        kept = self.context.kept
        losses = []
        for index, batch in enumerate(batches):
            with self.clock.phase("forward"):
                packed = batch.packed.to(self.policy.device)
                loss, metrics, logp = self.engine.forward(partial(self._loss, batch, packed))
            if first and self._agreement is not None:
                self._compare(number, logp, packed, last=index == len(batches) - 1)
            try:
                with self.clock.phase("backward"):
                    last = kept is None and index == len(batches) - 1
                    self.engine.backward(loss * batch.scale, last=last)
            except NonFiniteError as error:
                raise TrainingError(_not_finite(str(error), number, [batch])) from None
            losses.append(loss.detach())
            if batch.scale:
                gap = sampler_gap(logp, packed) if first and logp is not None else {}
                meter.add(metrics | gap, len(packed.targets))
            # the weights have not changed since the rollout, so these are the old log-probs
            if keep_old and logp is not None:
                batch.packed.per_token["old_logp"] = logp.detach()
        rest = kept.rest() if kept is not None else None
        if rest is not None:
            with self.clock.phase("backward"):
                self.engine.backward(rest)
        total = torch.stack(losses).double().cpu()
        bad = [b for b, finite in zip(batches, total.isfinite().tolist(), strict=True) if not finite]
        if bad:
            raise TrainingError(_not_finite("the loss is not a finite number", number, bad))
        try:
            with self.clock.phase("optimizer"):
                info = self.engine.step()
        except NonFiniteError as error:
            raise TrainingError(_not_finite(str(error), number, batches, changed=self.optim.gradient_release)) from None
        return float((total * torch.tensor([b.scale for b in batches], dtype=torch.float64)).sum()), info

    def _compare(self, number: int, logp: Tensor | None, packed: PackedBatch, *, last: bool) -> None:
        """Compare the answers of servers with the trainer's log-probs. Called before each backward, the last of which
        may already update (optim.gradient_release): before that one, all ranks stop if a server has other weights."""
        assert self._agreement is not None
        if logp is not None:
            self._agreement.add(logp, packed)
        if last:
            fault = self._agreement.fault(self.engine.gather(self._agreement.take()))
            if fault:
                raise TrainingError(f"step {number}: {fault}")

    def _loss(self, batch: MicroBatch, packed: PackedBatch) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Loss, metrics and log-probs of a micro-batch (None if it only keeps ranks in step)."""
        features = self._vision(packed)
        if not batch.scale:  # it lacks the method's coefficients, so the method is not called
            return self.policy.logprob(packed, features=features).logp.sum(), {}, None
        rows = self.method.rows(batch.packed)  # from the batch on the host, without synchronising
        rows = rows.to(packed.device) if rows is not None else None
        kept = self.context.kept
        prompts = kept.of(group.prompt for group in batch.groups) if kept is not None else None
        if self.optim.row_local_head:
            hidden, weight = self.policy.hidden(packed, features=features, kept=prompts), self.policy.head_weight
            head = {"head_grad": self.engine.gradient_of(weight), "grad_scale": batch.scale}
            assert self.method.row_local_loss is not None  # checked by the recipe
            return self.method.row_local_loss(hidden, weight, packed, rows, **head)
        result = self.policy.logprob(
            packed,
            temperature=self.method.temperature,
            return_entropy=self.method.needs_entropy,
            rows=rows,
            features=features,
            kept=prompts,
        )
        loss, metrics = self.method.loss(result.logp, result.entropy, packed)
        return loss, metrics, result.logp


def _not_finite(what: str, step: int, batches: Sequence[MicroBatch], *, changed: bool = False) -> str:
    names = [g.record.id if g.record is not None else "?" for b in batches for g in b.groups]
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    weights = "The weights were changed: continue from the last checkpoint" if changed else "The weights are unchanged"
    return f"step {step}: {what}. {weights}. Records of the batch: {shown}"
