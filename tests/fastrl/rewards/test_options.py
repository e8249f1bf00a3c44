"""Choosing a reward and its options: names, values, weights and totals, with errors that list what is allowed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from fastrl.data.records import Record
from fastrl.rewards import REWARDS, reward_for, total

ROW = Record("a", "grounding", (), (), {"box": (0.0, 0.0, 10.0, 10.0), "expression": "x"}, frame="original")


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown task for a reward 'detecton'; did you mean 'detection'\?"):
        reward_for("detecton")


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("grounding", {"metrik": "iou"}, r"grounding reward: unknown option 'metrik'; did you mean 'metric'\?"),
        ("grounding", {"metric": "iou_square"}, r"option 'metric'.*did you mean 'iou_squared'\?"),
        ("counting", {"format": "loose"}, r"counting reward: .*'format'.*known: none, strict"),
        ("detection", {"frame": "pixels"}, r"'frame'.*known: auto, original, padded_unit, resized, thousand, unit"),
        ("detection", {"weights": {"clas": 1.0}}, r"'clas'; did you mean 'class'\?"),
        ("ocr", {"weights": {"text": float("nan")}}, "weight of 'text' must be a finite number"),
        ("detection", {"max_items": 0}, "max_items must be a positive integer, got 0"),
    ],
)
def test_wrong_options_are_refused_with_the_nearest_name(task: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward_for(task, **options)


def test_total_is_the_weighted_sum_and_one_by_default() -> None:
    components = {"iou": [0.5, 0.25], "format": [1.0, 0.0]}
    assert total(components) == [1.5, 0.25]
    assert total(components, {"iou": 2.0, "format": 0.0}) == [1.0, 0.5]
    assert total({}) == []
    with pytest.raises(ValueError, match="unknown reward component 'formt'; did you mean 'format'"):
        total(components, {"formt": 1.0})
    with pytest.raises(ValueError, match="different lengths"):
        total({"iou": [1.0], "format": []})


@pytest.mark.parametrize(
    ("task", "options", "name", "why"),
    [
        ("grounding", {"format": "none"}, "format", "format='none'"),
        ("counting", {}, "count", "exact_bonus=0"),
        ("counting", {"format": "none"}, "format", "format='none'"),
        ("detection", {"format": "none"}, "format", "format='none'"),
        ("trajectory", {"format": "none"}, "format", "format='none'"),
    ],
)
def test_a_weight_of_a_component_that_cannot_occur_is_refused(
    task: str, options: dict[str, Any], name: str, why: str
) -> None:
    with pytest.raises(ValueError, match=f"{task} reward: 'weights' names '{name}', which does not occur with {why}"):
        reward_for(task, **options, weights={name: 0.5})


def test_weights_of_components_that_occur_are_taken() -> None:
    assert reward_for("counting", exact_bonus=1.0, weights={"count": 0.5}).absent == {}
    reward = reward_for("grounding", format="none", weights={"iou": 2.0})
    assert reward.total(reward(["[0, 0, 10, 10]"], ROW)) == [2.0]


def test_shipped_recipes_have_no_dead_weight() -> None:
    from fastrl.methods.rollouts import RecipeRewards
    from fastrl.recipe import load_recipe, shipped_recipes

    for name in shipped_recipes():
        recipe = load_recipe(name)
        task = next((t for t in REWARDS if t in name or t in recipe.data.spec), None)
        if task is not None and recipe.reward.weights:
            RecipeRewards(recipe.reward).of(task)


def test_a_method_that_leaves_the_form_out_leaves_its_weight_out() -> None:
    from fastrl.methods.rollouts import RecipeRewards
    from fastrl.recipe import RewardRecipe

    section = RewardRecipe(weights={"iou": 1.0, "format": 0.5})
    assert RecipeRewards(section, without_format=True).of("grounding").weights == {"iou": 1.0}


def test_a_call_in_no_known_convention_is_refused() -> None:
    reward = reward_for("grounding")
    with pytest.raises(TypeError, match=r"got one string"):
        reward("[0, 0, 10, 10]", ROW)
    with pytest.raises(TypeError, match=r"call as \(answers, record\)"):
        reward(texts=["x"])


@pytest.mark.parametrize("task", sorted(REWARDS))
def test_rewards_have_a_name_to_log_and_travel_between_processes(task: str) -> None:
    reward = reward_for(task)
    assert reward.__name__ == f"{task}_reward"
    assert pickle.loads(pickle.dumps(reward)) == reward == copy.deepcopy(reward)
