"""Whether a run has anything to learn from: a group whose rewards are all equal has no advantage, and no gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

AFTER = 3  # such steps in a row before it is said
HINT = (
    "See the sample answers: if all of them get the lowest reward, the model may not answer in the form that the "
    "reward reads; if all get the highest, the data is too easy. Otherwise raise rollout.temperature or "
    "rollout.group_size, or set method.zero_variance: resample"
)


class EqualRewards:
    """Counts the steps of a run in which the rewards of every group were equal.

    Args:
        done: the last step before this run, or part of a run, begins; last: its last step.
    """

    def __init__(self, done: int, last: int) -> None:
        self._last, self._begin = last, done
        self._streak = self._all = 0
        self._said = False

    def step(self, row: Mapping[str, Any]) -> str:
        """Count a step with its row of metrics; return what to say about it, "" in most cases."""
        number, equal = int(row["step"]), row.get("reward/group_std") == 0
        self._all += equal
        self._streak = self._streak + 1 if equal else 0
        if not equal:
            self._said = False
        due = self._streak >= AFTER or (equal and number == self._last)
        if not due or self._said:
            return ""
        self._said = True
        first = number - self._streak + 1
        steps = f"step {number}" if first == number else f"steps {first} to {number}"
        mean = row.get("reward/mean")
        reward = f" (mean reward {mean:.3g})" if isinstance(mean, int | float) else ""
        return f"{steps}: the rewards of every group were equal{reward}, so there was nothing to learn from. {HINT}"

    def end(self, done: int) -> str:
        """What to say after the last step, ``done``: "" unless every step was of this kind."""
        steps = done - self._begin
        if not steps or self._all < steps:
            return ""
        return f"no group of the {steps} steps had rewards that differ: the rewards have taught the model nothing"
