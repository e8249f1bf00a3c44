"""The attention pattern of a packed row: spans of prompts and completions, and index tables made from them.

The tables are made once per batch and used by all layers. ``Segments`` is passed through the model's forward as the
keyword ``fastrl_segments``.
"""

from __future__ import annotations

from collections import Counter
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
class Scan:
    """Segments of similar lengths that a recurrent layer reads side by side, padded on the right.

    ``rows`` [B, T]: the row of each (segment, step); padding repeats a segment's first row. ``real`` [B, T] bool: False
    where padded. ``length`` [B]. ``valid`` [sum of lengths]: flat indices of the real rows in [B, T]; ``target``: their
    rows. ``source`` [B]: for completions, the prompt in whose final state each starts, by its place among the prompts
    of all scans. ``copies``: for the backward of that gather, pairs (prompts, places): the j-th copy of ``prompts`` is
    at ``places`` of ``source``. No prompt occurs twice within a pair.
    """

    rows: Tensor
    real: Tensor
    length: Tensor
    valid: Tensor
    target: Tensor
    source: Tensor
    copies: tuple[tuple[Tensor, Tensor], ...] = ()

    def to(self, device: torch.device) -> Scan:
        tensors = (self.rows, self.real, self.length, self.valid, self.target, self.source)
        rows, real, length, valid, target, source = (x.to(device) for x in tensors)
        copies = tuple((to.to(device), at.to(device)) for to, at in self.copies)
        return Scan(rows, real, length, valid, target, source, copies)


@dataclass(frozen=True)
class ScanTables:
    """All prompts, then all completions, and ``order`` [L] that brings their concatenated outputs into row order (None:
    already in order)."""

    prompts: tuple[Scan, ...]
    completions: tuple[Scan, ...]
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
        groups = tuple(
            DenseGroup(span, _blocks(span.prompt, span.start + span.prompt, span.completions)) for span in self.spans
        )
        order = _order([rows for group in groups for rows in group.rows], self.device)
        return DenseTables(tuple(group.to(self.device) for group in groups), order)

    @cached_property
    def scans(self) -> ScanTables:
        prompts, completions = _scans(self.spans)
        order = _order([scan.target for scan in (*prompts, *completions)], self.device)
        first, then = (tuple(scan.to(self.device) for scan in scans) for scans in (prompts, completions))
        return ScanTables(first, then, order)

    @cached_property
    def varlen(self) -> VarlenTables:
        return _varlen(self._segments(), self.device)

    @cached_property
    def answers(self) -> AnswerRows:
        """The completions as a row of their own, for prompts whose keys were computed before."""
        return AnswerRows(self.spans, self.device)

    def _segments(self) -> Iterable[_Segment]:
        for span in self.spans:
            yield span.prompt, ((span.start, span.prompt, 0),)
            at = span.start + span.prompt
            for copy, length in enumerate((n for n in span.completions if n), start=1):
                yield length, ((span.start, span.prompt, copy), (at, length, 0))
                at += length


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

    @property
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
            _blocks(span.prompt, first, lengths)
            for span, first, lengths in zip(self.spans, firsts, self.lengths, strict=False)
        ]
        order = _order([block.target for blocks in groups for block in blocks], self.device)
        return tuple(tuple(block.to(self.device) for block in blocks) for blocks in groups), order

    @cached_property
    def varlen(self) -> VarlenTables:
        return _varlen(self._segments(), self.device)

    def _segments(self) -> Iterable[_Segment]:
        starts = list(accumulate((span.prompt for span in self.spans), initial=0))
        at = starts[-1]
        for span, start, lengths in zip(self.spans, starts, self.lengths, strict=False):
            for copy, length in enumerate(n for n in lengths if n):
                yield length, ((start, span.prompt, copy), (at, length, 0))
                at += length


# Queries of a segment, and its keys as runs (first row, number of rows, which copy of these rows it is)
_Segment = tuple[int, tuple[tuple[int, int, int], ...]]


def _order(parts: list[Tensor], device: torch.device) -> Tensor | None:
    """The order that sorts the rows of concatenated outputs, or None if they are ascending."""
    rows = torch.cat([torch.empty(0, dtype=torch.int64), *parts])
    return None if bool((rows[1:] > rows[:-1]).all()) else torch.argsort(rows).to(device)


def _blocks(prompt: int, first: int, completions: Sequence[int]) -> tuple[CompletionBlock, ...]:
    """Blocks of the completions of a prompt of that many tokens, which begin at row ``first``."""
    starts = list(accumulate(completions, initial=first))
    members = [(s, n) for s, n in zip(starts, completions, strict=False) if n]
    return tuple(_block(prompt, [members[n] for n in some]) for some in _similar([n for _, n in members]))


def _similar(lengths: list[int]) -> list[list[int]]:
    """Indices of ``lengths`` in groups, split where one is shorter than half its group's longest: padding at most
    doubles the work."""
    order = sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))
    groups: list[list[int]] = []
    for n in order:
        if not groups or 2 * lengths[n] < lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(n)
    return [sorted(group) for group in groups]


def _padded(members: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Rows [B, T] of segments (start, length), padded with their first row, and which are real [B, T]."""
    start = torch.tensor([s for s, _ in members])[:, None]
    length = torch.tensor([n for _, n in members])[:, None]
    step = torch.arange(int(length.max()))
    real = step < length
    return torch.where(real, start + step, start), real


def _block(prompt: int, members: list[tuple[int, int]]) -> CompletionBlock:
    rows, real = _padded(members)
    valid = real.flatten().nonzero()[:, 0]
    step = torch.arange(rows.shape[1])[:, None]
    mask = torch.arange(prompt + len(step)) <= step + prompt
    return CompletionBlock(rows, valid, rows.flatten()[valid], mask)


def _scans(spans: tuple[Span, ...]) -> tuple[list[Scan], list[Scan]]:
    by_length = _similar([span.prompt for span in spans])
    place = {n: at for at, n in enumerate(n for group in by_length for n in group)}
    prompts = [_scan([(spans[n].start, spans[n].prompt) for n in group], []) for group in by_length]
    members = []
    for n, span in enumerate(spans):
        starts = accumulate(span.completions, initial=span.start + span.prompt)
        members += [(s, length, place[n]) for s, length in zip(starts, span.completions, strict=False) if length]
    completions = [
        _scan([members[n][:2] for n in group], [members[n][2] for n in group])
        for group in _similar([length for _, length, _ in members])
    ]
    return prompts, completions


def _scan(members: list[tuple[int, int]], sources: list[int]) -> Scan:
    rows, real = _padded(members)
    valid = real.flatten().nonzero()[:, 0]
    copies: dict[int, tuple[list[int], list[int]]] = {}
    seen = Counter[int]()
    for place, prompt in enumerate(sources):
        to, at = copies.setdefault(seen[prompt], ([], []))
        to.append(prompt)
        at.append(place)
        seen[prompt] += 1
    pairs = tuple((torch.tensor(to), torch.tensor(at)) for to, at in copies.values())
    source = torch.tensor(sources, dtype=torch.int64)
    return Scan(rows, real, real.sum(1), valid, rows.flatten()[valid], source, pairs)


def _varlen(segments: Iterable[_Segment], device: torch.device) -> VarlenTables:
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
