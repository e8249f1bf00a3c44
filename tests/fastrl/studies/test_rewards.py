"""The study of the detection reward: what each arm is paid for, and how all are judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastrl.data import load_data
from fastrl.recipe import load_recipe
from fastrl.studies import rewards
from fastrl.studies.base import Job
from fastrl.studies.rewards import PARTS, SEQUENCE, UNORDERED, Experiment, Unordered, ap_of_all, ap_of_each, f1
from fastrl.studies.runner import run_study


def test_parts_are_added_in_turn_and_the_whole_chooses_the_rate() -> None:
    arms = {arm.name: arm.options for arm in Experiment().arms() if arm.group}
    assert next(iter(arms)) == "+ missing"  # the group's first arm
    paid = {name: options["parts"] for name, options in arms.items()}
    assert paid == {
        "format": PARTS[:1],
        **{f"+ {part}": PARTS[: count + 1] for count, part in enumerate(PARTS) if count},
        SEQUENCE: PARTS,
        UNORDERED: PARTS,
    }
    assert {name for name, options in arms.items() if options["matching"] == "sequence"} == {SEQUENCE, UNORDERED}
    assert {name for name, options in arms.items() if options.get("unordered")} == {UNORDERED}


def test_an_unordered_truth_is_the_same_objects_in_an_order_that_stays() -> None:
    ordered = load_data("scenes:detection?n=40&seed=3&difficulty=4")
    mixed = Unordered(ordered)
    assert len(mixed) == 40
    moved = 0
    for number, record in enumerate(ordered):
        found, again = mixed[number], mixed[number]
        assert found.id == record.id
        assert found.target == again.target
        assert sorted(_truth(found)) == sorted(_truth(record))
        moved += _truth(found) != _truth(record)
    assert moved > 20


def test_only_one_arm_is_trained_on_truths_in_random_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(rewards, "train_job", lambda recipe, job, records: given.update({job.arm.name: records}))
    study = Experiment(quick=True)
    study.start = None  # type: ignore[assignment]
    for arm in study.arms():
        if arm.group:
            study.run(Job(arm, 0, None, tmp_path, tmp_path, ()))
    unordered = given.pop(UNORDERED)
    assert set(given.values()) == {None}  # the recipe's own
    ordered = load_data(study.recipe.data.spec)
    assert len(unordered) == len(ordered)
    assert sum(_truth(unordered[i]) != _truth(ordered[i]) for i in range(20)) > 5


def test_answers_are_judged_by_boxes_and_labels() -> None:
    records = [r for r in load_data("scenes:detection?n=12&seed=3") if len(r.target["boxes"]) > 1][:3]
    right = ["[" + ", ".join(_item(b, n) for b, n in _truth(r)) + "]" for r in records]
    wrong = [text.replace('"label": "', '"label": "un') for text in right]
    assert f1(right, records) == [1.0] * 3
    assert ap_of_each(right, records) == pytest.approx([1.0] * 3)
    assert ap_of_all(right, records)["AP"] == pytest.approx(1.0)
    assert f1(wrong, records) == [1.0] * 3
    assert ap_of_each(wrong, records) == [0.0] * 3
    assert ap_of_all(["[]"] * 3, records)["AP"] == 0.0


def _truth(record: object) -> list[tuple[list[float], str]]:
    target = record.target  # type: ignore[attr-defined]
    return list(zip(target["boxes"], target["labels"], strict=True))


def _item(box: list[float], name: str) -> str:
    return f'{{"bbox_2d": [{", ".join(str(v) for v in box)}], "label": "{name}"}}'


@pytest.mark.gate
def test_a_very_small_study_trains_on_the_rewards_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("QUICK_STEPS", 1), ("QUICK_PROMPTS", 2), ("QUICK_HELD_OUT", 6)):
        monkeypatch.setattr(rewards, name, value)
    result = run_study(Experiment(quick=True), tmp_path)
    assert all({"greedy_ap", "AP"} <= set(row) for row in result["arms"].values())
    assert {"optimal match − sequence, AP", "optimal match − sequence, truths in random orders, AP"} <= set(
        result["claims"]
    )
    stored = {path.parts[-5]: load_recipe(path) for path in tmp_path.glob("*/seed-0/*/run/recipe.yaml")}
    assert stored["class"].reward.weights == {"format": 1, "location": 1, "class": 1, "f1": 0, "missing": 0}
    assert stored["all-in-sequence"].reward.options["matching"] == "sequence"
    assert stored["missing"].reward.options["matching"] == "optimal"
