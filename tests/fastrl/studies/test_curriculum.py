"""Order and groups of the curriculum's arms, from scores of the initial model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastrl.config.sections import RolloutRecipe
from fastrl.methods.rollouts import sampling_of
from fastrl.recipe import load_recipe
from fastrl.studies import curriculum
from fastrl.studies.curriculum import ARMS, GROUPS, Experiment, at_level
from fastrl.studies.runner import run_study


def test_groups_grow_around_the_size_of_the_other_arms() -> None:
    assert sum(GROUPS) == len(GROUPS) * GROUPS[len(GROUPS) // 2]
    assert list(GROUPS) == sorted(GROUPS)


def test_a_spec_of_another_level() -> None:
    assert at_level("scenes:detection?n=8&difficulty=2&size=84", 4) == "scenes:detection?n=8&difficulty=4&size=84"
    assert at_level("scenes:detection?n=8&difficulty=2", 1) == "scenes:detection?n=8&difficulty=1"


@pytest.mark.gate
def test_a_very_small_study_orders_by_its_own_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"QUICK_STEPS": 3, "QUICK_PROMPTS": 2, "QUICK_HELD_OUT": 4, "QUICK_SCENES": 16, "ANSWERS": 1}
    for name, value in {**sizes, "GROUPS": (2, 3, 4)}.items():
        monkeypatch.setattr(curriculum, name, value)
    sampled: list[int] = []

    def noted(rollout: RolloutRecipe, step: int = 0) -> Any:
        sampled.append(rollout.group_at(step))
        return sampling_of(rollout, step)

    monkeypatch.setattr("fastrl.methods.rollouts.sampling_of", noted)
    result = run_study(Experiment(quick=True), tmp_path)
    assert sampled == [3, 3, 3, 3, 3, 3, 2, 3, 4, 2, 3, 4]  # each step of the arms, in order
    assert list(result["arms"]) == ["start", *ARMS]
    rows = [json.loads(line) for line in (tmp_path / "seed-0" / "scores.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == 16
    stored = {path.parts[-5]: load_recipe(path) for path in tmp_path.glob("*/seed-0/*/run/recipe.yaml")}
    assert {name for name, recipe in stored.items() if recipe.data.curriculum} == {
        "easy-to-hard",
        "easy-to-hard-growing-groups",
    }
    growing = stored["growing-groups"].rollout
    assert [growing.group_at(step) for step in range(3)] == [2, 3, 4]
    assert stored["shuffled"].rollout.group_at(2) == 3
