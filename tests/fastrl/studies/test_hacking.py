"""The hacking study: both kinds of data about the same clips, one pass each, and what is measured of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrl.recipe import load_recipe
from fastrl.studies import hacking
from fastrl.studies.hacking import KINDS, Experiment, shown_of
from fastrl.studies.runner import folder_name, run_study

SPEC = "scenes:utr?n=3&seed=4&difficulty=1&size=84&frames=4"


def test_what_is_shown_is_about_the_same_clips_in_their_order() -> None:
    from fastrl.data import load_data

    asked, shown = load_data(SPEC), shown_of(SPEC)
    assert len(shown) == 3
    for question, text in zip(asked, shown, strict=True):
        assert [image.tobytes() for image in question.images] == [image.tobytes() for image in text.images]  # type: ignore[union-attr]
        assert question.target["tracks"][0]["name"] in text.target["answer"]


def test_the_rate_is_chosen_on_the_largest_set_of_each_kind() -> None:
    arms = [arm for arm in Experiment().arms() if arm.group]
    for title in KINDS.values():
        assert next(arm for arm in arms if arm.group == title).options["size"] == 1024


@pytest.mark.gate
def test_a_very_small_study_passes_once_over_each_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hacking, "QUICK_SIZES", (8, 16))
    monkeypatch.setattr(hacking, "QUICK_HELD_OUT", 4)
    study = Experiment(quick=True)
    result = run_study(study, tmp_path)
    for arm in study.arms():
        assert set(result["arms"][arm.name]) == {"greedy", "hack", "utr"}
        if arm.group:
            recipe = load_recipe(next((tmp_path / folder_name(arm.name)).rglob("recipe.yaml")))
            assert recipe.optim.steps == arm.options["size"] // 8
    means = {arm: row["hack"]["mean"] for arm, row in result["arms"].items()}
    grown = result["changes"]["one frame: proxy, 16 − 8"]["change"]
    assert grown == pytest.approx(means["one frame, 16"] - means["one frame, 8"])
