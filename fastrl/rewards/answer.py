"""An answer to score, and the answers on which scorers are tried before sampling."""

from __future__ import annotations

from typing import NamedTuple

from fastrl.answers import format_answer
from fastrl.data.records import Record

NOTHING = "nothing"


class Answer(NamedTuple):
    """One answer to a record."""

    text: str
    token_ids: list[int]
    record: Record


def answers_to_try(record: Record) -> list[Answer]:
    """Two answers to a record with views and style: the truth as the model would write it, and the text "nothing"."""
    try:
        view = record.views[0] if record.views else None
        truth = format_answer(record.task, record.target, record.style or "qwen2_5", view)
    except (ValueError, KeyError, IndexError, TypeError):  # a user's own task, or truth without an answer format
        truth = NOTHING
    return [Answer(text, [0], record) for text in (truth, NOTHING)]
