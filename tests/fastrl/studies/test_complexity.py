"""The complexity study: scenes with an exact number of objects, the same for every arm, and gaps that are compared."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fastrl.data.records import Record
from fastrl.data.scenes import tasks
from fastrl.data.scenes.world import Scene
from fastrl.recipe import load_recipe
from fastrl.studies import complexity
from fastrl.studies.complexity import ARMS, GROUNDING, OBJECTS, Experiment, scenes_with
from fastrl.studies.runner import folder_name, run_study


@pytest.mark.parametrize("objects", OBJECTS)
def test_scenes_have_exactly_so_many_objects_and_ids_of_their_own(objects: int) -> None:
    found = scenes_with(objects, 3, seed=4)
    assert [len(record.target["boxes"]) for record in found] == [objects] * 3
    assert len({record.id for record in found}) == 3
    assert all(record.id.endswith(f"-{objects}") for record in found)


def test_too_few_scenes_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(complexity.OBJECTS, 6, 1)  # an easy scene has two objects at most
    with pytest.raises(ValueError, match="only 0 of 60 scenes have 6 objects, 1 are needed"):
        scenes_with(6, 1, seed=0)


@pytest.mark.parametrize("objects", OBJECTS)
def test_grounding_scenes_have_one_box_among_exactly_so_many_objects(
    objects: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Scene] = []
    make = tasks.grounding_record

    def note(rng: random.Random, scene: Scene, identity: str, difficulty: int) -> Record | None:
        seen.append(scene)
        return make(rng, scene, identity, difficulty)

    monkeypatch.setattr(tasks, "grounding_record", note)
    found = scenes_with(objects, 3, seed=1, task="grounding")
    assert [len(scene.shapes) for scene in seen] == [objects] * len(seen)
    assert all(tuple(r.target["box"]) in {shape.box for scene in seen for shape in scene.shapes} for r in found)
    assert {record.task for record in found} == {"grounding"}
    assert len({record.id for record in found}) == 3
    monkeypatch.undo()
    again = scenes_with(objects, 3, seed=1, task="grounding")
    assert [record.target for record in again] == [record.target for record in found]


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
