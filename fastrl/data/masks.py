"""COCO run-length masks → bounding boxes, validated and without decoding."""

from __future__ import annotations

from typing import Any

Box = tuple[float, float, float, float]


def rle_runs(counts: Any) -> list[int]:
    """The run lengths of a COCO RLE, compressed (a string) or not (a list). Raises ``ValueError`` for anything else.

    Compressed format: each number is a sequence of 5-bit groups, lowest first, as characters from 48 on, with bit 6 set
    if more follow; from number 3 on (counting from 0) it is the difference to the number two before.
    """
    if isinstance(counts, list):
        if not all(isinstance(run, int) and not isinstance(run, bool) and run >= 0 for run in counts):
            raise ValueError("runs must be integers of at least 0")
        return counts
    if not isinstance(counts, str):
        raise ValueError("counts must be a string or a list")
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            raise ValueError(f"{character!r} is not part of a compressed mask")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        if len(runs) > 2:
            value += runs[-2]
        if value < 0:
            raise ValueError("a run has negative length")
        runs.append(value)
        value = shift = 0
    if shift:
        raise ValueError("ends within a number")
    return runs


def rle_box(counts: Any, height: int, width: int) -> Box | None:
    """Bounding box (x1, y1, x2, y2; the far edges exclusive) of a COCO RLE mask, or None for an empty one.

    Raises ``ValueError`` if the runs are not a mask of ``height`` x ``width`` pixels.
    """
    runs = rle_runs(counts)
    if sum(runs) != height * width:
        raise ValueError(f"runs add up to {sum(runs)}, a mask of {height}x{width} has {height * width} pixels")
    left, top, right, bottom = width, height, -1, -1
    position = 0
    for i, run in enumerate(runs):  # column by column; every second run is inside
        if i % 2 and run:
            first, last = position, position + run - 1
            same_column = first // height == last // height
            left, right = min(left, first // height), max(right, last // height)
            top = min(top, first % height if same_column else 0)
            bottom = max(bottom, last % height if same_column else height - 1)
        position += run
    return None if right < 0 else (float(left), float(top), float(right + 1), float(bottom + 1))
