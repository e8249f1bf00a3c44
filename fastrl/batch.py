"""``PromptGroup`` → ``PackedBatch``: one row of tokens with each prompt once, followed by its completions.

::

    group 0: [prompt | c1 | c2 | … | cG]   group 1: [prompt | c1 | …]   …

Losses get only the N predicted tokens: the first token of every completion is predicted by its prompt's last row, which
all completions of a group share, every other one by its predecessor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.segments import Segments, Span

if TYPE_CHECKING:
    from fastrl.data.records import Record


@dataclass(frozen=True)
class ImageInput:
    """One preprocessed image."""

    pixel_values: Tensor  # float32, one image's input for the family's vision tower
    shape: tuple[int, ...]  # the family's description of its size: patches (t, h, w), tiles, or original size
    key: str  # images with equal keys have the same features, and go through the vision tower once per batch
    original: Tensor | None = None  # [height, width, 3] uint8, if the picture cannot be restored from the pixels


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt: image placeholders expanded, positions explicit."""

    token_ids: Tensor  # [P] int64
    positions: Tensor  # [axes, P] int64: one axis, or three of multimodal RoPE (time, height, width)
    images: tuple[ImageInput, ...] = ()
    # (start, length) of each run of placeholders in token_ids, in order: the images' tokens fill them one after another
    image_slots: tuple[tuple[int, int], ...] = ()
    # The input of the chat template, without control tokens and with {"type": "image"} for images; sent to servers that
    # do not accept ids for prompts with images. Empty if the prompt was not encoded from a record.
    messages: tuple[Mapping[str, Any], ...] = ()

    @property
    def next_position(self) -> int:
        """Position of the first completion token: 1 + the largest prompt position."""
        return int(self.positions.max()) + 1


@dataclass
class Completion:
    """One sampled or given answer, with everything a loss may need about it.

    ``per_token`` entries are [T] tensors (``old_logp``, ``ref_logp``, ``sigma``, ``mask``, …), ``scalars`` one number
    per completion (``advantage``, ``reward``, …); packing turns them into [N] and [C] tensors of the same names.
    """

    token_ids: Tensor  # [T] int64, with its EOS if it finished
    text: str = ""
    finished: bool = True  # False: cut at max_new_tokens
    sampler_logp: Tensor | None = None  # [T] float32, full vocabulary at the sampling temperature
    sampler: str = ""  # address of the server that sampled it; empty: this process
    rewards: dict[str, float] = field(default_factory=dict)  # named components
    per_token: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass
class PromptGroup:
    """One prompt with its completions."""

    prompt: Prompt
    completions: list[Completion]
    record: Record | None = None

    @property
    def tokens(self) -> int:
        """Number of rows of this group in a batch."""
        return len(self.prompt.token_ids) + sum(len(c.token_ids) for c in self.completions)


@dataclass(frozen=True)
class PackedBatch:
    """Several groups as one row of L tokens, with C completions and N predicted tokens, in the order of the groups."""

    input_ids: Tensor  # [1, L] int64
    positions: Tensor  # [axes, 1, L] int64
    segments: Segments  # which rows attend to which
    images: tuple[ImageInput, ...]  # unique by key
    image_of_slot: tuple[int, ...]  # index into images of each picture of each prompt, in row order
    image_rows: Tensor  # [image tokens] int64, ascending: the rows of their tokens
    predict_rows: Tensor  # [N] int64: the row whose hidden state predicts each token
    targets: Tensor  # [N] int64
    completion_of_token: Tensor  # [N] int64
    group_of_completion: Tensor  # [C] int64, groups of this batch from 0
    per_token: dict[str, Tensor]  # [N] each
    per_completion: dict[str, Tensor]  # [C] float32 each
    completions: tuple[Completion, ...]  # the C completions, into which results are written

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    @property
    def n_groups(self) -> int:
        return len(self.segments.spans)

    def to(self, device: str | torch.device) -> PackedBatch:
        """The same batch on ``device``; pixels follow when the vision tower takes them."""
        device = torch.device(device)
        if self.device == device:
            return self
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in (
                "input_ids",
                "positions",
                "image_rows",
                "predict_rows",
                "targets",
                "completion_of_token",
                "group_of_completion",
            )
        }
        return replace(
            self,
            **moved,
            segments=self.segments.to(device),
            per_token={k: v.to(device, non_blocking=True) for k, v in self.per_token.items()},
            per_completion={k: v.to(device, non_blocking=True) for k, v in self.per_completion.items()},
        )

    def split(self, per_token: Tensor) -> list[Tensor]:
        """A tensor [N, …] as one [T, …] tensor per completion, in the order of ``completions``."""
        return list(per_token.split([len(c.token_ids) for c in self.completions]))


def pack(groups: Iterable[PromptGroup], token_budget: int) -> list[PackedBatch]:
    """Pack groups into batches of at most ``token_budget`` rows, in order.

    A group is never split; one larger than the budget becomes its own batch, so the budget bounds memory only if no
    group exceeds it. Groups without completions have nothing to predict and are left out.

    Raises:
        ValueError: the budget is less than 1, a prompt is empty, the completions of a batch do not all have the same
            per-token and scalar names, or per-token values have another length than their completion.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget: expected at least 1, got {token_budget}")
    batches: list[list[PromptGroup]] = []
    held = 0
    for group in groups:
        if not group.completions:
            continue
        if not batches or held + group.tokens > token_budget:
            batches.append([])
            held = 0
        batches[-1].append(group)
        held += group.tokens
    return [pack_row(batch) for batch in batches]


def pack_row(groups: Sequence[PromptGroup]) -> PackedBatch:
    """All ``groups`` as one batch of any size."""
    if not groups:
        raise ValueError("groups: a batch needs at least one group")
    spans, ids, positions, predict, starts = [], [], [], [], []
    at = 0
    for n, group in enumerate(groups):
        prompt = group.prompt
        if len(prompt.token_ids) == 0:
            raise ValueError(f"group {n} of the batch has an empty prompt: nothing predicts its first token")
        span = Span(at, len(prompt.token_ids), tuple(len(c.token_ids) for c in group.completions))
        spans.append(span)
        starts.append(at)
        ids.append(prompt.token_ids)
        positions.append(prompt.positions)
        last = at + span.prompt - 1
        at += span.prompt
        for completion in group.completions:
            length = len(completion.token_ids)
            ids.append(completion.token_ids)
            after = torch.arange(prompt.next_position, prompt.next_position + length)
            positions.append(after.expand(len(prompt.positions), length))
            predict.append(torch.tensor([last, *range(at, at + length - 1)] if length else [], dtype=torch.int64))
            at += length
    completions = tuple(c for group in groups for c in group.completions)
    lengths = torch.tensor([len(c.token_ids) for c in completions])
    return PackedBatch(
        input_ids=torch.cat(ids)[None],
        positions=torch.cat(positions, dim=1)[:, None],
        segments=Segments(tuple(spans)),
        **_images(groups, starts),
        predict_rows=torch.cat(predict),
        targets=torch.cat([c.token_ids for c in completions]),
        completion_of_token=torch.repeat_interleave(torch.arange(len(completions)), lengths),
        group_of_completion=torch.tensor([n for n, group in enumerate(groups) for _ in group.completions]),
        per_token=_per_token(completions),
        per_completion=_per_completion(completions),
        completions=completions,
    )


def _images(groups: Sequence[PromptGroup], starts: Sequence[int]) -> dict:
    index: dict[str, int] = {}
    images: list[ImageInput] = []
    of_slot: list[int] = []
    rows = [torch.empty(0, dtype=torch.int64)]
    for group, start in zip(groups, starts, strict=True):
        for image in group.prompt.images:
            if image.key not in index:
                index[image.key] = len(images)
                images.append(image)
            of_slot.append(index[image.key])
        rows += [torch.arange(start + slot, start + slot + length) for slot, length in group.prompt.image_slots]
    return {"images": tuple(images), "image_of_slot": tuple(of_slot), "image_rows": torch.cat(rows)}


def _per_token(completions: Sequence[Completion]) -> dict[str, Tensor]:
    out = {}
    for name in _shared_names(completions, lambda c: c.per_token, "per-token"):
        for n, completion in enumerate(completions):
            if len(completion.per_token[name]) != len(completion.token_ids):
                raise ValueError(
                    f"completion {n}: per-token {name!r} has {len(completion.per_token[name])} values "
                    f"for {len(completion.token_ids)} tokens"
                )
        out[name] = torch.cat([c.per_token[name] for c in completions])
    if all(c.sampler_logp is not None for c in completions):
        out.setdefault("sampler_logp", torch.cat([c.sampler_logp for c in completions if c.sampler_logp is not None]))
    return out


def _per_completion(completions: Sequence[Completion]) -> dict[str, Tensor]:
    names = _shared_names(completions, lambda c: c.scalars, "scalar")
    return {name: torch.tensor([c.scalars[name] for c in completions], dtype=torch.float32) for name in names}


def _shared_names(completions: Sequence[Completion], of: Callable[[Completion], dict], what: str) -> list[str]:
    """The names that all completions have; raises if only some have one."""
    names = sorted({name for c in completions for name in of(c)})
    for name in names:
        lacking = [n for n, c in enumerate(completions) if name not in of(c)]
        if lacking:
            raise ValueError(f"completion {lacking[0]} of the batch has no {what} value {name!r}, but others do")
    return names
