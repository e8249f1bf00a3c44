"""The rule critic: F1 of objects, attributes and relations against the truth, weighted 5 : 2 : 2 (RePer §3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastrl.captions import Match, Similarity, compare, parse_caption, truth_of, weighted_f1
from fastrl.critics.base import Case, Critique
from fastrl.critics.feedback import request, rng_for, scored_feedback

FEEDBACK = ("request", "score", "reason")


class RuleCritic:
    """Scores captions of records with truth.

    Args:
        feedback: ``request`` only asks for a better answer, as in the paper's rule-scored dialogues; ``score`` adds the
            score on a scale of 10; ``reason`` also names up to ``named`` wrong statements (which reveals some of the
            truth, as a strong critic would).
        similarity: soft matching (see ``fastrl.captions.match``).
        matching: by what facts are matched, for results.
    """

    rules = True

    def __init__(
        self,
        *,
        feedback: str = "request",
        similarity: Similarity | None = None,
        matching: str = "rules",
        named: int = 2,
    ) -> None:
        if feedback not in FEEDBACK:
            raise ValueError(f"rule critic: feedback must be one of {', '.join(FEEDBACK)}, got {feedback!r}")
        self.feedback, self.similarity, self.named = feedback, similarity, named
        self.matching = matching

    def score(self, cases: Sequence[Case]) -> list[Critique]:
        """Raises ``ValueError`` for a record without truth."""
        return [self._score(case) for case in cases]

    def _score(self, case: Case) -> Critique:
        truth = truth_of(case.record.target, case.record.source or case.record.id)
        matches = compare(parse_caption(case.answer), truth, self.similarity)
        score = weighted_f1(matches)
        rng = rng_for(case.record.id, len(case.history), case.answer)
        if self.feedback == "request":
            return Critique(score, request(rng))
        reason = _reason(matches, self.named) if self.feedback == "reason" else ""
        return Critique(score, scored_feedback(score, reason, rng))


def _reason(matches: Mapping[str, Match], named: int) -> str:
    """Wrong statements, objects first: "There is no red star. The square is not green."."""
    statements = [_denial(fact) for match in matches.values() for fact in match.wrong][:named]
    if not statements and any(match.missing for match in matches.values()):
        statements = ["Something is missing."]
    return " ".join(statements)


def _denial(fact: Any) -> str:
    if isinstance(fact, str):
        return f"There is no such {fact}."
    if len(fact) == 2:
        return f"The {fact[0]} is not {fact[1]}."
    return f"The {fact[0]} is not {fact[1]} the {fact[2]}."
