"""Checks that advantages are representable in float32; the error names the rewards they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fastrl.rewards.checked import RewardError

if TYPE_CHECKING:
    from fastrl.batch import PromptGroup

SHOWN = 60  # characters of an answer in a message


def check_advantages(groups: Sequence[PromptGroup], advantages: Sequence[Tensor]) -> None:
    """Check the advantages [G] of each group, whose completions have a ``reward``.

    Raises:
        RewardError: rewards differ, but their advantages are not finite in float32, or all 0.
    """
    for group, advantage in zip(groups, advantages, strict=True):
        rewards = [completion.scalars["reward"] for completion in group.completions]
        low, high = min(rewards), max(rewards)
        held = advantage.float()
        finite = bool(held.isfinite().all())
        if low == high or (finite and bool(held.any())):
            continue
        assert group.record is not None
        answer = group.completions[rewards.index(high)]
        where = f"{group.record.id!r} ({group.record.source})" if group.record.source else repr(group.record.id)
        raise RewardError(
            f"record {where}: rewards from {low:g} to {high:g} give advantages that "
            f"{'vanish' if finite else 'overflow'} in float32; the answer with {high:g}: {answer.text[:SHOWN]!r}, "
            f"components {answer.rewards}"
        )
