"""Sizes of groups at equal prompts and at equal answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrl.recipe import load_recipe
from fastrl.studies import rollouts
from fastrl.studies.base import REPORTED, Job
from fastrl.studies.rollouts import SIZES, Experiment, arm_name
from fastrl.studies.runner import run_study


def test_arms_have_equal_prompts_or_equal_answers_and_one_rate() -> None:
    study = Experiment()
    arms = {arm.name: arm.options for arm in study.arms() if arm.group == "grounding"}
    prompts = {arms[arm_name("grounding", size, "prompts")]["prompts"] for size in SIZES}
    answers = {
        arms[arm_name("grounding", size, "answers")]["prompts"] * arms[arm_name("grounding", size, "answers")]["size"]
        for size in SIZES
    }
    assert prompts == {study.prompts}
    assert len(answers) == 1
    assert len(arms) == 5  # the middle size is the same in both
    compared = {c.name for c in study.comparisons()}
    assert "grounding, equal answers: 16 − 4, greedy" in compared
    assert "counting, equal prompts: 16 − 4, distance of points, greedy" in compared
    of_counting = {c.before[1] for c in study.comparisons() if c.name.startswith("counting")}
    assert of_counting == {"sampled exact", "greedy exact", "sampled distance", "greedy distance"}


@pytest.mark.gate
def test_a_very_small_study_samples_the_groups_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"QUICK_STEPS": 1, "QUICK_PROMPTS": 2, "QUICK_HELD_OUT": 4}.items():
        monkeypatch.setattr(rollouts, name, value)
    result = run_study(Experiment(quick=True), tmp_path)
    assert len(result["arms"]) == 6  # grounding only
    stored = [load_recipe(path) for path in tmp_path.glob("*/seed-0/*/run/recipe.yaml")]
    found = sorted((recipe.rollout.group_size, recipe.data.prompts_per_step) for recipe in stored)
    assert found == [(4, 2), (4, 4), (8, 2), (16, 1), (16, 2)]


@pytest.mark.gate
def test_counting_is_measured_by_number_and_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rollouts, "HELD_OUT", 3)
    study = Experiment()
    study.begin()
    start = next(arm for arm in study.arms() if arm.name == "counting, start")
    found = study.run(Job(start, 0, None, tmp_path, tmp_path, [REPORTED]))[REPORTED]
    assert set(found.scores) == {f"{how}{key}" for how in ("sampled", "greedy") for key in ("", " exact", " distance")}
    assert set(found.scores["greedy exact"]) <= {0.0, 1.0}
    assert all(0.0 <= value <= 1.0 for value in found.scores["sampled distance"])
