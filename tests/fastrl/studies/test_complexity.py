"""The complexity study: scenes with an exact number of objects, the same for every arm, and gaps that are compared."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import pytest

from fastrl.data.records import Record
from fastrl.data.scenes import tasks
from fastrl.data.scenes.world import Scene
from fastrl.recipe import load_recipe
from fastrl.studies import complexity
from fastrl.studies.complexity import ARMS, GROUNDING, OBJECTS, Experiment, bundles
from fastrl.studies.runner import folder_name, run_study


@pytest.mark.parametrize("task", ["detection", "grounding"])
def test_a_scene_is_shown_with_1_3_and_6_of_its_objects(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Scene] = {}
    name = f"{task}_record"
    make = getattr(tasks, name)

    def note(rng: random.Random, scene: Scene, identity: str, difficulty: int) -> Record | None:
        seen[identity] = scene
        return make(rng, scene, identity, difficulty)

    monkeypatch.setattr(tasks, name, note)
    found = list(islice(bundles(task, 4), 4))
    assert len({record.id for bundle in found for record in bundle.values()}) == 4 * len(OBJECTS)
    for bundle in found:
        assert tuple(bundle) == OBJECTS
        assert {record.task for record in bundle.values()} == {task}
        shapes = {n: seen[record.id].shapes for n, record in bundle.items()}
        assert [len(each) for each in shapes.values()] == list(OBJECTS)
        assert shapes[6][:3] == shapes[3]
        assert shapes[3][:1] == shapes[1]
        for n, record in bundle.items():
            truth = record.target["boxes"] if task == "detection" else [record.target["box"]]
            assert len(truth) == (n if task == "detection" else 1)
            assert {tuple(box) for box in truth} <= {shape.box for shape in shapes[n]}
    monkeypatch.undo()
    again = islice(bundles(task, 4), 4)
    assert [[r.target for r in b.values()] for b in again] == [[r.target for r in b.values()] for b in found]
    assert next(bundles(task, 5))[6].target != found[0][6].target


def test_scenes_that_are_too_small_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(complexity, "DIFFICULTY", 1)  # an easy scene has two objects at most
    with pytest.raises(ValueError, match="none of 60 scenes in a row can be shown with 6 objects"):
        next(bundles("detection", 0))


@pytest.mark.gate
def test_a_very_small_study_compares_gaps_of_both_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("QUICK_STEPS", 2), ("QUICK_PER_STEP", 3), ("QUICK_HELD_OUT", 4)):
        monkeypatch.setattr(complexity, name, value)
    study = Experiment(quick=True)
    result = run_study(study, tmp_path)
    assert list(result["arms"]) == ["start", "grounding, start", *ARMS.values(), *GROUNDING.values()]
    assert [len(r.target["boxes"]) for r in study.trained["detection", 0]] == [1, 3, 6, 1, 3, 6]
    assert [r.id.rpartition("-")[2] for r in study.trained["grounding", 0]] == ["1", "3", "6", "1", "3", "6"]
    recipes = {arm: load_recipe(path) for arm, path in _recipes(tmp_path).items()}
    orders = [recipes[ARMS[key]].method.order for key in ("SFT", "shuffled")]  # type: ignore[attr-defined]
    assert orders == ["truth", "random"]
    kinds = [recipes[arm].method.kind for arm in GROUNDING.values()]
    assert kinds == ["sft-truth", "perception-r1"]
    for gap, end in (("GRPO − SFT, one order", ""), ("grounding, GRPO − SFT", ", IoU")):
        gaps = {n: result["changes"][f"{gap}, {n}{end}"]["change"] for n in OBJECTS}
        grown = result["changes"][f"{gap}: 6 − 1{end}"]
        assert grown["change"] == pytest.approx(gaps[6] - gaps[1])
    for arm, kind in (("GRPO", "f1"), ("grounding, GRPO", "iou")):
        row = result["arms"][arm]
        assert row["mean"]["mean"] == pytest.approx(sum(row[f"{kind} {n}"]["mean"] for n in OBJECTS) / 3)
    assert "f1 1" not in result["arms"]["grounding, GRPO"]


def _recipes(out: Path) -> dict[str, Path]:
    names = (*ARMS.values(), *GROUNDING.values())
    return {arm: next((out / folder_name(arm)).rglob("recipe.yaml")) for arm in names}
