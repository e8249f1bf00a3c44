"""``PromptGroup`` → ``PackedBatch``: the one batch format (design: a row of tokens, each prompt once, then its completions)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from fastrl.data.records import Record


@dataclass(frozen=True)
class ImageInput:
    """One preprocessed image."""

    pixel_values: Tensor  # [t*h*w, channels * temporal_patch * patch * patch] float32
    grid: tuple[int, int, int]  # (t, h, w) in patches
    key: str  # content key: images with one key go through the vision tower once per batch


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt: image placeholders expanded, positions explicit."""

    token_ids: Tensor  # [P] int64
    positions: Tensor  # [3, P] int64, multimodal RoPE (time, height, width)
    images: tuple[ImageInput, ...] = ()
    image_slots: tuple[tuple[int, int], ...] = ()  # (start, length) of each image's placeholder run in token_ids

    @property
    def next_position(self) -> int:
        """Position of the first completion token: 1 + the largest prompt position."""
        return int(self.positions.max()) + 1


@dataclass
class Completion:
    """One sampled or given answer, with everything a loss may need about it.

    ``per_token`` entries are [T] tensors (``old_logp``, ``ref_logp``, ``sigma``, ``mask``, …), ``scalars`` one number per
    completion (``advantage``, ``reward``, …); packing turns them into [N] and [C] tensors of the same names.
    """

    token_ids: Tensor  # [T] int64, with its EOS if it finished
    text: str = ""
    finished: bool = True  # False: cut at max_new_tokens
    sampler_logp: Tensor | None = None  # [T] float32, full vocabulary at the sampling temperature
    rewards: dict[str, float] = field(default_factory=dict)  # named components
    per_token: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass
class PromptGroup:
    """One prompt with its completions."""

    prompt: Prompt
    completions: list[Completion]
    record: Record | None = None
