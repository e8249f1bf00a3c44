"""The hacking study: both kinds of data about the same clips, one pass each, and what is measured of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fastrl.models.open import resolve_model
from fastrl.recipe import load_recipe
from fastrl.studies import hacking
from fastrl.studies.hacking import KINDS, WIDTHS, Experiment, shown_of
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
    for width in WIDTHS:
        for title in KINDS.values():
            first = next(arm for arm in arms if arm.group == f"{title}, {width}")
            assert (first.options["size"], first.options["width"]) == (1024, width)


def test_a_kind_is_trained_at_the_rate_that_its_own_proxy_likes_best() -> None:
    groups = {arm.group: arm.options["kind"] for arm in Experiment().arms() if arm.group}
    assert dict(Experiment.chosen_by) == groups
    assert set(groups.values()) < set(Experiment.measures)


def test_each_plot_has_a_line_for_each_width_and_kind() -> None:
    for plot in Experiment().plots():
        assert [line.label for line in plot.lines] == [f"{t}, {w}" for t in KINDS.values() for w in WIDTHS]
        assert [x for x, _ in plot.lines[0].points] == [64, 256, 1024]


def test_a_model_that_is_not_there_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hacking.WIDTHS, "narrow", "tiny:video-half")
    monkeypatch.setattr(hacking, "QUICK_HELD_OUT", 1)
    with pytest.raises(ValueError, match="no shipped model 'tiny:video-half'"):
        run_study(Experiment(quick=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.gate
def test_a_very_small_study_passes_once_over_each_set_with_both_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hacking, "QUICK_SIZES", (8, 16))
    monkeypatch.setattr(hacking, "QUICK_HELD_OUT", 4)
    # A copy with other weights: the width does not matter to what is held here
    monkeypatch.setitem(hacking.WIDTHS, "narrow", str(_altered("tiny:video", tmp_path / "other")))
    study = Experiment(quick=True)
    out = tmp_path / "out"
    result = run_study(study, out)
    for arm in study.arms():
        assert set(result["arms"][arm.name]) == {"greedy", "hack", "utr"}
        if arm.group:
            recipe = load_recipe(next((out / folder_name(arm.name)).rglob("recipe.yaml")))
            assert recipe.optim.steps == arm.options["size"] // 8
            assert recipe.model.path == hacking.WIDTHS[arm.options["width"]]
    means = {arm: {key: each["mean"] for key, each in row.items()} for arm, row in result["arms"].items()}
    assert means["start, wide"]["hack"] != means["start, narrow"]["hack"]
    for width in WIDTHS:
        grown = result["changes"][f"{width}, one frame: proxy, 16 − 8"]["change"]
        ends = (means[f"one frame, {n}, {width}"]["hack"] for n in (16, 8))
        assert grown == pytest.approx(next(ends) - next(ends))
    gains = [means[f"UTR, 16, {width}"]["greedy"] - means[f"start, {width}"]["greedy"] for width in WIDTHS]
    found = result["changes"]["UTR, 16 clips: change of the truth, wide − narrow"]["change"]
    assert found == pytest.approx(gains[0] - gains[1])


def _altered(model: str, folder: Path) -> Path:
    """A copy of a model whose matrices are a little smaller."""
    shutil.copytree(resolve_model(model), folder)
    weights = load_file(folder / "model.safetensors")
    scaled = {name: value * 0.98 if value.ndim == 2 else value for name, value in weights.items()}
    save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
