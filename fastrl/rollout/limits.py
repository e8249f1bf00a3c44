"""How a generator splits its work: what goes through the vision tower, is prefilled and decodes at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes that bound a generator's memory. ``fastrl plan`` asks the same functions as the generator.

    Attributes:
        max_rows: completions that decode at once (those of one prompt at least).
        prefill_tokens: tokens, padding included, in one forward over prompts (one prompt at least).
        vision_patches: patches in one call of the vision tower (one image at least).
    """

    max_rows: int = 1024
    prefill_tokens: int = 16384
    vision_patches: int = 65536

    def __post_init__(self) -> None:
        for name in ("max_rows", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")

    def chunks(self, lengths: Sequence[int], rows: int) -> list[list[int]]:
        """Prompts that are answered together, ``rows`` completions each: indices, those of similar length together."""
        size = max(1, self.max_rows // rows)
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        return [order[i : i + size] for i in range(0, len(order), size)]

    def prefill_calls(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Texts of a chunk that are prefilled together: indices grouped by similar length."""
        call: list[int] = []
        for i in sorted(range(len(lengths)), key=lengths.__getitem__):
            if call and (len(call) + 1) * lengths[i] > self.prefill_tokens:
                yield call
                call = []
            call.append(i)
        if call:
            yield call

    def vision_calls(self, patches: Sequence[int]) -> Iterator[list[int]]:
        """Images of a chunk that go through the vision tower together: indices in order."""
        call: list[int] = []
        total = 0
        for i, size in enumerate(patches):
            if call and total + size > self.vision_patches:
                yield call
                call, total = [], 0
            call.append(i)
            total += size
        if call:
            yield call
