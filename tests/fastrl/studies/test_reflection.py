"""The study of reflection: what stops it, own captions as lessons, and dialogues with others' reasons."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.data.records import Record
from fastrl.models.load import Policy
from fastrl.models.open import open_policy, resolve_model
from fastrl.recipe import load_recipe
from fastrl.studies import reflection
from fastrl.studies.base import Measured
from fastrl.studies.machine import cores
from fastrl.studies.reflection import CONTROL, Experiment, base_of, own_lessons
from fastrl.studies.runner import run_study
from fastrl.toy.teach.build import build


def scores(own: float, other: float) -> dict[str, Measured]:
    ids = [str(i) for i in range(20)]
    return {"start": Measured(ids, {"score 2": [own + 0.01 * (i % 3) for i in range(20)], "other 2": [other] * 20})}


@pytest.mark.parametrize(("own", "other", "stops"), [(0.9, 0.7, False), (0.7, 0.7, False), (0.7, 0.72, True)])
def test_a_base_that_uses_no_reasons_stops_the_study(own: float, other: float, stops: bool) -> None:
    told = Experiment(quick=True).obstacle(scores(own, other))
    assert bool(told) is stops
    assert not stops or "the base uses no reasons" in told


def test_every_alpha_has_its_own_rate_and_the_control_too() -> None:
    arms = {arm.name: arm for arm in Experiment().arms()}
    assert list(arms) == ["start", "α 0", "α 1", "α 2", "α 5", "α 10", CONTROL]
    groups = [arm.group for arm in arms.values() if arm.group]
    assert len(set(groups)) == len(groups)
    assert [name for name, arm in arms.items() if arm.options.get("shuffled")] == [CONTROL]


def test_that_the_reasons_help_is_claimed_of_the_same_turn_with_others_reasons() -> None:
    study = Experiment()
    compared, claims = {c.name: c for c in study.comparisons()}, study.claims()
    for arm in (arm.name for arm in study.arms()):
        for turn in (2, 3):
            found = compared[f"{arm}: own − others' reasons, turn {turn}"]
            assert (found.before, found.after) == ((arm, f"other {turn}"), (arm, f"score {turn}"))
    assert {name: way for name, way in claims.items() if "reasons" in name} == {
        "α 1: own − others' reasons, turn 2": "rises",
        "α 1: own − others' reasons, turn 3": "rises",
    }


@pytest.mark.parametrize("quick", [False, True])
def test_fewer_false_captions_are_claimed_of_the_papers_best_alpha_too(quick: bool) -> None:
    study = Experiment(quick=quick)
    falling = {name for name, way in study.claims().items() if way == "falls"}
    assert falling == {f"α {a} − α 0: false captions, turn 3" for a in (1, 10)}
    assert falling <= {c.name for c in study.comparisons()}


@pytest.mark.gate
def test_a_very_small_study_trains_on_reasons_and_on_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"QUICK_PICTURES": 24, "QUICK_STEPS": 1, "QUICK_HELD_OUT": 6, "MIN_BEST": 0.5}
    for name, value in sizes.items():
        monkeypatch.setattr(reflection, name, value)

    def prepare(self: Experiment, seed: int, shared: Path) -> None:
        if not base_of(shared).exists():
            shutil.copytree(resolve_model("tiny:language"), base_of(shared))

    monkeypatch.setattr(Experiment, "prepare", prepare)
    monkeypatch.setattr(Experiment, "obstacle", lambda self, untrained: "")
    result = run_study(Experiment(quick=True), tmp_path)
    assert list(result["arms"]) == ["start", "α 0", "α 1", "α 10", CONTROL]
    assert {"score 1", "score 2", "score 3", "other 2", "other 3", "false 1"} <= set(result["arms"]["α 10"])
    assert "α 10: turn 3 − 2" in result["changes"]
    own, others = (
        [json.loads(line) for line in (tmp_path / "seed-0" / name).read_text().splitlines()]
        for name in ("dialogues.jsonl", "shuffled.jsonl")
    )
    assert own
    said = [[[turn.get("feedback") for turn in row["turns"]] for row in rows] for rows in (own, others)]
    assert said[0] != said[1]
    stored = [load_recipe(path) for path in tmp_path.glob("*/seed-0/*/run/recipe.yaml")]
    assert {recipe.method.turns for recipe in stored} == {"all"}  # type: ignore[attr-defined]
    assert sorted(recipe.method.alpha for recipe in stored) == [0, 1, 1, 10]  # type: ignore[attr-defined]
    assert result["stopped"] == ""


@pytest.mark.gate
def test_own_captions_become_lessons_and_the_base_is_taught_by_both_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = own_lessons(open_policy("tiny:language"), 48)
    assert len({lesson.id for lesson in found}) == len(found) > 4
    assert any(lesson.target["dialogue"][0].score < 1.0 for lesson in found)
    assert all(lesson.target["dialogue"][-1].score == pytest.approx(1.0) for lesson in found)
    threads: list[int] = []

    def spied(*arguments: Any, **options: Any) -> None:
        threads.append(options["threads"])
        build(*arguments, **options)

    def own(policy: Policy, count: int) -> list[Record]:
        threads.append(torch.get_num_threads())
        return found

    monkeypatch.setattr(reflection, "build", spied)
    monkeypatch.setattr(reflection, "own_lessons", own)
    for name, value in {"QUICK_TAUGHT": 1, "ROWS": 2, "QUICK_OWN_STEPS": 1, "OWN_PER_STEP": 4}.items():
        monkeypatch.setattr(reflection, name, value)
    monkeypatch.setattr(reflection, "QUICK_HELD_OUT", 4)
    before = torch.get_num_threads()
    torch.set_num_threads(cores() + 1)  # neither of what this process has nor of what a worker has
    try:
        result = run_study(Experiment(quick=True), tmp_path)
    finally:
        torch.set_num_threads(before)
    assert threads == [cores(), cores()]  # in both parts of the teaching
    assert (tmp_path / "base" / "config.json").is_file()
    assert json.loads((tmp_path / "lessons" / "taught.json").read_text()) == {"steps": 1, "threads": cores()}
    assert list(result["arms"]) == ["start"]  # one step teaches nothing
    assert "the base uses no reasons" in result["stopped"]
    assert "nothing was trained" in (tmp_path / "study.html").read_text()
