"""The layout of a packed row, and the index tables with which its attention is computed.

A row holds groups one after another, ``[prompt | completion | completion | …]``. A prompt's row attends causally to its
own prompt; a completion's row attends to its prompt and causally to its own completion. Tables are made once per layout
and serve all layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

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
    [T, P + T] bool: a step attends to the prompt and to its own completion up to itself.
    """

    rows: Tensor
    valid: Tensor
    target: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> CompletionBlock:
        return CompletionBlock(*(x.to(device) for x in (self.rows, self.valid, self.target, self.mask)))


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

    ``key_rows`` [K] int64: row of each gathered key, ``[prompt | prompt, c1 | prompt, c2 | …]`` for each group. Of
    answers alone (``AnswerRows``) they are rows of ``[prompt 0 | prompt 1 | … | answers]``, and no prompt is a segment.
    ``cu_q``, ``cu_k`` [S + 1] int32; every segment is causal, its queries aligned with its last keys. ``rows``: the
    number of queries. ``copies``: for the gather's backward, pairs (rows, places): the j-th copy of ``rows`` is at
    ``places`` of the gathered keys. No row occurs twice within a pair, so gradients are summed without atomics.
    """

    key_rows: Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    rows: int
    copies: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class PrefixLayout:
    """The groups of one packed row, in row order, and the device of its tables."""

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
        return sum(span.length for span in self.spans)

    @cached_property
    def dense(self) -> DenseTables:
        groups = tuple(
            DenseGroup(span, blocks_of(span.prompt, span.start + span.prompt, span.completions)) for span in self.spans
        )
        order = order_of([rows for group in groups for rows in group.rows], self.device)
        return DenseTables(tuple(group.to(self.device) for group in groups), order)

    @cached_property
    def varlen(self) -> VarlenTables:
        return varlen_tables(self._segments(), self.device)

    def _segments(self) -> Iterable[Segment]:
        for span in self.spans:
            yield span.prompt, ((span.start, span.prompt, 0),)
            at = span.start + span.prompt
            for copy, length in enumerate((n for n in span.completions if n), start=1):
                yield length, ((span.start, span.prompt, copy), (at, length, 0))
                at += length


# Queries of a segment, and its keys as runs (first row, number of rows, which copy of these rows it is)
Segment = tuple[int, tuple[tuple[int, int, int], ...]]


def order_of(parts: list[Tensor], device: torch.device) -> Tensor | None:
    """The order that sorts the rows of concatenated outputs, or None if they are ascending."""
    rows = torch.cat([torch.empty(0, dtype=torch.int64), *parts])
    return None if bool((rows[1:] > rows[:-1]).all()) else torch.argsort(rows).to(device)


def blocks_of(prompt: int, first: int, completions: Sequence[int]) -> tuple[CompletionBlock, ...]:
    """Blocks of the completions of a prompt of that many tokens, which begin at row ``first``."""
    starts = list(accumulate(completions, initial=first))
    members = [(s, n) for s, n in zip(starts, completions, strict=False) if n]
    return tuple(_block(prompt, [members[n] for n in some]) for some in similar([n for _, n in members]))


def similar(lengths: list[int]) -> list[list[int]]:
    """Indices of ``lengths`` in groups, split where one is shorter than half its group's longest: padding at most
    doubles the work."""
    order = sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))
    groups: list[list[int]] = []
    for n in order:
        if not groups or 2 * lengths[n] < lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(n)
    return [sorted(group) for group in groups]


def padded(members: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Rows [B, T] of segments (start, length), padded with their first row, and which are real [B, T]."""
    start = torch.tensor([s for s, _ in members])[:, None]
    length = torch.tensor([n for _, n in members])[:, None]
    step = torch.arange(int(length.max()))
    real = step < length
    return torch.where(real, start + step, start), real


def _block(prompt: int, members: list[tuple[int, int]]) -> CompletionBlock:
    rows, real = padded(members)
    valid = real.flatten().nonzero()[:, 0]
    step = torch.arange(rows.shape[1])[:, None]
    mask = torch.arange(prompt + len(step)) <= step + prompt
    return CompletionBlock(rows, valid, rows.flatten()[valid], mask)


def varlen_tables(segments: Iterable[Segment], device: torch.device) -> VarlenTables:
    q_lengths, k_lengths, key_rows = [], [], []
    copies: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
    place = 0
    for queries, runs in segments:
        q_lengths.append(queries)
        k_lengths.append(sum(count for _, count, _ in runs))
        for first, count, copy in runs:
            rows = torch.arange(first, first + count)
            key_rows.append(rows)
            to, at = copies.setdefault(copy, ([], []))
            to.append(rows)
            at.append(torch.arange(place, place + count))
            place += count
    cumulative = [
        torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
        for lengths in (q_lengths, k_lengths)
    ]
    return VarlenTables(
        key_rows=torch.cat(key_rows).to(device),
        cu_q=cumulative[0],
        cu_k=cumulative[1],
        max_q=max(q_lengths),
        max_k=max(k_lengths),
        rows=sum(q_lengths),
        copies=tuple((torch.cat(to).to(device), torch.cat(at).to(device)) for to, at in copies.values()),
    )
