"""Files of multiple-choice benchmarks → rows: TSV with pictures in base64, and JSON objects that hold lists of rows."""

from __future__ import annotations

import base64
import binascii
import csv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastrl.data.rows import Rows, parse_json, read_text, text_lines
from fastrl.data.validate import DataError, Problem, fail, short

MAX_CELL = 1 << 28  # characters of a cell: a picture of 192 MiB
_REFERENCE = 64  # a shorter image cell is the index of the row whose picture it shows


def choice_rows(path: Path) -> Rows | None:
    """The rows of a TSV file or of a JSON object; None for files of rows, which are read one by one. Raises
    ``DataError`` for an unreadable file."""
    if path.suffix == ".tsv":
        return _tsv_rows(path)
    if path.suffix != ".json" or _has_rows(path):
        return None
    value = parse_json(read_text(path), str(path))
    if isinstance(value, Problem):
        raise DataError([value])
    if not isinstance(value, Mapping):
        raise fail(str(path), "wrong type", f"expected an object or a list, got {short(value)}")
    return _seed_rows(path, value) if "questions" in value else _tempcompass_rows(path, value)


def _has_rows(path: Path) -> bool:
    """Whether a JSON file is a list, or its first line is a question."""
    first = next((line for line in text_lines(path) if line.strip()), "[")
    row = None if first.lstrip().startswith("[") else parse_json(first, str(path))
    return row is None or (isinstance(row, Mapping) and "question" in row)


def _seed_rows(path: Path, value: Mapping[str, Any]) -> Rows:
    """SEED-Bench's JSON: its questions, each with the name of its type and, as its image, its ``data_id``."""
    asked, types = value["questions"], value.get("question_type", {})
    if not isinstance(asked, list) or not isinstance(types, Mapping):
        raise fail(str(path), "wrong type", "questions must be a list and question_type an object of names")
    names = {str(number): name for name, number in types.items()}
    found: list[tuple[int, str, Mapping[str, Any] | Problem]] = []
    for number, row in enumerate(asked):
        where = f"{path}:question {number + 1}"
        if isinstance(row, Mapping):
            kind = names.get(str(row.get("question_type_id")))
            more = {"question_type": kind} if kind is not None else {}
            image = row.get("image", row.get("data_id"))
            found.append((number, where, {**row, **more, **({"image": image} if image is not None else {})}))
        else:
            found.append((number, where, Problem(where, "wrong type", f"must be an object, got {short(row)}")))
    return found


def _tempcompass_rows(path: Path, value: Mapping[str, Any]) -> Rows:
    """TempCompass' JSON: video → aspect → questions."""
    found: list[tuple[int, str, Mapping[str, Any] | Problem]] = []
    for video, aspects in value.items():
        groups = aspects.items() if isinstance(aspects, Mapping) else [("", None)]
        for aspect, asked in groups:
            for place, row in enumerate(asked if isinstance(asked, list) else [None]):
                number, where = len(found), f"{path}:{video}/{aspect} {place + 1}"
                if isinstance(row, Mapping):
                    found.append((number, where, {**row, "video_id": video, "dim": aspect}))
                else:
                    message = "expected {video: {aspect: [{question, answer}]}}, as TempCompass has it"
                    found.append((number, where, Problem(where, "wrong type", message)))
    return found


def _tsv_rows(path: Path) -> Rows:
    """MMBench's TSV: a row's picture is base64, or the index of another row with the same picture."""
    found: list[tuple[int, str, Mapping[str, Any] | Problem]] = []
    with _large_cells():
        reader = csv.reader(text_lines(path), delimiter="\t")
        try:
            names = next(reader, [])
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise fail(str(path), "wrong header", f"column {short(twice)} comes twice")
            for number, cells in enumerate(reader):
                where = f"{path}:{reader.line_num}"
                if len(cells) == len(names):
                    found.append((number, where, dict(zip(names, cells, strict=True))))
                elif cells:
                    message = f"{len(names)} columns, got {len(cells)}"
                    found.append((number, where, Problem(where, "wrong length", message)))
        except csv.Error as error:
            raise fail(str(path), "unreadable file", f"cannot be read as TSV ({error})") from None
    shown = {row.get("index"): row.get("image", "") for _, _, row in found if isinstance(row, Mapping)}
    return [(number, where, _with_picture(row, where, shown)) for number, where, row in found]


def _with_picture(
    row: Mapping[str, Any] | Problem, where: str, shown: Mapping[Any, str]
) -> Mapping[str, Any] | Problem:
    if isinstance(row, Problem) or "image" not in row:
        return row
    text = row["image"].strip()
    text = shown.get(text, text) if len(text) <= _REFERENCE else text
    try:
        return {**row, "image": base64.b64decode(text, validate=True) if text else None}
    except (binascii.Error, ValueError) as error:
        return Problem(where, "bad image", f"image is no base64 ({error})")


@contextmanager
def _large_cells() -> Iterator[None]:
    """Inside: cells of CSV files may hold pictures. The limit is one of the whole process, so it is put back."""
    before = csv.field_size_limit(MAX_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)
