"""What the studies' jobs share: recipes with other values, training that was stopped, lists without an order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastrl.data import load_data
from fastrl.recipe import RecipeError, load_recipe
from fastrl.rewards.counting import exact_counts
from fastrl.studies import training
from fastrl.studies.base import Arm, Job
from fastrl.studies.training import changed, distance, scene_sets, train_job


def job(folder: Path, rate: float | None = None) -> Job:
    return Job(Arm("a", "a"), 3, rate, folder, folder, ("reported",))


def test_a_recipe_with_other_values_is_checked() -> None:
    recipe = load_recipe("perpo-grounding-tiny")
    assert changed(recipe, {"optim.lr": 0.5, "method.kind": "dpo"}).optim.lr == 0.5
    assert recipe.optim.lr == 1e-4
    with pytest.raises(RecipeError, match=r"optim\.lr"):
        changed(recipe, {"optim.lr": -1.0})


@pytest.mark.parametrize("stopped", [False, True])
def test_a_stopped_training_is_not_measured(stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Any] = []

    def train(recipe: Any, **options: Any) -> Any:
        runs.append(recipe)
        return SimpleNamespace(interrupted=stopped)

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(training, "load_model", lambda recipe: "the model")
    recipe = load_recipe("perpo-grounding-tiny")
    if stopped:
        with pytest.raises(KeyboardInterrupt):
            train_job(recipe, job(tmp_path))
    else:
        assert train_job(recipe, job(tmp_path, 0.25)) == "the model"
        assert (runs[0].optim.lr, runs[0].seed, runs[0].out) == (0.25, 3, str(tmp_path / "run"))
        assert runs[0].method.beta == recipe.method.beta
        assert not runs[0].checkpoint.final
        train_job(recipe, job(tmp_path)._replace(beta=0.7))
        assert (runs[1].optim.lr, runs[1].method.beta) == (recipe.optim.lr, 0.7)


def test_both_sets_have_other_scenes_than_the_data() -> None:
    spec = "scenes:grounding?n=4&seed=1&size=84"
    sets = scene_sets(spec, 3)
    ids = [{record.id for record in records} for records in sets.values()]
    assert [len(each) for each in ids] == [3, 3]
    assert not ids[0] & ids[1]


def test_a_count_is_right_or_not_and_an_answer_without_points_is_as_far_as_can_be() -> None:
    records = [r for r in load_data("scenes:counting?n=40&seed=3&difficulty=3") if r.target["count"] == 2][:3]
    right = ["[" + ", ".join(f'{{"bbox_2d": {box}}}' for box in r.target["boxes"]) + "]" for r in records]
    side = records[0].images[0].size[0]  # type: ignore[union-attr]
    centre = f'[{{"bbox_2d": {[side // 2] * 4}}}, {{"bbox_2d": {[side // 2] * 4}}}]'
    answers = [right[0], "none that can be read", centre]
    assert exact_counts(answers, records) == [1.0, 0.0, 1.0]
    found = distance(answers, records)
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert found[1] == 1.0
    assert found[2] > 0.05  # the right number in the wrong place
