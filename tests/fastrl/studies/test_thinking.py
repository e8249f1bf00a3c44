"""Lessons with and without a thought, and what both are trained and judged on."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrl.data.records import question_of
from fastrl.models.open import open_policy
from fastrl.recipe import load_recipe
from fastrl.rewards import reward_for
from fastrl.studies import thinking
from fastrl.studies.runner import run_study
from fastrl.studies.thinking import FORMS, SUFFIX, Experiment, asked, lesson, scenes


def test_both_forms_of_a_lesson_earn_full_marks_in_their_own_form_only() -> None:
    policy = open_policy("tiny:perception")
    records = scenes(6, 3)
    for form, other in (("plain", "thinking"), ("thinking", "plain")):
        lessons = [lesson(policy.family, record, form) for record in records]
        seen = [policy.encode(record)[1] for record in lessons]
        answers = [record.target["dialogue"][0].answer for record in lessons]
        own, others = (
            reward_for("counting", format="thinking" if name == "thinking" else "strict").score(answers, seen)
            for name in (form, other)
        )
        assert own["points"] == pytest.approx([1.0] * 6)
        assert own["format"] == [1.0] * 6
        assert others["format"] == [0.0] * 6


def test_only_the_thinking_form_is_asked_to_think() -> None:
    records = scenes(2, 1)
    plain, thought = (question_of(asked(records, form)[0].messages) for form in FORMS)
    assert thought == f"{plain} {SUFFIX}"
    assert all(word in records[0].target["thought"] for word in ("A ", "."))


@pytest.mark.gate
def test_a_very_small_study_teaches_and_trains_both_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"QUICK_TAUGHT": 1, "PER_STEP": 2, "QUICK_STEPS": 1, "QUICK_PROMPTS": 2, "GROUP": 2, "QUICK_HELD_OUT": 4}
    for name, value in {**sizes, "LONGEST": 24}.items():
        monkeypatch.setattr(thinking, name, value)
    result = run_study(Experiment(quick=True), tmp_path)
    assert len(result["arms"]) == 4
    assert all(row["greedy tokens"]["mean"] > 0 for row in result["arms"].values())
    stored = {path.parts[-5]: load_recipe(path) for path in tmp_path.glob("*/seed-0/*/run/recipe.yaml")}
    forms = {name: recipe.reward.options["format"] for name, recipe in stored.items()}
    assert forms == {"at-once-GRPO": "strict", "after-a-thought-GRPO": "thinking"}
    assert (tmp_path / "seed-0" / "thinking" / "config.json").is_file()
