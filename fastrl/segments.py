"""The attention pattern of a packed row: spans of prompts and completions, and index tables made from them.

The tables are made once per batch and used by all layers. ``Segments`` is passed through the model's forward as the
keyword ``fastrl_segments``.
"""

from __future__ import annotations

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

    ``key_rows`` [K] int64: row of each gathered key, ``[prompt | prompt, c1 | prompt, c2 | …]`` for each group.
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
class Segments:
    """The groups of one packed row, in row order, and the device of its tables."""

    spans: tuple[Span, ...]
    device: torch.device = CPU

    def __post_init__(self) -> None:
        at = 0
        for span in self.spans:
            if span.start != at or span.prompt < 1 or min(span.completions, default=0) < 0:
                raise ValueError(f"segments: {span} does not follow row {at} with a prompt of at least one token")
            at += span.length

    @property
    def length(self) -> int:
        return sum(span.length for span in self.spans)

    def to(self, device: str | torch.device) -> Segments:
        return Segments(self.spans, torch.device(device))

    @cached_property
    def dense(self) -> DenseTables:
        groups = tuple(DenseGroup(span, _blocks(span)) for span in self.spans)
        rows = torch.cat([rows for group in groups for rows in group.rows])
        order = None if bool((rows[1:] > rows[:-1]).all()) else torch.argsort(rows).to(self.device)
        return DenseTables(tuple(group.to(self.device) for group in groups), order)

    @cached_property
    def varlen(self) -> VarlenTables:
        return _varlen(self.spans, self.device)


def _blocks(span: Span) -> tuple[CompletionBlock, ...]:
    """Blocks by length, split where a completion is shorter than half its block's longest: padding at most doubles the
    work."""
    starts = list(accumulate(span.completions, initial=span.start + span.prompt))
    order = sorted((n for n, length in enumerate(span.completions) if length), key=lambda n: (-span.completions[n], n))
    blocks: list[list[int]] = []
    for n in order:
        if not blocks or 2 * span.completions[n] < span.completions[blocks[-1][0]]:
            blocks.append([])
        blocks[-1].append(n)
    return tuple(_block(span, [(starts[n], span.completions[n]) for n in sorted(block)]) for block in blocks)


def _block(span: Span, members: list[tuple[int, int]]) -> CompletionBlock:
    start = torch.tensor([s for s, _ in members])[:, None]
    length = torch.tensor([n for _, n in members])[:, None]
    step = torch.arange(int(length.max()))
    real = step < length
    rows = torch.where(real, start + step, start)
    valid = real.flatten().nonzero()[:, 0]
    mask = torch.arange(span.prompt + len(step)) <= step[:, None] + span.prompt
    return CompletionBlock(rows, valid, rows.flatten()[valid], mask)


def _varlen(spans: tuple[Span, ...], device: torch.device) -> VarlenTables:
    q_lengths, k_lengths, key_rows = [], [], []
    copies: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def gather(first: int, count: int, copy: int) -> None:
        place = sum(len(rows) for rows in key_rows)
        rows = torch.arange(first, first + count)
        key_rows.append(rows)
        to, at = copies.setdefault(copy, ([], []))
        to.append(rows)
        at.append(torch.arange(place, place + count))

    for span in spans:
        q_lengths.append(span.prompt)
        k_lengths.append(span.prompt)
        gather(span.start, span.prompt, 0)
        at = span.start + span.prompt
        for copy, length in enumerate((n for n in span.completions if n), start=1):
            q_lengths.append(length)
            k_lengths.append(span.prompt + length)
            gather(span.start, span.prompt, copy)
            gather(at, length, 0)
            at += length
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
