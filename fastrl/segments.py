"""The attention pattern of a packed row: spans of prompts and completions, and index tables made from them.

The tables are made once per batch and used by all layers. ``Segments`` is passed through the model's forward as the
keyword ``fastrl_segments``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from fastrl_kernels._gather_rows import Copies
from fastrl_kernels._prefix_layout import (
    CPU,
    CompletionBlock,
    PrefixLayout,
    Segment,
    Span,
    VarlenTables,
    blocks_of,
    order_of,
    padded,
    similar,
    starts_of,
    varlen_tables,
)


@dataclass(frozen=True)
class Scan:
    """Segments of similar lengths that a recurrent layer reads side by side, padded on the right.

    ``rows`` [B, T]: the row of each (segment, step); padding repeats a segment's first row. ``real`` [B, T] bool: False
    where padded. ``length`` [B]. ``valid`` [sum of lengths]: flat indices of the real rows in [B, T]; ``target``: their
    rows. ``source`` [B]: for completions, the prompt in whose final state each starts, by its place among the prompts
    of all scans; with the tables of that gather's backward. ``starts``: the first row of each segment.
    """

    rows: Tensor
    real: Tensor
    length: Tensor
    valid: Tensor
    target: Tensor
    source: Copies
    starts: tuple[int, ...]

    def to(self, device: torch.device) -> Scan:
        tensors = (self.rows, self.real, self.length, self.valid, self.target)
        rows, real, length, valid, target = (x.to(device) for x in tensors)
        return Scan(rows, real, length, valid, target, self.source.to(device), self.starts)


@dataclass(frozen=True)
class ScanTables:
    """All prompts, then all completions, and ``order`` [L] that brings their concatenated outputs into row order (None:
    already in order)."""

    prompts: tuple[Scan, ...]
    completions: tuple[Scan, ...]
    order: Tensor | None


@dataclass(frozen=True)
class Segments(PrefixLayout):
    """The groups of one packed row, in row order, and the device of its tables."""

    def to(self, device: str | torch.device) -> Segments:
        return Segments(self.spans, torch.device(device))

    @cached_property
    def scans(self) -> ScanTables:
        prompts, completions = _scans(self.spans)
        both = (*prompts, *completions)
        order = order_of(starts_of(both), [scan.target for scan in both], self.device)
        first, then = (tuple(scan.to(self.device) for scan in scans) for scans in (prompts, completions))
        return ScanTables(first, then, order)

    @cached_property
    def answers(self) -> AnswerRows:
        """The completions as a row of their own, for prompts whose keys were computed before."""
        return AnswerRows(self.spans, self.device)


@dataclass(frozen=True)
class AnswerRows:
    """The completions of a packed row as a row of their own, ``[c1 | c2 | …]`` group after group, without their
    prompts and without each completion's last token, which predicts nothing and to which nothing attends.

    ``spans``: those of the packed row.
    """

    spans: tuple[Span, ...]
    device: torch.device = CPU

    @cached_property
    def lengths(self) -> tuple[tuple[int, ...], ...]:
        """Rows of each completion of each group."""
        return tuple(tuple(max(n - 1, 0) for n in span.completions) for span in self.spans)

    @cached_property
    def length(self) -> int:
        return sum(map(sum, self.lengths))

    @cached_property
    def rows(self) -> Tensor:
        """[length] int64: the packed row's index of each row."""
        found = [torch.empty(0, dtype=torch.int64)]
        for span in self.spans:
            starts = accumulate(span.completions, initial=span.start + span.prompt)
            found += [torch.arange(s, s + n - 1) for s, n in zip(starts, span.completions, strict=False) if n]
        return torch.cat(found).to(self.device)

    @cached_property
    def predict(self) -> Tensor:
        """[N] int64: what predicts each token of the completions, as an index into [last state of each prompt | rows]:
        its prompt for a completion's first token, its predecessor for the others."""
        found, at = [torch.empty(0, dtype=torch.int64)], len(self.spans)
        for group, span in enumerate(self.spans):
            for length in span.completions:
                if length:
                    found += [torch.tensor([group]), torch.arange(at, at + length - 1)]
                    at += length - 1
        return torch.cat(found).to(self.device)

    @cached_property
    def dense(self) -> tuple[tuple[tuple[CompletionBlock, ...], ...], Tensor | None]:
        """Each group's blocks, and the order [length] that brings their concatenated outputs into row order (None: they
        are)."""
        firsts = accumulate(map(sum, self.lengths), initial=0)
        groups = [
            blocks_of(span.prompt, first, lengths)
            for span, first, lengths in zip(self.spans, firsts, self.lengths, strict=False)
        ]
        every = [block for blocks in groups for block in blocks]
        order = order_of(starts_of(every), [block.target for block in every], self.device)
        return tuple(tuple(block.to(self.device) for block in blocks) for blocks in groups), order

    @cached_property
    def varlen(self) -> VarlenTables:
        return varlen_tables(self._segments(), sum(span.prompt for span in self.spans) + self.length, self.device)

    def _segments(self) -> Iterable[Segment]:
        starts = list(accumulate((span.prompt for span in self.spans), initial=0))
        at = starts[-1]
        for span, start, lengths in zip(self.spans, starts, self.lengths, strict=False):
            for length in lengths:
                if length:
                    yield length, ((start, span.prompt), (at, length))
                    at += length


def _scans(spans: tuple[Span, ...]) -> tuple[list[Scan], list[Scan]]:
    by_length = similar([span.prompt for span in spans])
    place = {n: at for at, n in enumerate(n for group in by_length for n in group)}
    prompts = [_scan([(spans[n].start, spans[n].prompt) for n in group], [], 0) for group in by_length]
    members = []
    for n, span in enumerate(spans):
        starts = accumulate(span.completions, initial=span.start + span.prompt)
        members += [(s, length, place[n]) for s, length in zip(starts, span.completions, strict=False) if length]
    completions = [
        _scan([members[n][:2] for n in group], [members[n][2] for n in group], len(spans))
        for group in similar([length for _, length, _ in members])
    ]
    return prompts, completions


def _scan(members: list[tuple[int, int]], sources: list[int], prompts: int) -> Scan:
    rows, real, valid = padded(members)
    source = Copies.of(torch.tensor(sources, dtype=torch.int64), prompts)
    return Scan(rows, real, real.sum(1), valid, rows.flatten()[valid], source, tuple(start for start, _ in members))
