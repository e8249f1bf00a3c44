"""The weights of reward components, for every place where a recipe can set them."""

from __future__ import annotations

from typing import Any

import pytest

from fastrl.config.sections import RewardRecipe, RolloutRecipe
from fastrl.data.records import Record
from fastrl.methods.rollouts import RecipeRewards, sampling_of

RECORD = Record("a", "grounding", (), (), {"box": (0, 0, 1, 1)})
JUDGED = {"url": "http://127.0.0.1:9/v1"}


@pytest.mark.parametrize(
    ("section", "weights"),
    [
        ({}, {}),
        ({"weights": {"iou": 2}}, {"iou": 2}),
        ({"options": {"weights": {"iou": 3}}}, {"iou": 3}),  # the reward's own option, used for totals
        ({"options": {"weights": {"iou": 3}}, "weights": {"iou": 2}}, {"iou": 3}),
        ({"judge": JUDGED}, {"judge": 1}),
        ({"judge": {**JUDGED, "weight": 0.5}}, {"judge": 0.5}),
        ({"judge": JUDGED, "weights": {"judge": 0.25, "iou": 2}}, {"judge": 0.25, "iou": 2}),
    ],
)
def test_weights_of_components(section: dict[str, Any], weights: dict[str, float]) -> None:
    rewards = RecipeRewards(RewardRecipe(**section))
    assert rewards.weights_of(RECORD) == weights
    reward = rewards.of("grounding")
    assert reward.total({"iou": [1.0], "format": [0.0]}) == [weights.get("iou", 1)]


def test_a_group_schedule_says_how_many_answers_a_step_samples() -> None:
    rollout = RolloutRecipe(group_size=4, group_schedule={10: 8, 30: 16})  # type: ignore[call-arg]
    assert [sampling_of(rollout, step).n for step in (0, 9, 10, 29, 30, 99)] == [4, 4, 8, 8, 16, 16]
    assert sampling_of(rollout).n == 4
    assert rollout.group_sizes == [4, 8, 16]
    assert RolloutRecipe(group_size=2, group_schedule={0: 8}).group_sizes == [8]  # type: ignore[call-arg]
