"""The complexity study: scenes with an exact number of objects, the same for every arm, and gaps that are compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrl.recipe import load_recipe
from fastrl.studies import complexity
from fastrl.studies.complexity import ARMS, OBJECTS, Experiment, scenes_with
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


@pytest.mark.gate
def test_a_very_small_study_compares_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("QUICK_STEPS", 2), ("QUICK_PER_STEP", 3), ("QUICK_HELD_OUT", 4)):
        monkeypatch.setattr(complexity, name, value)
    study = Experiment(quick=True)
    result = run_study(study, tmp_path)
    assert list(result["arms"]) == ["start", *ARMS.values()]
    assert [len(r.target["boxes"]) for r in study.trained[0]] == [1, 3, 6, 1, 3, 6]
    orders = {key: load_recipe(path).method for key, path in _recipes(tmp_path).items()}
    assert [orders[ARMS[key]].order for key in ("SFT", "shuffled")] == ["truth", "random"]  # type: ignore[attr-defined]
    gaps = {n: result["changes"][f"GRPO − SFT, one order, {n}"]["change"] for n in OBJECTS}
    grown = result["changes"]["GRPO − SFT, one order: 6 − 1"]
    assert grown["change"] == pytest.approx(gaps[6] - gaps[1])
    row = result["arms"]["GRPO"]
    assert row["mean"]["mean"] == pytest.approx(sum(row[f"f1 {n}"]["mean"] for n in OBJECTS) / 3)


def _recipes(out: Path) -> dict[str, Path]:
    return {arm: next((out / folder_name(arm)).rglob("recipe.yaml")) for arm in ARMS.values()}
