"""Referring expressions, one row each → grounding records.

Layouts (recognised by the row's fields):

- VLM-R1 / Perception-R1: ``image``, ``problem``, ``solution`` [x1, y1, x2, y2] in pixels or ``normalized_solution`` in
  0-1000; the bare expression is ``normal_caption``, or is extracted from ``problem``
- plain: ``image``, ``expression``, ``bbox``

A null box means that the object is absent: the row is left out and counted, since grounding needs a box.

Query keys: ``images`` (folder the image paths start from), ``limit``, ``seed``, ``box`` (``xyxy`` or ``xywh``),
``frame`` (unit of the boxes: ``original``, pixels; ``unit``, 0 to 1; ``thousand``), ``prompt`` (``paper``:
Perception-R1's; ``row``: the row's own ``problem``; or a template, see ``prompts``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastrl.data import rows
from fastrl.data.records import Dataset, Record, question
from fastrl.data.rows import IMAGE_FIELDS, LeftOut, choice_option, load_rows
from fastrl.data.truth import read_truth
from fastrl.data.validate import SIDES, Row, corners, fail, short

KEYS = (*rows.KEYS, "box", "frame", "prompt")
EXPRESSION_FIELDS = ("expression", "normal_caption", "caption", "problem", "question")
BOX_FIELDS = ("bbox", "solution", "box", "normalized_solution")
_INSTRUCTION = re.compile(
    r"\?$|\b(please|bounding box(es)?|bbox|coordinates?|json|output|locate|detect|find|point (at|to)|identify|"
    r"provide|ground|(in|of) (the|this) (image|picture))\b",
    re.I,
)
_QUESTIONS = (
    re.compile(
        r"please provide the bounding box coordinates? of the region this sentence describes:\s*+(.+)", re.I | re.S
    ),
    re.compile(r"output the bounding box of (.+) in the image\.?", re.I | re.S),
)


def load(path: str, query: Mapping[str, str]) -> Dataset:
    """Read a file of referring expressions. Raises ``DataError`` for an unreadable file or option."""
    written = choice_option(query, "box", ("xyxy", "xywh"), path)
    frame = choice_option(query, "frame", tuple(SIDES), path)
    prompt = choice_option(query, "prompt", ("paper", "row"), path)
    data = load_rows(path, query, lambda row: record(row, written, frame, prompt))
    check_expressions(data, path)
    return data


def check_expressions(data: Sequence[Record], path: str) -> None:
    """Raise ``DataError`` if all rows have the same instruction as their expression, because the expression must then
    be in another column."""
    expressions = {record.target["expression"] for record in data}
    if len(data) > 1 and len(expressions) == 1 and _INSTRUCTION.search(text := expressions.pop()):
        message = (
            f"the expression is {short(text)} in all {len(data)} rows, which is an instruction and names no object. It "
            f"is read from the first of the columns {', '.join(EXPRESSION_FIELDS)}; put the name of each box's object "
            "in the column expression"
        )
        raise fail(path, "one instruction in every row", message)


def bare_expression(text: str) -> str:
    """The expression inside a question that asks for it, or the text itself, without image tag and final full stop."""
    text = text.replace("<image>", "").strip()
    for pattern in _QUESTIONS:
        match = pattern.fullmatch(text)
        if match:
            text = match.group(1)
    return text.strip().rstrip(".").strip()


def record(row: Row, written: str, frame: str, prompt: str) -> Record | LeftOut | None:
    """One row as a record; None where ``row.problems`` says why not."""
    identity = row.id()
    image = row.image(*IMAGE_FIELDS)
    text = row.text(*EXPRESSION_FIELDS)
    expression = bare_expression(text) if text else None
    if text and not expression:
        row.fail("empty expression", "expression is empty")
    own_prompt = row.text("problem", "question") if prompt == "row" else None
    name, value = row.first(BOX_FIELDS)
    if name not in row.fields:
        row.fail("missing field", f"no box: one of {', '.join(BOX_FIELDS)} is needed")
        return None
    value = read_truth(value)
    if value is None:
        return LeftOut("no such object", f"{name} is null: the expression names nothing in the image")
    box = _box(row, name, value, (written, frame), image[1]) if image else None
    if image is None or box is None or not expression:
        return None
    # "the {}" is already part of the prompt.
    asked = re.sub(r"^the\s+", "", expression, flags=re.I)
    messages = question("grounding", asked, prompt=own_prompt)
    return Record(identity, "grounding", (image[0],), messages, {"box": box, "expression": expression})


def _box(row: Row, name: str, value: Any, how: tuple[str, str], size: tuple[int, int]) -> tuple[float, ...] | None:
    written, frame = how
    if name == "normalized_solution":
        return row.box(value, size, name, "thousand")
    if written == "xywh" and name in ("bbox", "box"):
        value = corners(value)
    return row.box(value, size, name, frame)
