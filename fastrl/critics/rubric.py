"""The rubric prompt for critics that are models, and the strict parser of their replies.

The rubric has five parts with 10 points in total (RePer §3.2: authenticity 4, correctness 2, detail 2, coherence 1,
completeness 1) and asks for a reason; the reply is a JSON object. Except for the parts and their points, the wording is
our own: only the opening of the paper's prompt for scoring a data set is published, and nothing of that for inference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastrl.critics.base import Case, Turn

PARTS = {"authenticity": 4, "correctness": 2, "detail": 2, "coherence": 1, "completeness": 1}
MAX_REPLY = 20_000  # characters read of a reply
MAX_REASON = 600  # characters of a reason that are used
_FENCE = re.compile(r"^\s*```(?:json)?\s*\n(.*?)\n\s*```\s*$", re.DOTALL)


class Verdict(NamedTuple):
    """A parsed reply: score in [0, 1] and reason."""

    score: float
    reason: str


def rubric_prompt(case: Case) -> str:
    """The text of the prompt: the rubric, the question, the history and the answer to judge."""
    parts = "\n".join(f"- {name}: 0 to {points}" for name, points in PARTS.items())
    return (
        "You judge how well an answer describes the image. Give points for:\n"
        f"{parts}\n"
        "Authenticity: nothing is stated that the image does not show. Correctness: attributes, counts and relations "
        "are right. Detail: what matters is described. Coherence: the text reads well. Completeness: no main object is "
        "missing.\n"
        f"{_history(case.history)}"
        f"Question: {json.dumps(case.question, ensure_ascii=False)}\n"
        f"Answer to judge: {json.dumps(case.answer, ensure_ascii=False)}\n"
        'Reply with one JSON object and nothing else: {"score": the sum of the points, from 0 to 10, "reason": "one or '
        'two sentences on what is wrong or missing"}'
    )


def parse_reply(reply: str) -> Verdict | str:
    """The verdict of a reply, or an error message. A reply is one JSON object, bare or in one code fence."""
    text = reply[:MAX_REPLY].strip()
    fenced = _FENCE.match(text)
    try:
        value: Any = json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):
        return f"not a JSON object: {text[:80]!r}"
    if not isinstance(value, dict):
        return f"not a JSON object but {type(value).__name__}"
    score, reason = value.get("score"), value.get("reason")
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 10:
        return f"score must be a number from 0 to 10, got {score!r:.80}"
    if not isinstance(reason, str):
        return f"reason must be a string, got {reason!r:.80}"
    if any("\ud800" <= character <= "\udfff" for character in reason):  # JSON escapes can encode a lone surrogate
        return f"reason must be text, got {reason!r:.80}"
    return Verdict(score / 10, " ".join(reason.split())[:MAX_REASON])


def _history(history: Sequence[Turn]) -> str:
    if not history:
        return ""
    lines = [
        f"Earlier answer {n}: {json.dumps(turn.answer, ensure_ascii=False)}\nFeedback {n}: "
        f"{json.dumps(turn.feedback, ensure_ascii=False)}"
        for n, turn in enumerate(history, start=1)
    ]
    return "\n".join(lines) + "\n"
