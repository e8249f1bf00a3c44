"""Predictions made elsewhere, as files: JSONL of ``{"id", "answer"}`` in raw model text, or COCO result JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fastrl.answers import check_frame
from fastrl.data.records import Record
from fastrl.data.rows import parse_json, read_rows, read_text
from fastrl.data.validate import SHOWN, DataError, Problem, is_number, short
from fastrl.evaluate.coco import category_names


class PredictionError(DataError):
    """Everything that is wrong with a file of predictions: ``problems`` has all of it, the message the first twenty."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(problems)
        more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        self.args = ("\n".join([*map(str, problems[:SHOWN]), *more]),)


class Predictions(NamedTuple):
    """Records and their answers, aligned; ``evaluate(task, *predictions)`` scores them."""

    records: list[Record]
    answers: list[str]


def load_predictions(
    path: str | Path,
    records: Sequence[Record],
    *,
    frame: str = "auto",
    categories: Mapping[int | str, str] | None = None,
) -> Predictions:
    """Read the answers to ``records`` from a file.

    A file whose first character is ``[`` and whose entries have an ``image_id`` is COCO result JSON, for detection:
    ``image_id`` is the record's id, ``bbox`` is x, y, width, height in pixels of the original image, and an image
    without an entry has no detections. Any other file is JSONL with one ``{"id": …, "answer": "raw model text"}`` per
    record, in any order (or one JSON list of such objects in a ``.json`` file).

    Args:
        frame: what the coordinates of the answers mean: ``auto`` (the record's own frame where it has one, else by the
            answer's format), ``thousand``, ``resized``, ``original`` or ``unit``. COCO results are always ``original``.
        categories: COCO category id → name for COCO results; default: the data's own, else those of COCO 2017.

    Raises:
        PredictionError: bad JSON, a missing, duplicate or unknown id, or a field of the wrong type; all at once, each
            with file and line (or entry).
        DataError: the file cannot be read as UTF-8 text.
        ValueError: an unknown frame, or two records of the same id.
    """
    path = Path(path)
    check_frame(frame)
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise ValueError(f"two records have the id {record.id!r}: predictions cannot be told apart")
        seen.add(record.id)
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        rows = parse_json(text, str(path))
        if isinstance(rows, Problem):
            raise PredictionError([rows])
        if path.suffix != ".json" or any(isinstance(row, dict) and "image_id" in row for row in rows) or not rows:
            return _from_coco(path, rows, records, categories)
    answers = _from_rows(path, seen)
    framed = list(records) if frame == "auto" else [replace(record, frame=frame) for record in records]
    return Predictions(framed, [answers[record.id] for record in records])


def _from_rows(path: Path, ids: set[str]) -> dict[str, str]:
    problems: list[Problem] = []
    answers: dict[str, str] = {}
    place: dict[str, str] = {}
    for _, where, row in read_rows(path):
        if isinstance(row, Problem):
            problems.append(row)
            continue
        name, answer = row.get("id"), row.get("answer")
        if isinstance(name, bool) or not isinstance(name, str | int):
            problems.append(Problem(where, "wrong type", f"'id' must be a string or an integer, got {short(name)}"))
        elif not isinstance(answer, str):
            problems.append(Problem(where, "wrong type", f"'answer' must be the model's text, got {short(answer)}"))
        elif str(name) in place:
            message = f"id {str(name)!r} is already answered at {place[str(name)]}"
            problems.append(Problem(where, "duplicate id", message))
        elif str(name) not in ids:
            problems.append(Problem(where, "unknown id", f"id {short(name)} is not in the data"))
        else:
            answers[str(name)], place[str(name)] = answer, where
    missing = sorted(ids - set(answers))
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        problems.append(
            Problem(str(path), "missing id", f"no answer for {len(missing)} of {len(ids)} records: {shown}")
        )
    if problems:
        raise PredictionError(problems)
    return answers


def _from_coco(
    path: Path, rows: Sequence[Any], records: Sequence[Record], categories: Mapping[int | str, str] | None
) -> Predictions:
    for record in records:
        if record.task != "detection":
            message = f"COCO results answer detection records; {record.id!r} is a {record.task} record"
            raise PredictionError([Problem(str(path), "wrong task", message)])
    names = dict(categories) if categories is not None else category_names(records)
    found: dict[str, list[dict[str, Any]]] = {record.id: [] for record in records}
    problems: list[Problem] = []
    for index, row in enumerate(rows):
        problem = _coco_problem(row, found, names)
        if problem is not None:
            problems.append(Problem(f"{path}:entry {index + 1}", *problem))
            continue
        x, y, width, height = row["bbox"]
        item = {"bbox_2d": [x, y, x + width, y + height], "label": names[row["category_id"]]}
        found[str(row["image_id"])].append({**item, "score": row.get("score", 1.0)})
    if problems:
        raise PredictionError(problems)
    # The detections become the text of an answer, so that one path scores both kinds of file.
    framed = [replace(record, frame="original") for record in records]
    return Predictions(framed, [json.dumps(found[record.id]) for record in records])


def _coco_problem(row: Any, images: Mapping[str, object], names: Mapping[int | str, str]) -> tuple[str, str] | None:
    """What is wrong with one entry of a COCO result file: (kind, message)."""
    if not isinstance(row, dict):
        return "wrong type", f"expected an object with image_id, category_id, bbox and score, got {short(row)}"
    image, category, box = row.get("image_id"), row.get("category_id"), row.get("bbox")
    if str(image) not in images:
        return "unknown id", f"image_id {short(image)} is not in the data"
    if not isinstance(category, int | str) or category not in names:
        return "unknown category", f"category_id {short(category)} is no category of the data"
    if not isinstance(box, list) or len(box) != 4 or not all(is_number(v) for v in box):
        return "wrong type", f"'bbox' must be four finite numbers x, y, width, height, got {short(box)}"
    if not is_number(row.get("score", 1.0)):
        return "wrong type", f"'score' must be a finite number, got {short(row.get('score'))}"
    return None
