"""Policy/critic dialogues: ``reflection:FILE`` → records for RePer and, through their candidates, for its baselines.

One JSON object per line, as ``fastrl build reper`` writes them:

    {"id": "caption-1-7", "images": ["…"], "question": "Describe the image.",
     "turns": [{"answer": "…", "score": 0.41, "feedback": "Could you …?"}, {"answer": "…", "score": 0.93}],
     "candidates": [{"answer": "…", "score": 0.41}, …], "target"?: {"references": […], …}}

- ``turns``: one or more, in the order of the dialogue; every ``score`` is in [0, 1] (σ of the loss), and every turn but
  the last has a ``feedback`` text. The paper sorts them from low to high; other orders are accepted.
- ``candidates`` (optional): all scored answers for the picture, on which ``kind: dpo``, ``lipo`` and ``sft`` train;
  default: the turns.
- ``target`` (optional): the truth, for rule scores.

A record's messages are only the question; ``target["dialogue"]`` holds the turns, ``target["list"]`` the candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastrl.data import rows
from fastrl.data.lists import MAX_ANSWERS, RankedList
from fastrl.data.records import Dataset, Record, question
from fastrl.data.rows import load_rows
from fastrl.data.validate import Row, is_number, short

KEYS = rows.KEYS
MAX_TURNS = 16


class SpokenTurn(NamedTuple):
    """One answer, its score in [0, 1] and the feedback that follows it (empty after the last)."""

    answer: str
    score: float
    feedback: str = ""


def load(path: str, query: Mapping[str, str]) -> Dataset:
    """Read a file of dialogues. Raises ``DataError`` for an unreadable file or option."""
    return load_rows(path, query, _record)


def dialogue_of(record: Record) -> tuple[SpokenTurn, ...]:
    """The dialogue of a record. Raises ``ValueError`` if it has none."""
    turns = record.target.get("dialogue")
    if not isinstance(turns, tuple) or not turns:
        where = record.source or record.id
        raise ValueError(f"{where}: the record has no dialogue; use --data reflection:FILE")
    return turns


def dialogue_messages(
    messages: Sequence[Mapping[str, Any]], turns: Sequence[SpokenTurn]
) -> tuple[Mapping[str, Any], ...]:
    """The question's messages followed by answers and feedbacks; ends with the last answer, or with its feedback."""
    dialogue: list[Mapping[str, Any]] = list(messages)
    for number, turn in enumerate(turns, start=1):
        dialogue.append(_message("assistant", turn.answer))
        if turn.feedback or number < len(turns):
            dialogue.append(_message("user", turn.feedback))
    return tuple(dialogue)


def dialogue_row(
    record: Record,
    images: Sequence[str],
    turns: Sequence[SpokenTurn],
    candidates: Sequence[tuple[str, float]],
    *,
    prompt: str,
) -> dict[str, Any]:
    """One line of a dialogue file."""
    spoken = [{"answer": t.answer, "score": t.score} | ({"feedback": t.feedback} if t.feedback else {}) for t in turns]
    kept = ("references", "objects", "attributes", "relations")
    return {
        "id": record.id,
        "images": list(images),
        "question": prompt,
        "turns": spoken,
        "candidates": [{"answer": answer, "score": score} for answer, score in candidates],
        "target": {key: record.target[key] for key in kept if key in record.target},
    }


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _record(row: Row) -> Record | None:
    identity, asked = row.id(), row.text("question")
    paths = tuple(path for path, _ in row.pictures())
    turns = _turns(row, "turns", MAX_TURNS, feedback=True)
    candidates = (
        _turns(row, "candidates", MAX_ANSWERS, feedback=False) if row.fields.get("candidates") is not None else turns
    )
    truth = row.truth("target", {})
    if not isinstance(truth, Mapping):
        row.fail("wrong type", f"target must be an object, got {short(truth)}")
    if row.problems or asked is None:
        return None
    ranked = RankedList(tuple(t.answer for t in candidates), tuple(t.score for t in candidates))
    target = {**truth, "dialogue": turns, "list": ranked}
    return Record(identity, "caption", paths, question("caption", images=len(paths), prompt=asked), target)


def _turns(row: Row, name: str, limit: int, *, feedback: bool) -> tuple[SpokenTurn, ...]:
    value = row.truth(name)
    if not isinstance(value, list) or not 1 <= len(value) <= limit:
        row.fail("wrong type", f"{name} must be a list of 1 to {limit} answers, got {short(value)}")
        return ()
    found = []
    for place, entry in enumerate(value):
        where = f"{name}[{place}]"
        if not isinstance(entry, Mapping):
            row.fail("wrong type", f"{where} must be an object, got {short(entry)}")
            continue
        answer, score, critique = entry.get("answer"), entry.get("score"), entry.get("feedback", "")
        last = place == len(value) - 1
        if not isinstance(answer, str) or not answer.strip():
            row.fail("missing answer", f"{where}.answer must be text, got {short(answer)}")
        if score is None or not is_number(score) or not 0 <= score <= 1:
            row.fail("bad score", f"{where}.score must be a number from 0 to 1, got {short(score)}")
        elif not isinstance(critique, str) or (feedback and not last and not critique.strip()):
            row.fail(
                "missing feedback", f"{where}.feedback must be text (another answer follows), got {short(critique)}"
            )
        elif isinstance(answer, str):
            found.append(SpokenTurn(answer, float(score), "" if last or not feedback else critique))
    return tuple(found)
