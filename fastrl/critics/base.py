"""The interface of a critic: for each case, a score in [0, 1] and feedback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fastrl.data.records import Record, question_of


class CriticError(RuntimeError):
    """The critic cannot score any more cases (unreachable, refused, misconfigured)."""


@dataclass(frozen=True)
class Turn:
    """One answer of the policy with the critic's score and feedback; ``score`` None: it could not be scored."""

    answer: str
    score: float | None = None  # in [0, 1]
    feedback: str = ""
    problem: str = ""  # why there is no score


@dataclass(frozen=True)
class Case:
    """An answer to score: the record has the picture, the question and, for rules, the truth."""

    record: Record
    answer: str
    history: tuple[Turn, ...] = ()  # earlier answers with their feedback, oldest first

    @property
    def question(self) -> str:
        return question_of(self.record.messages[:1])


@dataclass(frozen=True)
class Critique:
    """A critic's result for one case; ``score`` None, with a ``problem``, if its reply could not be parsed."""

    score: float | None
    feedback: str = ""
    problem: str = ""


class Critic(Protocol):
    """Anything that scores answers.

    ``rules``: whether scores come from rules. Dialogues of rule-based critics have requests without reasons, and other
    filters (RePer §3.2).
    """

    rules: bool

    def score(self, cases: Sequence[Case]) -> list[Critique]:
        """One critique per case, in order.

        Raises:
            CriticError: no more cases can be scored. A reply that cannot be parsed gives a critique without a score.
        """
        ...
