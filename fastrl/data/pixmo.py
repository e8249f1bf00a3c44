"""Counting in the layout of PixMo-Count → counting records.

Rows: ``image`` (a file; PixMo's own ``image_url`` must be downloaded first), ``label``, ``count``, and ``points`` in
pixels, as ``{"x": [...], "y": [...]}`` or ``[{"x": ..., "y": ...}, ...]``; null or none in validation and test splits.

Query keys: ``images`` (folder the image paths start from), ``limit``, ``seed``, ``min_count``, ``max_count`` (rows
beyond are left out and counted; PixMo-Count itself holds 2 to 10).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastrl.data import rows
from fastrl.data.records import Dataset, Record, question
from fastrl.data.rows import IMAGE_FIELDS, LeftOut, int_option, load_rows
from fastrl.data.validate import Row, short

KEYS = (*rows.KEYS, "min_count", "max_count")


def load(path: str, query: Mapping[str, str]) -> Dataset:
    """Read a file of counts. Raises ``DataError`` for an unreadable file or option."""
    low = int_option(query, "min_count", path) or 0
    high = int_option(query, "max_count", path)
    return load_rows(path, query, lambda row: _record(row, low, high))


def _record(row: Row, low: int, high: int | None) -> Record | LeftOut | None:
    identity, label = row.id(), row.text("label")
    image = row.image(*IMAGE_FIELDS, "image_url")
    count = row.fields.get("count")
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        row.fail("wrong type", f"count must be an integer of at least 0, got {short(count)}")
        return None
    points = _points(row, image[1]) if image else None
    if row.problems or image is None or label is None:
        return None
    if points is not None and len(points) != count:
        row.fail("count and points differ", f"count is {count} and there are {len(points)} points")
        return None
    if count < low or (high is not None and count > high):
        return LeftOut("count out of range", f"count {count} is not in {low} to {'any' if high is None else high}")
    target = {"label": label, "count": count, "points": points, "boxes": None}
    return Record(identity, "counting", (image[0],), question("counting", label), target)


def _points(row: Row, size: tuple[int, int]) -> list[tuple[float, float]] | None:
    value: Any = row.fields.get("points")
    if value is None:
        return None
    if isinstance(value, Mapping):
        xs, ys = value.get("x"), value.get("y")
        if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
            row.fail("wrong type", f"points must have lists x and y of one length, got {short(value)}")
            return None
        pairs = list(zip(xs, ys, strict=True))
    elif isinstance(value, list) and all(isinstance(p, Mapping) for p in value):
        pairs = [(p.get("x"), p.get("y")) for p in value]
    else:
        row.fail("wrong type", f"points must be {{x: [...], y: [...]}} or a list of {{x, y}}, got {short(value)}")
        return None
    points = [row.point(x, y, size) for x, y in pairs]
    return None if row.problems else [p for p in points if p is not None]
