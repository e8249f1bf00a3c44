"""Reads files of predictions: JSONL of ``{"id", "answer"}`` with raw model text, or COCO result JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fastrl.answers import FRAMES, STYLES, View, check_frame, style_named, style_of
from fastrl.data.records import Record
from fastrl.data.rows import parse_json, read_rows, read_text
from fastrl.data.validate import DataError, Problem, is_number, short
from fastrl.evaluate.coco import category_names
from fastrl.rewards.reading import view_of

RESIZE = (56 * 56, 16384 * 28 * 28)  # min_pixels and max_pixels in Qwen2.5-VL's own preprocessor_config.json


class PredictionError(DataError):
    """All problems of a predictions file, grouped like those of a data set."""

    source = "the predictions"


class Predictions(NamedTuple):
    """Records and their answers, aligned; ``evaluate(task, *predictions)`` scores them."""

    records: list[Record]
    answers: list[str]


def load_predictions(
    path: str | Path,
    records: Sequence[Record],
    *,
    frame: str = "auto",
    family: str | None = None,
    pixels: tuple[int, int] = RESIZE,
    categories: Mapping[int | str, str] | None = None,
    known: Collection[str] = (),
) -> Predictions:
    """Read the answers to ``records`` from a file.

    A file whose first character is ``[`` and whose entries have an ``image_id`` is COCO result JSON, for detection:
    ``image_id`` is the record's id, ``bbox`` is x, y, width, height in pixels of the original image, and an image
    without an entry has no detections. Any other file is JSONL with one ``{"id": …, "answer": "raw model text"}`` per
    record, in any order (or one JSON list of such objects in a ``.json`` file). A row may have ``"resized": [width,
    height]``, the size at which the model saw its picture (``"canvas"``: which part of it, see ``View``), and the
    ``"frame"`` and ``"style"`` of the answer, as defaults for ``frame`` and ``family``; ``fastrl eval --out`` writes
    them.

    Args:
        frame: frame of the answers' coordinates: ``auto`` (that of the row or the record, else that of ``family``, else
            guessed from the answer's notation, with pixels of the original unless the row states a size), or one of
            ``FRAMES``. COCO results are always ``original``.
        family: ``model_type`` of the answering model's config (``fastrl.answers.FAMILIES``).
        pixels: the processor's ``(min_pixels, max_pixels)``: with ``resized``, pictures of rows without a size are
            assumed to be resized by Qwen-VL's processor with these limits; with ``padded_unit``, padded to a square.
        categories: COCO category id → name for COCO results; default: those of the data, else those of COCO 2017.
        known: ids of other records, whose answers are ignored.

    Raises:
        PredictionError: bad JSON, a missing, duplicate or unknown id, or a field of the wrong type; all at once, each
            with file and line (or entry).
        DataError: the file cannot be read as UTF-8 text.
        ValueError: an unknown frame or family, or two records of the same id.
    """
    path = Path(path)
    check_frame(frame)
    style = "" if family is None else style_of(family).name
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise ValueError(f"two records have the id {record.id!r}, so predictions cannot be assigned")
        seen.add(record.id)
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        rows = parse_json(text, str(path))
        if isinstance(rows, Problem):
            raise PredictionError([rows])
        if path.suffix != ".json" or any(isinstance(row, dict) and "image_id" in row for row in rows) or not rows:
            return _from_coco(path, rows, records, categories, known)
    rows = _from_rows(path, seen, known)
    framed = [_framed(record, rows[record.id], frame, style, pixels) for record in records]
    return Predictions(framed, [rows[record.id]["answer"] for record in records])


def row_of(record: Record, answer: str) -> dict[str, Any]:
    """The row with all that :func:`load_predictions` needs about an answer to a record as its model saw it."""
    row: dict[str, Any] = {"id": record.id, "answer": answer}
    if record.frame != "auto":
        row["frame"] = record.frame
    if len(record.views) == 1:
        row["resized"] = [record.views[0].resized_width, record.views[0].resized_height]
        if record.views[0].canvas is not None:
            row["canvas"] = list(record.views[0].canvas)
    if record.style:
        row["style"] = record.style
    return row


def _framed(record: Record, row: Mapping[str, Any], frame: str, style: str, pixels: tuple[int, int]) -> Record:
    """The record with the frame and style of its answer."""
    style = style or row.get("style", record.style)
    usual = style_named(style).frame_of(record.task) if style else "auto"
    named = [given for given in (frame, row.get("frame", "auto"), record.frame, usual) if given != "auto"]
    frame, views = named[0] if named else "auto", record.views
    single = len(record.images) <= 1 and len(views) <= 1
    view = view_of(record) if single and ("resized" in row or frame in ("resized", "padded_unit")) else None
    if view is not None and "resized" in row:
        canvas = tuple(row["canvas"]) if row.get("canvas") is not None else None
        width, height = row["resized"]
        views = (View(view.width, view.height, width, height, canvas),)
    elif view is not None and not views:
        views = (_usual_view(record, view, frame, pixels),)
    return replace(record, frame=frame, views=views, style=style)


def _usual_view(record: Record, view: View, frame: str, pixels: tuple[int, int]) -> View:
    """The view of a picture by a family that answers in a frame, if the row does not state it."""
    if frame == "padded_unit":
        return View.padded(view.width, view.height, max(view.width, view.height))
    try:
        return View.qwen(view.width, view.height, min_pixels=pixels[0], max_pixels=pixels[1])
    except ValueError as error:  # a picture that the processor refuses
        raise ValueError(f"{record.source or record.id}: {error}") from None


def _from_rows(path: Path, ids: set[str], known: Collection[str]) -> dict[str, dict[str, Any]]:
    problems: list[Problem] = []
    answers: dict[str, dict[str, Any]] = {}
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
            if str(name) not in known:
                problems.append(Problem(where, "unknown id", f"id {short(name)} is not in the data"))
        elif (problem := _extra_problem(row)) is not None:
            problems.append(Problem(where, "wrong type", problem))
        else:
            answers[str(name)], place[str(name)] = dict(row), where
    missing = sorted(ids - set(answers))
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        problems.append(
            Problem(str(path), "missing id", f"no answer for {len(missing)} of {len(ids)} records: {shown}")
        )
    if problems:
        raise PredictionError(problems)
    return answers


def _extra_problem(row: Mapping[str, Any]) -> str | None:
    """The problem of a row's optional fields, or None."""
    frame, style = row.get("frame", "auto"), row.get("style", "")
    size, canvas = row.get("resized", [1, 1]), row.get("canvas")
    if not isinstance(frame, str) or frame not in FRAMES:
        return f"'frame' must be one of {', '.join(FRAMES)}, got {short(frame)}"
    if style != "" and (not isinstance(style, str) or style not in STYLES):
        return f"'style' must be one of {', '.join(STYLES)}, got {short(style)}"
    if canvas is not None:
        valid = isinstance(canvas, list) and len(canvas) == 4 and all(is_number(v) for v in canvas)
        if not valid or not (canvas[0] < canvas[2] and canvas[1] < canvas[3]):
            return f"'canvas' must be [left, top, right, bottom] in pixels, got {short(canvas)}"
    whole = isinstance(size, list) and len(size) == 2 and all(type(v) is int and v > 0 for v in size)
    return None if whole else f"'resized' must be [width, height] in pixels, got {short(size)}"


def _from_coco(
    path: Path,
    rows: Sequence[Any],
    records: Sequence[Record],
    categories: Mapping[int | str, str] | None,
    known: Collection[str],
) -> Predictions:
    for record in records:
        if record.task != "detection":
            message = f"COCO results answer detection records; {record.id!r} is a {record.task} record"
            raise PredictionError([Problem(str(path), "wrong task", message)])
    names = dict(categories) if categories is not None else category_names(records)
    found: dict[str, list[dict[str, Any]]] = {record.id: [] for record in records}
    problems: list[Problem] = []
    place: dict[tuple[Any, ...], int] = {}
    for index, row in enumerate(rows):
        if isinstance(row, dict) and str(row.get("image_id")) not in found and str(row.get("image_id")) in known:
            continue
        problem = _coco_problem(row, found, names)
        if problem is None and (first := place.setdefault(_content(row), index)) != index:
            problem = "repeated result", f"has the same content as entry {first + 1}"
        if problem is not None:
            problems.append(Problem(f"{path}:entry {index + 1}", *problem))
            continue
        x, y, width, height = row["bbox"]
        item = {"bbox_2d": [x, y, x + width, y + height], "label": names[row["category_id"]]}
        found[str(row["image_id"])].append({**item, "score": row.get("score", 1.0)})
    if problems:
        raise PredictionError(problems)
    # The detections are converted to answer text, so that both kinds of file are scored by the same code.
    framed = [replace(record, frame="original") for record in records]
    return Predictions(framed, [json.dumps(found[record.id]) for record in records])


def _content(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The content of a valid entry, however its numbers are written."""
    score = float(row.get("score", 1.0))
    return str(row["image_id"]), row["category_id"], tuple(map(float, row["bbox"])), score


def _coco_problem(row: Any, images: Mapping[str, object], names: Mapping[int | str, str]) -> tuple[str, str] | None:
    """The problem of one entry of a COCO result file as (kind, message), or None."""
    if not isinstance(row, dict):
        return "wrong type", f"expected an object with image_id, category_id, bbox and score, got {short(row)}"
    image, category, box = row.get("image_id"), row.get("category_id"), row.get("bbox")
    if isinstance(image, bool) or not isinstance(image, int | str):
        return "wrong type", f"image_id must be an integer or a string, got {short(image)}"
    if str(image) not in images:
        return "unknown id", f"image_id {short(image)} is not in the data"
    if isinstance(category, bool) or not isinstance(category, int | str) or category not in names:
        return "unknown category", f"category_id {short(category)} is not a category of the data"
    if not isinstance(box, list) or len(box) != 4 or not all(is_number(v) for v in box):
        return "wrong type", f"'bbox' must be four finite numbers x, y, width, height, got {short(box)}"
    if min(box[2:]) < 0:
        return "inverted box", f"'bbox' must be x, y, width, height with the last two at least 0, got {short(box)}"
    if not is_number(row.get("score", 1.0)):
        return "wrong type", f"'score' must be a finite number, got {short(row.get('score'))}"
    return None
