"""Checks the results of rewards; errors name the record, component and answer."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from fastrl.data.records import Record
from fastrl.rewards.base import Components, Reward

# For larger rewards, squared differences would leave the range in which advantages are computed, or small differences
# between other answers would vanish. The rewards of all tasks are far smaller.
LARGEST = 1e9
_SHOWN = 60  # characters of an answer in a message


class RewardError(ValueError):
    """A reward raised an error or returned an invalid value. The message names record, component and answer."""


def checked_scores(reward: Reward, answers: Sequence[str], records: Sequence[Record]) -> tuple[Components, list[float]]:
    """Components of ``answers[i]`` as an answer to ``records[i]``, and their weighted sums, all finite numbers.

    A component may be None for some answers (it does not apply to them) and then adds nothing to their sums; an answer
    for which all are None has no reward.

    Raises:
        RewardError: the reward raised; did not return a mapping of names to lists of the answers' length; a value is
            not a number (but a string or tensor), not finite, or beyond ±``LARGEST``; or all components are None for an
            answer.
    """
    try:
        given: Any = reward.score(answers, records)
    except Exception as error:
        raise RewardError(_raised(reward, answers, records, error)) from error
    if not isinstance(given, Mapping) or not given:
        raise RewardError(f"{reward.__name__}: score must give a list for each component, got {given!r:.80}")
    for name, values in given.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(answers):
            count = len(values) if isinstance(values, Sequence) else type(values).__name__
            raise RewardError(f"{reward.__name__}: component {name!r}: {count} values for {len(answers)} answers")
    for i, (answer, record) in enumerate(zip(answers, records, strict=True)):
        values = {name: column[i] for name, column in given.items()}
        if all(value is None for value in values.values()):
            raise RewardError(
                f"{place(reward.__name__, record, answer)}: every component ({', '.join(values)}) is None"
            )
        for name, value in values.items():
            wrong = wrong_value(value)
            if wrong is not None:
                raise RewardError(f"{place(reward.__name__, record, answer)}: component {name!r} {wrong}")
    sums = reward.total({name: [value or 0.0 for value in column] for name, column in given.items()})
    return {name: list(column) for name, column in given.items()}, sums


def wrong_value(value: Any) -> str | None:
    """Why a value is not a valid reward; None if it is valid or None."""
    if value is None:
        return None
    if not isinstance(value, numbers.Real):
        return f"must be a number, got {type(value).__name__} {value!r:.60}"
    size: Any = abs(value)
    if not size <= LARGEST:
        what = "beyond which advantages overflow or vanish" if size < float("inf") else "and finite"
        return f"is {_shown(value)}: rewards must lie within ±{LARGEST:g}, {what}"
    return None


def _shown(value: Any) -> str:
    huge = isinstance(value, int) and value.bit_length() > 4096  # Python refuses to print such numbers
    return f"an integer of {value.bit_length()} bits" if huge else f"{value!r:.60}"


def place(name: str, record: Record, answer: str) -> str:
    """The record and answer of a message about a reward."""
    shown = answer if len(answer) <= _SHOWN else f"{answer[:_SHOWN]}…"
    return f"{name}: record {record.id!r}{f' ({record.source})' if record.source else ''}, answer {shown!r}"


def _raised(reward: Reward, answers: Sequence[str], records: Sequence[Record], error: Exception) -> str:
    """The message for an error of a reward, with the answer that causes it if it also raises for that answer alone."""
    for answer, record in zip(answers, records, strict=True):
        try:
            reward.score([answer], [record])
        except Exception as alone:
            return f"{place(reward.__name__, record, answer)}: raised {type(alone).__name__}: {alone}"
    return f"{reward.__name__}: raised {type(error).__name__}: {error}"
