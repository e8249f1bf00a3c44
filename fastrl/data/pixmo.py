"""Counting in the layout of PixMo-Count → counting records.

Rows: ``image`` (a file; PixMo's own ``image_url`` must be downloaded first), ``label``, ``count``, and ``points`` in
pixels, as ``{"x": [...], "y": [...]}``, ``[{"x": ..., "y": ...}, ...]`` or ``[[x, y], ...]``; null, absent or empty if
only the count is known (validation and test splits).

Query keys: ``images`` (folder the image paths start from), ``limit``, ``seed``, ``frame`` (unit of the points:
``original``, pixels; ``unit``, 0 to 1; ``thousand``), ``min_count``, ``max_count`` (other rows are left out and
counted; PixMo-Count itself has 2 to 10).
"""

from __future__ import annotations

from collections.abc import Mapping

from fastrl.data import rows
from fastrl.data.records import Dataset, Record, question
from fastrl.data.rows import IMAGE_FIELDS, LeftOut, choice_option, int_option, load_rows
from fastrl.data.validate import SIDES, Row

KEYS = (*rows.KEYS, "frame", "min_count", "max_count", "prompt")


def load(path: str, query: Mapping[str, str]) -> Dataset:
    """Read a file of counts. Raises ``DataError`` for an unreadable file or option."""
    low = int_option(query, "min_count", path) or 0
    high = int_option(query, "max_count", path)
    frame = choice_option(query, "frame", tuple(SIDES), path)
    return load_rows(path, query, lambda row: record(row, frame, low, high))


def record(row: Row, frame: str, low: int, high: int | None) -> Record | LeftOut | None:
    """One row as a record; None where ``row.problems`` says why not."""
    identity, label = row.id(), row.text("label")
    image = row.image(*IMAGE_FIELDS, "image_url")
    count = row.count("count")
    value = row.truth("points")
    points = row.points(value, image[1], frame=frame) if image and value is not None else None
    if row.problems or image is None or label is None or count is None:
        return None
    if points is not None and not points and count:
        points = None  # as in PixMo's validation and test rows, which have a count only
    if points is not None and len(points) != count:
        row.fail("count and points differ", f"count is {count} and there are {len(points)} points")
        return None
    if count < low or (high is not None and count > high):
        return LeftOut("count out of range", f"count {count} is not in {low} to {'any' if high is None else high}")
    target = {"label": label, "count": count, "points": points, "boxes": None}
    return Record(identity, "counting", (image[0],), question("counting", label), target)
