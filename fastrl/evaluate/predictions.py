"""Predictions made elsewhere, as files: JSONL of ``{"id", "answer"}`` in raw model text, or COCO result JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from fastrl.answers.frames import Frame
from fastrl.data.records import Record
from fastrl.evaluate.coco import coco_category_names
from fastrl.rewards.base import unknown

MAX_SHOWN = 20  # problems listed in one error


class PredictionError(ValueError):
    """Everything that is wrong with a file of predictions; ``problems`` are messages that start with ``file:line``."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        more = [f"… and {len(self.problems) - MAX_SHOWN} more"] if len(self.problems) > MAX_SHOWN else []
        super().__init__("\n".join(self.problems[:MAX_SHOWN] + more))


class Predictions(NamedTuple):
    """Records and their answers, aligned; ``evaluate(task, *predictions)`` scores them."""

    records: list[Record]
    answers: list[str]


def load_predictions(
    path: str | Path,
    records: Sequence[Record],
    *,
    frame: str = "auto",
    categories: Mapping[int, str] | None = None,
) -> Predictions:
    """Read the answers to ``records`` from a file.

    A file whose first character is ``[`` is COCO result JSON (detection only: ``image_id`` equals the record's id,
    ``bbox`` is x, y, width, height in pixels of the original image; an image without a row has no detections). Any
    other file is JSONL with one ``{"id": …, "answer": "raw model text"}`` per record, in any order.

    Args:
        frame: what the coordinates of the answers mean: ``auto`` (a record's own frame where it has one, else by the
            answer's format), ``thousand``, ``resized``, ``original`` or ``unit``. COCO results are always ``original``.
        categories: COCO category id → name for COCO results; default: the ids of COCO 2017.

    Raises:
        PredictionError: bad JSON, a missing, duplicate or unknown id, or a field of the wrong type; all at once, each
            with file and line.
        ValueError: an unknown frame, or two records of the same id.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if frame not in get_args(Frame):
        raise ValueError(unknown("frame", frame, get_args(Frame)))
    ids = [record.id for record in records]
    if len(set(ids)) != len(ids):
        twice = next(i for n, i in enumerate(ids) if i in ids[:n])
        raise ValueError(f"two records have the id {twice!r}; predictions cannot be told apart")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PredictionError([f"{path}: not UTF-8 text: {error}"]) from None
    if text.lstrip()[:1] == "[":
        return _from_coco(path, text, records, categories)
    answers = _from_jsonl(path, text, set(ids))
    framed = list(records) if frame == "auto" else [replace(record, frame=frame) for record in records]
    return Predictions(framed, [answers[i] for i in ids])


def _from_jsonl(path: Path, text: str, ids: set[str]) -> dict[str, str]:
    problems: list[str] = []
    answers: dict[str, str] = {}
    line_of: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"{where}: bad JSON: {error}")
            continue
        if not isinstance(row, dict) or not isinstance(row.get("answer"), str):
            problems.append(f'{where}: expected {{"id": …, "answer": "text"}}, got {line.strip()[:60]}')
            continue
        name = row.get("id")
        if isinstance(name, bool) or not isinstance(name, str | int):
            problems.append(f"{where}: 'id' must be a string or an integer, got {name!r:.60}")
        elif str(name) in line_of:
            problems.append(f"{where}: duplicate id {str(name)!r}, first on line {line_of[str(name)]}")
        elif str(name) not in ids:
            problems.append(f"{where}: id {str(name)!r:.60} is not in the data")
        else:
            answers[str(name)], line_of[str(name)] = row["answer"], number
    missing = sorted(ids - set(answers))
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        problems.append(f"{path}: no answer for {len(missing)} of {len(ids)} records: {shown}")
    if problems:
        raise PredictionError(problems)
    return answers


def _from_coco(path: Path, text: str, records: Sequence[Record], categories: Mapping[int, str] | None) -> Predictions:
    wrong = next((record for record in records if record.task != "detection"), None)
    if wrong is not None:
        raise PredictionError([f"{path}: COCO results answer detection records; {wrong.id!r} is a {wrong.task} record"])
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PredictionError([f"{path}:{getattr(error, 'lineno', 1)}: bad JSON: {error}"]) from None
    names = dict(categories) if categories is not None else coco_category_names(records)
    found: dict[str, list[dict[str, Any]]] = {record.id: [] for record in records}
    problems: list[str] = []
    for index, row in enumerate(rows):
        problem = _coco_row_problem(row, found, names)
        if problem:
            problems.append(f"{path}: entry {index}: {problem}")
            continue
        x, y, width, height = row["bbox"]
        label, score = names[row["category_id"]], row.get("score", 1.0)
        found[str(row["image_id"])].append({"bbox_2d": [x, y, x + width, y + height], "label": label, "score": score})
    if problems:
        raise PredictionError(problems)
    framed = [replace(record, frame="original") for record in records]
    return Predictions(framed, [json.dumps(found[record.id]) for record in records])


def _coco_row_problem(row: Any, images: Mapping[str, object], names: Mapping[int, str]) -> str | None:
    if not isinstance(row, dict):
        return f"expected an object with image_id, category_id, bbox, score, got {row!r:.60}"
    if str(row.get("image_id")) not in images:
        return f"image_id {row.get('image_id')!r:.60} is not in the data"
    category = row.get("category_id")
    if not isinstance(category, int) or category not in names:
        return f"category_id {category!r:.60} is not a known category"
    box = row.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_finite(v) for v in box):
        return f"'bbox' must be four finite numbers x, y, width, height, got {box!r:.60}"
    if not _finite(row.get("score", 1.0)):
        return f"'score' must be a finite number, got {row.get('score')!r:.60}"
    return None


def _finite(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
