"""How difficult a record is, for a curriculum: by its own fields, or by a file of scores (``fastrl score``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastrl.data.records import Record
from fastrl.data.validate import DataError, Problem, fail, is_number, short


class Curriculum(NamedTuple):
    """From easy to hard: ``by`` a column or a key of the target, from the easiest ``start`` of the rows to all of them
    over ``steps`` steps. ``scores``: difficulty by record id instead, which ``by`` names in a file."""

    by: str
    steps: int
    start: float = 0.2
    scores: Mapping[str, float] | None = None


def difficulty(record: Record, curriculum: Curriculum) -> float:
    """The difficulty of a record: its score, or a number in its columns or target, or the length of a list or text
    there.

    Raises:
        DataError: the record has no such value.
    """
    by, where = curriculum.by, record.source or record.id
    if curriculum.scores is not None:
        if record.id not in curriculum.scores:
            raise fail(where, "no difficulty", f"data.curriculum.scores has no line for record {short(record.id)}")
        return curriculum.scores[record.id]
    value: Any = record.columns.get(by, record.target.get(by))
    if isinstance(value, str | list | tuple):
        return float(len(value))
    if not is_number(value):
        have = ", ".join(sorted({*record.columns, *record.target}))
        raise fail(
            where, "no difficulty", f"data.curriculum.by: no number, list or text in {short(by)}; the record has {have}"
        )
    return float(value)


def read_scores(path: Path, by: str) -> dict[str, float]:
    """The number ``by`` of each line of a file of scores, by record id.

    Raises:
        DataError: the file cannot be read, or a line has no id or no such number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise fail(str(path), "unreadable file", f"data.curriculum.scores: {error}") from None
    found: dict[str, float] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        row = _parsed(line)
        identity, value = row.get("id"), row.get(by)
        if not isinstance(identity, str) or value is None or not is_number(value):
            message = (
                f"data.curriculum.scores needs id and a number {short(by)} in every line; this one has {sorted(row)}"
            )
            problems.append(Problem(f"{path}:{number}", "no difficulty", message))
        else:
            found[identity] = float(value)
    if problems:
        raise DataError(problems)
    return found


def _parsed(line: str) -> Mapping[str, Any]:
    """A line as an object; empty if it is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, Mapping) else {}
