"""Boxes and points of an answer in pixels of the record's original image, for rewards and metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.answers import Parsed, View, from_original, parse_boxes, parse_points, resolve_frame, to_original
from fastrl.data.pictures import picture_size
from fastrl.data.records import Record

# Coordinates are clamped to this many pixels (of 0–1000 units for points): far outside any image, and products of two
# of them stay exact enough for areas. A model may write 1e300.
LIMIT = 1e6

# Characters of an answer that are read. Parsing is linear, so this bounds its time; four thousand tokens are far less.
MAX_CHARACTERS = 1 << 21

Coords = tuple[float, ...]


class Padded(NamedTuple):
    """Ragged lists of coordinates as one tensor: ``values`` [B, n, k] float64, zero beyond ``counts`` [B] int64."""

    values: Tensor
    counts: Tensor


def read_boxes(answer: str, max_items: int) -> Parsed:
    """The first ``max_items`` boxes of a model's answer, in its own numbers; never raises, bounded time."""
    return parse_boxes(answer[:MAX_CHARACTERS], max_items)


def read_points(answer: str, max_items: int) -> Parsed:
    """The first ``max_items`` points, or boxes (whose ``point`` is the centre), of a model's answer.

    A box with inverted corners counts as malformed.
    """
    parsed = parse_points(answer[:MAX_CHARACTERS], max_items)
    upright = tuple(item for item in parsed if not item.inverted)
    return replace(parsed, items=upright, dropped=parsed.dropped + len(parsed) - len(upright))


def view_of(record: Record) -> View | None:
    """Sizes of the record's (first) image in pixels; None for a record that has neither views nor images.

    Without views, the model is assumed to see the image at its own size. Only a file's header is read.
    """
    if record.views:
        return record.views[0]
    if not record.images:
        return None
    return View.unresized(*picture_size(record.images[0]))


def clamp(coords: Sequence[float]) -> Coords:
    """Coordinates within ±``LIMIT``."""
    return tuple(min(max(float(v), -LIMIT), LIMIT) for v in coords)


def to_pixels(parsed: Parsed, record: Record, frame: str | None = None, *, boxes: bool = True) -> list[Coords]:
    """Boxes (or, with ``boxes=False``, centres) in pixels of the record's original image, in the answer's order.

    ``frame`` overrides the record's own; ``auto`` depends on the answer's notation. Without any image size in the
    record, numbers are not converted. Every coordinate is finite and within ±``LIMIT``.
    """
    coords = [clamp(item.box) for item in parsed]
    resolved = resolve_frame(parsed, frame or record.frame)
    known = resolved != "original" and not (resolved == "resized" and not record.views) and bool(coords)
    view = view_of(record) if known else None
    if view is not None:
        coords = [clamp(to_original(c, resolved, view)) for c in coords]
    return coords if boxes else [(0.5 * (c[0] + c[2]), 0.5 * (c[1] + c[3])) for c in coords]


def to_thousand(coords: Sequence[Coords], view: View | None) -> list[Coords]:
    """Original pixels → 0–1000 of each side; without sizes the numbers count as 0–1000 already."""
    return [c if view is None else clamp(from_original(c, "thousand", view)) for c in coords]


def pad(rows: Sequence[Sequence[Coords]], width: int) -> Padded:
    """Lists of ``width``-tuples as one tensor [B, max(1, longest), width] in float64, with their lengths."""
    longest = max([1, *(len(row) for row in rows)])
    values = torch.zeros(len(rows), longest, width, dtype=torch.float64)
    for i, row in enumerate(rows):
        if row:
            values[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return Padded(values, torch.tensor([len(row) for row in rows], dtype=torch.int64))


def batches(n_pred: Sequence[int], n_truth: Sequence[int], cells: int = 1 << 20) -> Iterator[list[int]]:
    """Indices of problems in batches whose padded cost matrices stay within ``cells``, small problems together.

    Otherwise one answer that repeats a box five hundred times would pad all others to its size.
    """
    order = sorted(range(len(n_pred)), key=lambda i: (n_pred[i], n_truth[i]))
    batch: list[int] = []
    widest = 1
    for i in order:
        wider = max(widest, n_truth[i])
        if batch and (len(batch) + 1) * max(n_pred[i], 1) * wider > cells:
            yield batch
            batch, wider = [], max(1, n_truth[i])
        batch.append(i)
        widest = wider
    if batch:
        yield batch
