"""Detect steps without a learning signal: a group with equal rewards has zero advantages and no gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

AFTER = 3  # consecutive steps before a message
HINT = (
    "See the sample answers: if all of them get the lowest reward, the model may not answer in the form that the "
    "reward reads; if all get the highest, the data is too easy. Otherwise raise rollout.temperature or "
    "rollout.group_size, or set method.zero_variance: resample"
)


class EqualRewards:
    """Counts the steps of a run in which the rewards of every group were equal.

    Args:
        done: the last completed step before this (possibly resumed) run.
        last: the run's last step.
    """

    def __init__(self, done: int, last: int) -> None:
        self._last, self._begin = last, done
        self._streak = self._all = 0
        self._reported = False

    def step(self, row: Mapping[str, Any]) -> str:
        """Count a step by its row of metrics; return a message, or "" if there is nothing to report."""
        number, equal = int(row["step"]), row.get("reward/group_std") == 0
        self._all += equal
        self._streak = self._streak + 1 if equal else 0
        if not equal:
            self._reported = False
        due = self._streak >= AFTER or (equal and number == self._last)
        if not due or self._reported:
            return ""
        self._reported = True
        first = number - self._streak + 1
        steps = f"step {number}" if first == number else f"steps {first} to {number}"
        mean = row.get("reward/mean")
        reward = f" (mean reward {mean:.3g})" if isinstance(mean, int | float) else ""
        return f"{steps}: the rewards of every group were equal{reward}, so there was nothing to learn from. {HINT}"

    def end(self, done: int) -> str:
        """A message after the last step ``done`` if all steps had equal rewards, else ""."""
        steps = done - self._begin
        if not steps or self._all < steps:
            return ""
        which = f"all {steps} steps" if steps > 1 else "its only step"
        return f"in {which}, no group had different rewards: the model has learned nothing from them"
