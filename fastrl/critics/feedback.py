"""The wording of a critic's feedback for the policy: the score, the reason, and the request for a better answer.

It follows RePer's examples ("This caption can only get the score 5. … Could you generate a better one?"); the pools of
paraphrases are our own.
"""

from __future__ import annotations

import random

REQUESTS = (
    "Could you generate a better answer?",
    "Could you generate a better one?",
    "Can you give a better answer?",
    "Please try to describe the image again, more accurately.",
    "Please suggest an improved one.",
    "Could you improve this answer?",
    "Would you give it another try with a better answer?",
    "Please provide a better description.",
)
_LOW = "This caption can only get the score {}."
_HIGH = "This caption qualifies for a score of {}."
GOOD = 0.7  # from this score on, the wording for good answers is used


def request(rng: random.Random) -> str:
    """A request for a better answer, without a reason (rule-scored dialogues)."""
    return rng.choice(REQUESTS)


def scored_feedback(score: float, reason: str, rng: random.Random) -> str:
    """Score on a scale of 10, reason and request (model-scored dialogues)."""
    shown = f"{10 * score:.1f}".removesuffix(".0")
    parts = [(_HIGH if score >= GOOD else _LOW).format(shown), " ".join(reason.split()), request(rng)]
    return " ".join(part for part in parts if part)


def rng_for(*parts: object) -> random.Random:
    """A generator that depends only on ``parts``, so that wording does not depend on the order of work."""
    return random.Random("/".join(str(part) for part in parts))
