"""OCR reward: one minus the normalised edit distance (Perception-R1 §3.3; formula as in the development repository)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fastrl.answers import collapse_whitespace, plain_answer
from fastrl.data.records import Record
from fastrl.rewards.base import Components, Reward

# Edit-distance cells (characters × characters) computed for one answer: 64 of them are one machine-word step, so this
# is about a tenth of a second. Two texts of 65,536 characters each are still exact.
MAX_CELLS = 1 << 32


def edit_distance(a: str, b: str, max_cells: int = MAX_CELLS) -> int:
    """Levenshtein distance in characters, unit costs.

    Exact while ``len(a) * len(b) <= max_cells``. Beyond, both texts are cut so that the rest fits and the longer of the
    two cut-off ends is added in full. That is the cost of one valid edit script, so the result never falls below the
    true distance (a reward made from it is never too high) and never exceeds ``max(len(a), len(b))``.
    """
    from rapidfuzz.distance import Levenshtein

    if len(a) * len(b) <= max_cells:
        return Levenshtein.distance(a, b)
    side = math.isqrt(max_cells)
    short = min(len(a), len(b))
    cut_short, cut_long = (side, side) if short > side else (short, max_cells // short)
    cut_a, cut_b = (cut_short, cut_long) if len(a) <= len(b) else (cut_long, cut_short)
    head = Levenshtein.distance(a[:cut_a], b[:cut_b])
    return head + max(len(a) - cut_a, len(b) - cut_b, 0)


def text_similarity(answer: str, truth: str) -> float:
    """``max(0, 1 − lev(answer, truth) / max(len(answer), len(truth)))`` after collapsing whitespace, in [0, 1].

    Answer tags, special tokens and a code fence around the answer do not count, unless the page has them too: of the
    answer as it is and without them, the one nearer to the truth is taken. Two empty texts are equal: 1.
    """
    return max(_similarity(reading, truth) for reading in answer_readings(answer))


def answer_readings(answer: str) -> list[str]:
    """An answer without what may stand around it, and as it is where that is another text."""
    return list(dict.fromkeys((plain_answer(answer), answer.strip())))


def _similarity(answer: str, truth: str) -> float:
    a, b = collapse_whitespace(answer), collapse_whitespace(truth)
    longest = max(len(a), len(b))
    return max(0.0, 1.0 - edit_distance(a, b) / longest) if longest else 1.0


@dataclass(frozen=True, kw_only=True)
class OcrReward(Reward):
    """Component ``text`` in [0, 1]: :func:`text_similarity` of answer and ``record.target["text"]``. No format part."""

    task: ClassVar[str] = "ocr"
    parts: ClassVar[tuple[str, ...]] = ("text",)

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> Components:
        pairs = zip(answers, records, strict=True)
        return {"text": [text_similarity(answer, record.target["text"]) for answer, record in pairs]}

    def readable(self, answers: Sequence[str], records: Sequence[Record]) -> list[bool]:
        return [bool(plain_answer(answer)) for answer in answers]
