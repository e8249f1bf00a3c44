"""OCR reward: one minus the normalised edit distance (Perception-R1 §3.3; formula as in the development repository)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fastrl.answers import canonical, collapse_whitespace, plain_answer, thought_tags, unfinished_thought
from fastrl.data.records import Record
from fastrl.rewards.base import Components, Reward

Normalise = Literal["nfc", "none"]

# Limit of edit-distance cells (characters × characters) per answer: 64 of them take one machine-word operation, so this
# is about a tenth of a second. Two texts of 65,536 characters each are still compared exactly.
MAX_CELLS = 1 << 32


def edit_distance(a: str, b: str, max_cells: int = MAX_CELLS) -> int:
    """Levenshtein distance in characters, unit costs.

    Exact if ``len(a) * len(b) <= max_cells``. Otherwise both texts are cut to fit, and the length of the longer cut-off
    end is added. This is the cost of a valid edit script, so the result is never less than the true distance (the
    reward is never too high) and never more than ``max(len(a), len(b))``.
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


def text_similarity(answer: str, truth: str, normalise: Normalise = "nfc") -> float:
    """``max(0, 1 − lev(answer, truth) / max(len(answer), len(truth)))`` after collapsing whitespace, in [0, 1].

    The answer is read by :func:`answer_readings`; of several readings the one closest to the truth counts. Two empty
    texts are equal (1), but an unfinished thought is not a text (0). ``normalise="none"`` compares the raw texts (apart
    from white space), as published.
    """
    if normalise == "none":
        return _similarity(answer, truth)
    if unfinished_thought(answer) and not (plain_answer(answer) or unfinished_thought(truth)):
        return 0.0
    return max(_similarity(reading, canonical(truth)) for reading in answer_readings(answer, truth))


def answer_readings(answer: str, truth: str) -> list[str]:
    """Possible readings of an answer about a page with the text ``truth``, in Unicode's composed form.

    The first is the answer without thoughts, answer tags, special tokens and a code fence. If the page itself contains
    such marks, the raw answer is another, provided that it has exactly the page's thought tags: a model's thoughts are
    never read.
    """
    readings = [plain_answer(answer)]
    if plain_answer(truth) != truth.strip() and thought_tags(answer) == thought_tags(truth):
        readings.append(answer.strip())
    return list(dict.fromkeys(map(canonical, readings)))


def _similarity(answer: str, truth: str) -> float:
    a, b = collapse_whitespace(answer), collapse_whitespace(truth)
    longest = max(len(a), len(b))
    return max(0.0, 1.0 - edit_distance(a, b) / longest) if longest else 1.0


@dataclass(frozen=True, kw_only=True)
class OcrReward(Reward):
    """Component ``text`` in [0, 1]: :func:`text_similarity` of answer and ``record.target["text"]``. No format part.

    Args:
        normalise: ``nfc`` (canonically equal texts are equal; tags, fences and thoughts do not count) or ``none`` (raw
            texts).
    """

    task: ClassVar[str] = "ocr"
    parts: ClassVar[tuple[str, ...]] = ("text",)

    normalise: Normalise = "nfc"

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> Components:
        pairs = zip(answers, records, strict=True)
        return {"text": [text_similarity(answer, record.target["text"], self.normalise) for answer, record in pairs]}

    def readable(self, answers: Sequence[str], records: Sequence[Record]) -> list[bool]:
        return [bool(answer.strip() if self.normalise == "none" else plain_answer(answer)) for answer in answers]
