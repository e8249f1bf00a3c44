"""Counting evaluation: fraction of answers with exactly the right number of objects (Perception-R1 on PixMo-Count)."""

from __future__ import annotations

from collections.abc import Sequence

from fastrl.data.records import Record
from fastrl.rewards.counting import CountingReward


def evaluate_counting(records: Sequence[Record], answers: Sequence[str]) -> dict[str, float]:
    """``accuracy`` (number of boxes or points in the answer = true count), ``n`` and ``unparsable``.

    An unparsable answer is wrong, even if the count is zero; an explicit empty list means zero.
    """
    reward = CountingReward(score_by="count", format="none", max_items=20_000)
    exact = reward.score(answers, records)["points"]
    unparsable = reward.readable(answers, records).count(False)
    return {"accuracy": sum(exact) / len(exact), "n": len(exact), "unparsable": unparsable}
