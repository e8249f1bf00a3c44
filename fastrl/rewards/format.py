"""Format reward: 1 where an answer has exactly the form its model family writes, 0 otherwise (Perception-R1, Eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fastrl.answers import matches_format, matches_grounding_format
from fastrl.data.records import Record
from fastrl.rewards.reading import MAX_CHARACTERS

FormatCheck = Literal["strict", "loose", "none"]

_STYLES = {"resized": ("qwen2_5",), "thousand": ("qwen2",)}


def well_formed(task: str, answer: str, frame: str, check: FormatCheck = "strict") -> bool:
    """Whether ``answer`` is written the way a model that answers in ``frame`` writes answers to ``task``.

    ``resized`` asks for Qwen2.5-VL's JSON list, ``thousand`` for Qwen2-VL's box tokens; any other frame takes either.
    ``loose`` replicates the released code's unescaped pattern (for grounding only): nearly any text starting with ``<``
    passes. A text longer than is read for coordinates is not well formed.
    """
    if check == "loose":
        return matches_grounding_format(answer, loose=True)
    if len(answer) > MAX_CHARACTERS:
        return False
    return any(matches_format(task, answer, style) for style in _STYLES.get(frame, ("qwen2_5", "qwen2")))


def format_scores(
    task: str, answers: Sequence[str], records: Sequence[Record], frame: str | None, check: FormatCheck
) -> list[float]:
    """:func:`well_formed` as 1.0 or 0.0 per answer; ``frame`` overrides the records' own."""
    pairs = zip(answers, records, strict=True)
    return [float(well_formed(task, answer, frame or record.frame, check)) for answer, record in pairs]
