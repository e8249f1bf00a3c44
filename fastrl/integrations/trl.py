"""TRL's ``GRPOTrainer`` with prompts computed once: head and loss of ``FusedGRPOMixin``, and the packed forward::

    from fastrl.integrations.trl import SharedPrefixGRPOMixin
    from trl import GRPOTrainer

    class Trainer(SharedPrefixGRPOMixin, GRPOTrainer):
        pass

TRL scores a micro-batch as padded rows, each with its own copy of prompt and pictures. Here the answers of a
micro-batch with the same prompt and pictures are one group of a packed row (``fastrl.batch``): the vision tower and the
prompt's layers run once for it. To bring them into the same micro-batch, the answers of one optimizer step are sorted
by prompt after TRL has shuffled them. Losses and weights equal those of TRL up to rounding; metrics that TRL logs as a
mean over micro-batches (entropy, KL, clip fractions) are taken over different micro-batches.

This works for the families of ``fastrl.models.families``. Pictures are shared for those that can tell the pictures of a
processor's batch apart (``Family.processed``: the Qwen-VL line, GLM-4V, LLaVA-1.5); other prompts with pictures, and an
MoE's router loss, use TRL's padded rows with the fused head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

from fastrl.batch import Completion, ImageInput, PackedBatch, Prompt, PromptGroup, pack_row
from fastrl.models.attention.prefix import use_prefix_attention
from fastrl.models.attention.switch import attention
from fastrl.models.families import Family, family_of
from fastrl.models.policy import packed_states
from fastrl_kernels.integrations._head import replace_forward
from fastrl_kernels.integrations.trl import FusedGRPOMixin, fuse_head, padded_states

_OF_EACH_BATCH = ("bnpo",)  # normalised within a micro-batch, so the loss depends on its composition
_OTHER_PICTURES = ("pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes", "image_position_ids")


class SharedPrefixGRPOMixin(FusedGRPOMixin):
    """Mixin to put before ``GRPOTrainer`` in a class's bases; same arguments and results.

    Raises:
        ValueError: fastrl does not support the model's family.
    """

    _buffered_inputs: Any
    _entropy_bonus_enabled: bool

    def _fuse(self, model: Any, *, return_entropy: bool) -> None:
        family = family_of(model.config)
        own = family.parts(model).language.config._attn_implementation
        fuse_head(
            model,
            temperature=self.temperature,
            float32=self.args.cast_lm_head_to_fp32,
            return_entropy=return_entropy,
            states=_states,
        )
        fused = model.forward
        use_prefix_attention(family, model)
        family.prepare(model)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("packed") is not None:
                return fused(*args, **kwargs)
            with attention(family, model, language=own):  # generation and padded rows use the model's own attention
                return fused(*args, **kwargs)

        replace_forward(model, forward)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)  # type: ignore[misc]
        buffered = self._buffered_inputs
        if not self.model.training or buffered is before or not self._may_sort():
            return inputs
        at = next(n for n, batch in enumerate(buffered) if batch is inputs)
        steps, window = len(buffered), self.args.gradient_accumulation_steps
        if window % steps == 0:
            window = steps
        if steps % window == 0:  # otherwise optimizer steps do not align with the buffer's parts
            parts = [sort_by_prompt(buffered[start : start + window]) for start in range(0, steps, window)]
            self._buffered_inputs = [batch for part in parts for batch in part]
        return self._buffered_inputs[at]

    def _may_sort(self) -> bool:
        """Whether the loss of an optimizer step is independent of the distribution of answers over micro-batches."""
        each = self.loss_type in _OF_EACH_BATCH or self.top_entropy_quantile < 1.0 or self._entropy_bonus_enabled
        return not each

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **pictures: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        family = family_of(self.accelerator.unwrap_model(model).config)
        rows = Rows.of(input_ids, attention_mask, logits_to_keep, pictures, family) if not compute_aux_loss else None
        if rows is None:
            return super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
                **pictures,
            )
        step = batch_size or len(input_ids)
        logps, entropies = [], []
        for start in range(0, len(input_ids), step):
            batch, places = rows.pack(range(start, min(start + step, len(input_ids))))
            with self.accelerator.autocast():
                out = model(packed=batch.to(input_ids.device), fused_lm_head=True)
            size, places = (min(step, len(input_ids) - start), logits_to_keep), places.to(input_ids.device)
            for wanted, values in ((logps, out.log_probs), (entropies, out.entropy if compute_entropy else None)):
                if values is not None:
                    spread = values.new_zeros(size[0] * size[1]).index_copy(0, places, values)
                    wanted.append(spread.view(size))
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None


def _states(core: Any, named: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Hidden states and labels of a packed batch, or of TRL's padded rows."""
    batch: PackedBatch | None = named.get("packed")
    if batch is None:
        return padded_states(core, named)
    hidden = packed_states(core, batch, fastrl_segments=batch.segments)
    return hidden[0].index_select(0, batch.predict_rows), batch.targets


class Rows:
    """A padded micro-batch from TRL, on the host: the prompt, pictures and answer of each row."""

    def __init__(
        self,
        prompts: list[Tensor],  # ids [P] of each row
        answers: list[Tensor],  # ids [T]
        images: list[list[ImageInput]],
        width: int,  # number of answer columns
        family: Family,
    ) -> None:
        self.prompts, self.answers, self.images, self.width, self.family = prompts, answers, images, width, family

    @classmethod
    def of(
        cls, input_ids: Tensor, attention_mask: Tensor, answer: int, pictures: dict[str, Any], family: Family
    ) -> Rows | None:
        """``answer``: number of answer columns, on the right. Returns None for unsupported pictures or masks."""
        if any(pictures.get(name) is not None for name in _OTHER_PICTURES):
            return None
        ids, mask = input_ids.cpu(), attention_mask.bool().cpu()
        lengths = mask[:, -answer:].sum(1)
        if not torch.equal(mask[:, -answer:], torch.arange(answer) < lengths[:, None]):
            return None  # an answer with a gap
        counts = pictures.get("num_images")
        if pictures.get("pixel_values") is None:
            images: list[list[ImageInput]] = [[] for _ in ids]
        else:
            named = family.processed(pictures)
            if named is None or counts is None:
                return None
            ends = torch.tensor([0, *counts]).cumsum(0).tolist()
            images = [named[start:end] for start, end in pairwise(ends)]
        prompts = [row[:-answer][kept] for row, kept in zip(ids, mask[:, :-answer], strict=True)]
        answers = [row[-answer:][:n] for row, n in zip(ids, lengths.tolist(), strict=True)]
        return cls(prompts, answers, images, answer, family)

    def pack(self, rows: Sequence[int]) -> tuple[PackedBatch, Tensor]:
        """These rows as a packed batch, and the flat indices [N] of its log-probs in [rows, answer columns]."""
        groups: list[list[int]] = []
        for row in rows:
            same = next((group for group in groups if self._same(group[0], row)), None)
            groups.append([row]) if same is None else same.append(row)
        packed = [
            PromptGroup(self._prompt(group[0]), [Completion(token_ids=self.answers[row]) for row in group])
            for group in groups
        ]
        order = [row for group in groups for row in group]
        places = [torch.arange(len(self.answers[row])) + (row - rows[0]) * self.width for row in order]
        return pack_row(packed), torch.cat(places)

    def _same(self, one: int, other: int) -> bool:
        """Whether two rows have bitwise the same prompt and pictures."""
        mine, theirs = self.images[one], self.images[other]
        return (
            torch.equal(self.prompts[one], self.prompts[other])
            and [image.shape for image in mine] == [image.shape for image in theirs]
            and all(torch.equal(a.pixel_values, b.pixel_values) for a, b in zip(mine, theirs, strict=True))
        )

    def _prompt(self, row: int) -> Prompt:
        """The row's prompt with its pictures laid out again, which must give TRL's ids."""
        ids, images = self.prompts[row], self.images[row]
        layout = self.family.lay_out(_collapsed(self.family, ids, images), images)
        if not torch.equal(layout.ids, ids):
            raise ValueError("the image tokens of a prompt do not match the pictures of its processor")
        return Prompt(layout.ids, layout.positions, tuple(images), layout.slots)


def _collapsed(family: Family, ids: Tensor, images: Sequence[ImageInput]) -> Tensor:
    """``ids`` with one placeholder in place of each picture's run."""
    pieces, at = [], 0
    for image in images:
        run = torch.tensor(family.expansion(image))
        first = int((run == family.image_token).nonzero()[0])  # markers may precede it
        found = (ids[at:] == family.image_token).nonzero()
        start = at + int(found[0]) - first if len(found) else len(ids)
        if start < at or not torch.equal(ids[start : start + len(run)], run):
            raise ValueError(f"a prompt has no run of tokens for a picture of shape {image.shape}")
        pieces += [ids[at:start], ids.new_tensor([family.image_token])]
        at = start + len(run)
    return torch.cat([*pieces, ids[at:]])


def sort_by_prompt(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Redistribute the rows of TRL's micro-batches over as many, with equal prompts together, otherwise in order."""
    parts: list[dict[str, Any]] = [split_pixel_values_by_grid(batch) for batch in batches]
    merged: dict[str, Any] = {}
    for name, first in parts[0].items():
        values = [part[name] for part in parts]
        if isinstance(first, Tensor) and first.ndim:
            merged[name] = torch.cat(values)
        elif isinstance(first, list):
            merged[name] = [item for value in values for item in value]
        else:
            merged[name] = first
    seen: dict[bytes, int] = {}
    keys = [seen.setdefault(row.numpy().tobytes(), len(seen)) for row in merged["prompt_ids"].cpu()]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    index = torch.tensor(order, device=merged["prompt_ids"].device)
    for name, value in merged.items():
        if isinstance(value, Tensor) and value.ndim:
            merged[name] = value.index_select(0, index.to(value.device))
        elif isinstance(value, list):
            merged[name] = [value[n] for n in order]
    made: list[dict[str, Any]] = split_tensor_dict(merged, len(batches))
    return [unsplit_pixel_values_by_grid(part) for part in made]
