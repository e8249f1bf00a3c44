"""The layout of a packed row, and the index tables with which its attention is computed.

A row holds groups one after another, ``[prompt | completion | completion | …]``. A prompt's row attends causally to its
own prompt; a completion's row attends to its prompt and causally to its own completion. Tables are made once per layout
and serve all layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, count, pairwise
from typing import Protocol

import torch
from torch import Tensor

from fastrl_kernels._gather_rows import Copies

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Span:
    """One group in the row: ``[prompt | c1 | c2 | …]`` from row ``start``; completions of length 0 take no rows."""

    start: int
    prompt: int
    completions: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.prompt + sum(self.completions)


@dataclass(frozen=True)
class CompletionBlock:
    """Completions of one group with similar lengths, as one padded attention call.

    ``rows`` [B, T]: the row of each (completion, step); padding repeats a completion's own first row, to which no real
    row attends. ``valid`` [sum of lengths]: flat indices of the real rows in [B, T]; ``target``: their rows. ``mask``
    [T, P + T] bool: a step attends to the whole prompt and to its own completion up to itself. ``starts``: the first
    row of each completion.
    """

    rows: Tensor
    valid: Tensor
    target: Tensor
    mask: Tensor
    starts: tuple[int, ...]

    def to(self, device: torch.device) -> CompletionBlock:
        rows, valid, target, mask = (x.to(device) for x in (self.rows, self.valid, self.target, self.mask))
        return CompletionBlock(rows, valid, target, mask, self.starts)


@dataclass(frozen=True)
class DenseGroup:
    """One group's tables for scaled-dot-product attention: first the prompt, then blocks of its completions."""

    span: Span
    blocks: tuple[CompletionBlock, ...]

    @property
    def rows(self) -> list[Tensor]:
        """The rows of the outputs: the prompt's, then each block's."""
        prompt = torch.arange(self.span.start, self.span.start + self.span.prompt)
        return [prompt, *(block.target for block in self.blocks)]

    @property
    def starts(self) -> tuple[int, ...]:
        """The first row of each run of ``rows``."""
        return self.span.start, *starts_of(self.blocks)

    def to(self, device: torch.device) -> DenseGroup:
        return DenseGroup(self.span, tuple(block.to(device) for block in self.blocks))


@dataclass(frozen=True)
class DenseTables:
    """All groups, and ``order`` [L] that brings their concatenated outputs into row order (None: already in order)."""

    groups: tuple[DenseGroup, ...]
    order: Tensor | None


@dataclass(frozen=True)
class VarlenTables:
    """One variable-length call for the whole row: queries are the segments in row order, keys are gathered.

    ``keys``: the row of each of K gathered keys, ``[prompt | prompt, c1 | prompt, c2 | …]`` for each group. Of
    answers alone (``AnswerRows``) they are rows of ``[prompt 0 | prompt 1 | … | answers]``, and no prompt is a segment.
    ``cu_q``, ``cu_k`` [S + 1] int32; every segment is causal, its queries aligned with its last keys. ``rows``: the
    number of queries.
    """

    keys: Copies
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    rows: int


@dataclass(frozen=True)
class PrefixLayout:
    """The groups of one packed row, in row order, and the device of its tables, which are made once."""

    spans: tuple[Span, ...]
    device: torch.device = CPU

    def __post_init__(self) -> None:
        at = 0
        for span in self.spans:
            if span.start != at or span.prompt < 1 or min(span.completions, default=0) < 0:
                raise ValueError(f"segments: {span} does not follow row {at} with a prompt of at least one token")
            at += span.length

    @cached_property
    def length(self) -> int:
        return length_of(self.spans)

    @cached_property
    def dense(self) -> DenseTables:
        return dense_tables(self.spans, self.device)

    @cached_property
    def varlen(self) -> VarlenTables:
        return row_tables(self.spans, self.device)


def length_of(spans: Sequence[Span]) -> int:
    """Rows of the spans."""
    return sum(span.length for span in spans)


def dense_tables(spans: Sequence[Span], device: torch.device) -> DenseTables:
    """For scaled-dot-product attention of a row."""
    groups = [DenseGroup(span, blocks_of(span.prompt, span.start + span.prompt, span.completions)) for span in spans]
    order = order_of(starts_of(groups), [rows for group in groups for rows in group.rows], device)
    return DenseTables(tuple(group.to(device) for group in groups), order)


def row_tables(spans: Sequence[Span], device: torch.device) -> VarlenTables:
    """For one variable-length call for a row."""
    segments: list[Segment] = []
    for span in spans:
        prompt = span.start, span.prompt
        starts = accumulate(span.completions, initial=span.start + span.prompt)
        own = [run for run in zip(starts, span.completions, strict=False) if run[1]]
        segments += [(span.prompt, (prompt,)), *((run[1], (prompt, run)) for run in own)]
    return varlen_tables(segments, length_of(spans), device)


# Queries of a segment, and its keys as runs (first row, number of rows)
Segment = tuple[int, tuple[tuple[int, int], ...]]


class HasStarts(Protocol):
    """Rows in runs, each of which begins at one of ``starts``."""

    @property
    def starts(self) -> tuple[int, ...]: ...


def order_of(starts: Sequence[int], parts: Sequence[Tensor], device: torch.device) -> Tensor | None:
    """The order that sorts the rows of concatenated outputs, or None if they are ascending. ``starts``: the first row
    of each run of rows, in the order of ``parts``."""
    if all(a < b for a, b in pairwise(starts)):
        return None
    return torch.argsort(torch.cat(list(parts))).to(device)


def starts_of(parts: Iterable[HasStarts]) -> list[int]:
    """Of all parts, one after another."""
    return [start for part in parts for start in part.starts]


def blocks_of(prompt: int, first: int, completions: Sequence[int]) -> tuple[CompletionBlock, ...]:
    """Blocks of the completions of a prompt of ``prompt`` tokens, which begin at row ``first``."""
    starts = accumulate(completions, initial=first)
    members = [(s, n) for s, n in zip(starts, completions, strict=False) if n]
    return tuple(_block(prompt, [members[n] for n in some]) for some in similar([n for _, n in members]))


def similar(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of ``lengths`` in groups, split where one is shorter than half its group's longest: padding at most
    doubles the work."""
    order = sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))
    groups: list[list[int]] = []
    for n in order:
        if not groups or 2 * lengths[n] < lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(n)
    return [sorted(group) for group in groups]


def padded(members: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [B, T] of segments (start, length), padded with their first row; which are real [B, T]; and the flat indices
    of these."""
    width = max(n for _, n in members)
    start = torch.tensor([s for s, _ in members])[:, None]
    length = torch.tensor([n for _, n in members])[:, None]
    step = torch.arange(width)
    real = step < length
    valid = torch.cat([torch.arange(at, at + n) for at, (_, n) in zip(count(0, width), members, strict=False)])
    return torch.where(real, start + step, start), real, valid


def _block(prompt: int, members: list[tuple[int, int]]) -> CompletionBlock:
    rows, _, valid = padded(members)
    width = rows.shape[1]
    mask = torch.arange(prompt + width) <= torch.arange(prompt, prompt + width)[:, None]
    return CompletionBlock(rows, valid, rows.flatten()[valid], mask, tuple(start for start, _ in members))


def varlen_tables(segments: Iterable[Segment], rows: int, device: torch.device) -> VarlenTables:
    """Tables of segments whose keys are among ``rows`` rows."""
    q_lengths, k_lengths, key_rows = [], [], []
    for queries, runs in segments:
        q_lengths.append(queries)
        k_lengths.append(sum(count for _, count in runs))
        key_rows += [torch.arange(first, first + count) for first, count in runs]
    cumulative = [
        torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
        for lengths in (q_lengths, k_lengths)
    ]
    return VarlenTables(
        keys=Copies.of(torch.cat(key_rows), rows).to(device),
        cu_q=cumulative[0],
        cu_k=cumulative[1],
        max_q=max(q_lengths),
        max_k=max(k_lengths),
        rows=sum(q_lengths),
    )
