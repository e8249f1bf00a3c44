"""``rows:PATH``: rows in the layouts of EasyR1, verl, ms-swift, TRL, VLM-R1, LLaVA, Perception-R1 and fastrl's
adapters.

The file is JSONL, a JSON list, Parquet, Arrow, or a folder of the ``datasets`` library. Its layout is recognised by its
columns (``layouts``) and reported in a note. The task is given by ``task``, by the row, or else by the type of its
truth: a box means grounding, a number counting, a list of labelled boxes detection, yes or no a question. For free text
it must be given: ``task=ocr`` or ``task=caption``.

Query keys: ``images`` (folder the image paths start from), ``split``, ``limit``, ``seed``, ``task``, ``frame`` (unit of
the truth's coordinates: ``original``, pixels; ``unit``, 0 to 1; ``thousand``), ``box`` (``xyxy`` or ``xywh``),
``prompt`` (``row``: the row's own; ``paper``: Perception-R1's for the task; or a template, see ``prompts``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from fastrl.data import pixmo, refexp, rows
from fastrl.data.layouts import LAYOUTS, Asked, Layout, content_of, recognise
from fastrl.data.records import PROMPTS, Dataset, Record, question
from fastrl.data.rows import IMAGE_FIELDS, LeftOut, choice_option, load_rows, read_rows
from fastrl.data.truth import (
    BOX_NAMES,
    LABEL_NAMES,
    POINT_NAMES,
    entry,
    fields_of,
    read_count,
    read_list,
    read_names,
    read_truth,
    unwrapped,
    whole_number,
)
from fastrl.data.validate import SIDES, DataError, Problem, Row, corners, fail, short

KEYS = (*rows.KEYS, "task", "frame", "box", "prompt")
TASKS = ("grounding", "counting", "detection", "ocr", "caption", "qa")
_COUNTED = re.compile(
    r"(?:how many|number of|count (?:all )?(?:the )?|bounding boxes of (?:the )?)\s*(.+?)"
    r"(?: are (?:there|visible).*| (?:in|on) (?:the|this) (?:image|picture).*)?[.?]?",
    re.I | re.S,
)


class _Options(NamedTuple):
    task: str | None
    frame: str | None
    written: str
    prompt: str


def load(path: str, query: Mapping[str, str]) -> Dataset:
    """Read a file of rows in any known layout. Raises ``DataError`` for an unreadable file, option or layout."""
    options = _Options(
        choice_option(query, "task", TASKS, path) if "task" in query else None,
        choice_option(query, "frame", tuple(SIDES), path) if "frame" in query else None,
        choice_option(query, "box", ("xyxy", "xywh"), path),
        choice_option(query, "prompt", ("row", "paper"), path),
    )
    columns = _columns(Path(path), query.get("split"))
    name, build = _reader(columns, options, path)
    data = load_rows(path, query, build)
    tasks = Counter(record.task for record in data)
    found = ", ".join(f"{task} {count}" for task, count in tasks.most_common())
    note = Problem(
        path, "layout", f"read as {name} rows (columns {', '.join(sorted(columns))}): {found or 'no record'}"
    )
    return Dataset(data.records, data.problems, data.left_out, (note, *data.notes))


def layout_of(path: str, split: str | None = None) -> tuple[list[str], str | None]:
    """The columns of a file's first row, and the adapter that reads such rows. Raises ``DataError``."""
    columns = _columns(Path(path), split)
    return columns, own_layout(columns) or ("rows" if recognise(columns) is not None else None)


def _columns(path: Path, split: str | None) -> list[str]:
    """The columns of the first valid row."""
    first: Problem | None = None
    for _, _, fields in read_rows(path, split):
        if not isinstance(fields, Problem):
            return list(fields)
        first = first or fields
    raise DataError([first]) if first is not None else fail(str(path), "empty file", "holds no rows")


def _reader(columns: Collection[str], options: _Options, path: str) -> tuple[str, rows.Build]:
    layout = recognise(columns)
    if layout is not None:
        return layout.name, lambda row: _record(row, layout, options)
    own = own_layout(columns)
    if own == "refexp":
        prompt = "row" if options.prompt == "row" and {"problem", "question"} & set(columns) else "paper"
        return own, lambda row: refexp.record(row, options.written, options.frame or "original", prompt)
    if own == "pixmo":
        return own, lambda row: pixmo.record(row, options.frame or "original", 0, None)
    if own == "ocr":
        return own, _ocr
    known = "; ".join(f"{each.name}: {', '.join(each.columns)}" for each in LAYOUTS)
    raise fail(
        path,
        "unknown layout",
        f"columns {', '.join(columns)}: not a known layout ({known}; refexp: expression, bbox; pixmo: label, "
        "count; ocr: text). To read another layout, use data.adapter: my_data.py:rows",
    )


def own_layout(columns: Collection[str]) -> str | None:
    """The name of the fastrl adapter whose rows have these columns."""
    has = set(columns)
    if has & {*refexp.EXPRESSION_FIELDS} and has & {*refexp.BOX_FIELDS}:
        return "refexp"
    if {"label", "count"} <= has:
        return "pixmo"
    return "ocr" if "text" in has and has & {*IMAGE_FIELDS} else None


def _ocr(row: Row) -> Record | None:
    identity, text, image = row.id(), row.text("text"), row.image(*IMAGE_FIELDS)
    if row.problems or text is None or image is None:
        return None
    return Record(identity, "ocr", (image[0],), question("ocr"), {"text": text})


def _record(row: Row, layout: Layout, options: _Options) -> Record | LeftOut | None:
    identity, asked, images = row.id(), layout.read(row), row.pictures()
    if asked is None or row.problems:
        return None
    truth = read_truth(asked.truth)
    if truth is None:
        return LeftOut("no truth", "its truth is null: there is nothing to answer")
    task = _task(row, asked, truth, options)
    messages = content_of(asked.turns, len(images))
    if messages is None:
        places = sum(part is None for turn in asked.turns for part in turn.parts)
        row.fail("image places", f"{len(images)} images, but the prompt has {places} <image> places")
    if task is None or messages is None:
        return None
    size = images[0][1] if images else None
    frame = options.frame or asked.frame or "original"
    target = _TARGETS[task](_Truth(row, truth, asked, size, frame, options.written))
    if target is None or row.problems:
        return None
    if options.prompt == "paper":
        about = target.get("expression") or target.get("label") or ", ".join(target.get("categories", ()))
        about = re.sub(r"^the\s+", "", about, flags=re.I)  # the prompts already have "the"
        messages = question(task, about, images=len(images)) if task in PROMPTS else messages
    return Record(identity, task, tuple(image for image, _ in images), messages, target)


def _task(row: Row, asked: Asked, truth: Any, options: _Options) -> str | None:
    """The task given as an option, by the row, by its layout, or else by the type of the truth."""
    named = [t for t in (options.task, row.fields.get("task"), row.fields.get("ability"), asked.task) if t in TASKS]
    if named:
        return str(named[0])
    shape = _shape(truth)
    if shape is None:
        row.fail("unknown task", f"the truth {short(truth)} fits no task: give task={' | '.join(TASKS)} in the spec")
    return shape


def _shape(truth: Any) -> str | None:
    if whole_number(truth) is not None:
        return "counting"
    if isinstance(truth, str):
        return "qa" if unwrapped(truth).strip().rstrip(".").lower() in ("yes", "no") else None
    if isinstance(truth, Mapping):
        return "grounding" if entry(truth, BOX_NAMES) is not None else None
    if not isinstance(truth, list) or not truth:
        return None
    if len(truth) == 4 and all(isinstance(v, int | float) for v in truth):
        return "grounding"
    if all(entry(item, BOX_NAMES) is not None for item in truth):
        return "detection"
    return "counting" if all(entry(item, POINT_NAMES) is not None for item in truth) else None


# ---- targets


class _Truth(NamedTuple):
    row: Row
    value: Any
    asked: Asked
    size: tuple[int, int] | None
    frame: str
    written: str

    @property
    def prompt(self) -> str:
        """The text of the last question."""
        return next((turn.text for turn in reversed(self.asked.turns) if turn.role == "user"), "")

    def box(self, value: Any, name: str) -> tuple[float, ...] | None:
        """A box in pixels of the first picture."""
        if self.size is None:
            self.row.fail("missing image", "boxes need the picture they are on")
            return None
        value = corners(value) if self.written == "xywh" else value
        return self.row.box(value, self.size, name, self.frame)


def _grounding(truth: _Truth) -> dict[str, Any] | None:
    fields = fields_of("grounding", truth.value)
    box = truth.box(fields["box"], "the truth")
    given = truth.row.first(("expression", "normal_caption"))[1]
    expression = given if isinstance(given, str) and given.strip() else fields.get("expression")
    return None if box is None else {"box": box, "expression": expression or refexp.bare_expression(truth.prompt)}


def _counting(truth: _Truth) -> dict[str, Any] | None:
    row, fields = truth.row, fields_of("counting", truth.value)
    given = row.fields.get("label")
    matched = _COUNTED.fullmatch(truth.prompt)
    label = given if isinstance(given, str) and given.strip() else (matched.group(1) if matched else truth.prompt)
    boxes = row.parse("the truth of counting", read_list, fields["boxes"]) if "boxes" in fields else None
    places = fields.get("points", row.truth("points") if boxes is None else None)
    count = row.parse("the truth of counting", read_count, fields["count"]) if "count" in fields else None
    known = boxes and [truth.box(box, f"the truth's box {n}") for n, box in enumerate(boxes)]
    points = row.points(places, truth.size, frame=truth.frame) if places and truth.size is not None else None
    if row.problems:
        return None
    count = len(known or points or ()) if count is None else count
    if points is not None and len(points) != count:
        row.fail("count and points differ", f"count is {count} and there are {len(points)} points")
        return None
    return {
        "label": label.strip(),
        "count": count,
        "points": points,
        "boxes": [list(box) for box in known if box is not None] if known else None,
    }


def _detection(truth: _Truth) -> dict[str, Any] | None:
    row = truth.row
    fields = fields_of("detection", truth.value)
    places, labels = read_truth(fields["boxes"]), read_truth(fields.get("labels"))
    if not isinstance(places, list) or not isinstance(labels, list) or len(places) != len(labels):
        message = f"the truth of detection must be a list of boxes with labels, got {short(truth.value)}"
        row.fail("wrong type", message)
        return None
    for place, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            names = ", ".join(LABEL_NAMES)
            row.fail("missing field", f"the truth's item {place} has no label ({names}), got {short(label)}")
    boxes = [truth.box(box, f"the truth's box {place}") for place, box in enumerate(places)]
    names = row.truth("categories")
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    names = row.parse("categories", read_names, names) if names is not None else None
    if row.problems:
        return None
    return {
        "boxes": [list(box) for box in boxes if box is not None],
        "labels": labels,
        "crowd": [False] * len(labels),
        "categories": names or sorted(set(labels)),
    }


def _text(truth: _Truth) -> str | None:
    """The truth as written, without answer tags; text that looks like JSON is not parsed."""
    value = truth.asked.truth
    if not isinstance(value, str) or not value.strip():
        truth.row.fail("wrong type", f"the truth must be a text, got {short(value)}")
        return None
    return unwrapped(value).strip()


def _ocr_target(truth: _Truth) -> dict[str, Any] | None:
    text = _text(truth)
    return None if text is None else {"text": text}


def _caption(truth: _Truth) -> dict[str, Any] | None:
    if isinstance(truth.value, list) and truth.value and all(isinstance(v, str) for v in truth.value):
        return {"references": list(truth.value)}
    text = _text(truth)
    return None if text is None else {"references": [text]}


def _qa(truth: _Truth) -> dict[str, Any] | None:
    choices, text = truth.row.truth("choices"), _text(truth)
    if text is None:
        return None
    answer = text.strip().rstrip(".")
    if isinstance(choices, list) and choices:
        named = [str(choice) for choice in choices]
        letter = ord(answer.upper()) - ord("A") if len(answer) == 1 else -1
        place = letter if 0 <= letter < len(named) else (named.index(text) if text in named else None)
        if place is None:
            truth.row.fail("wrong answer", f"the truth {short(text)} is none of the choices {short(named)}")
            return None
        return {"choices": named, "answer": place}
    if answer.lower() not in ("yes", "no"):
        truth.row.fail("wrong answer", f"the truth must be yes or no, or the row have choices; got {short(text)}")
        return None
    return {"answer": answer.lower()}


_TARGETS: Mapping[str, Callable[[_Truth], dict[str, Any] | None]] = MappingProxyType(
    {
        "grounding": _grounding,
        "counting": _counting,
        "detection": _detection,
        "ocr": _ocr_target,
        "caption": _caption,
        "qa": _qa,
    }
)
