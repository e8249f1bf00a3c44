"""Measures of where a caption's attention lies, against boxes known to the pixel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastrl.studies import gaze
from fastrl.studies.base import REPORTED, Measured
from fastrl.studies.cells import Cell
from fastrl.studies.gaze import KINDS, TRAINED, Experiment, covered, named_boxes, pictures, saliency, share
from fastrl.studies.outcome import outcome
from fastrl.studies.runner import run_study


def test_cells_count_by_the_part_that_boxes_cover() -> None:
    cover = covered([(0, 0, 28, 28), (28, 0, 42, 28)], (112, 112), (4, 4))
    assert cover[0].tolist() == [1.0, 0.5, 0.0, 0.0]
    assert float(cover[1:].sum()) == 0.0
    twice = covered([(0, 0, 28, 28), (0, 0, 28, 28)], (112, 112), (4, 4))
    assert float(twice.sum()) == 1.0  # overlapping boxes count once


def test_share_and_saliency_of_known_maps() -> None:
    cover = covered([(0, 0, 56, 56)], (112, 112), (2, 2))
    inside, flat = torch.tensor([[0.7, 0.1], [0.1, 0.1]]), torch.full((2, 2), 0.25)
    assert share(inside, cover) == pytest.approx(0.7)
    assert saliency(inside, cover) == pytest.approx(3**0.5, rel=1e-5)  # 0.45 above the mean, deviation 0.15 √3
    assert share(flat, cover) == pytest.approx(0.25)
    assert saliency(flat, cover) == 0.0
    assert saliency(torch.tensor([[0.1, 0.7], [0.1, 0.1]]), cover) < 0


def test_boxes_of_what_is_named_or_of_everything() -> None:
    record = next(r for r in pictures(20, 3) if len(set(r.target["names"])) == len(r.target["names"]) > 1)
    first, *_ = record.target["names"]
    assert named_boxes(record, f"A large {first}.") == [record.target["boxes"][0]]
    assert named_boxes(record, "Nothing.") == list(record.target["boxes"])
    assert named_boxes(record, " ".join(record.target["names"])) == list(record.target["boxes"])


def test_pictures_are_the_same_for_a_seed_and_differ_between_seeds() -> None:
    assert [r.target["boxes"] for r in pictures(4, 1)] == [r.target["boxes"] for r in pictures(4, 1)]
    assert pictures(2, 1)[0].target != pictures(2, 2)[0].target
    assert all(len(r.target["names"]) == len(r.target["boxes"]) == len(r.target["objects"]) for r in pictures(9, 1))


def looks(rise: float, study: Experiment) -> Cell:
    """Scores of four pictures, of which saliency and attention on the image rise with every turn."""
    rows = {name: [0.1 * i for i in range(4)] for name in study.measures}
    for turn in (2, 3):
        rows |= {f"{k} {turn}": [v + rise * (turn - 1) for v in rows[f"{k} 1"]] for k in ("saliency", "mass")}
    return Cell({REPORTED: Measured([str(i) for i in range(4)], rows)}, 1.0, 1.0)


def test_more_so_after_training_is_the_change_over_turns_after_less_before(tmp_path: Path) -> None:
    study = Experiment()
    cells = {("start", 0): looks(0.1, study), (TRAINED, 0): looks(0.3, study), (TRAINED, 1): looks(0.3, study)}
    result = outcome(study, cells, {}, tmp_path)
    for kind in ("saliency", "mass"):
        name = f"{KINDS[kind]}, turn 3 − 1: after − before"
        found = result["changes"][name]
        assert (found["before"], found["change"]) == (pytest.approx(0.0, abs=1e-12), pytest.approx(0.4))
        assert found["seeds"] == pytest.approx([0.4, 0.4])
        assert result["claims"][name]["expected"] == "rises"
    assert result["claims"][f"{KINDS['saliency']}, turn 2: after − before"]["seen"] is True


def test_nothing_is_claimed_of_the_share_which_grows_with_what_is_named() -> None:
    study = Experiment()
    compared = {c.name: c for c in study.comparisons()}
    claimed = {compared[name].after[1].split()[0] for name in study.claims()}
    assert claimed == {"saliency", "mass"}
    assert f"{TRAINED}: share − part of the picture, turn 3" in compared
    assert f"{KINDS['share']}, turn 3: after − before" in compared


@pytest.mark.gate
def test_a_very_small_study_measures_every_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"QUICK_PICTURES": 24, "QUICK_STEPS": 1, "QUICK_HELD_OUT": 4, "MIN_BEST": 0.5}.items():
        monkeypatch.setattr(gaze, name, value)
    result = run_study(Experiment(quick=True), tmp_path)
    row = {name: each["mean"] for name, each in result["arms"]["start"].items()}
    assert {f"{kind} {turn}" for kind in ("share", "saliency", "mass", "area", "score") for turn in (1, 2, 3)} == set(
        row
    )
    assert all(0 < row[f"{kind} {turn}"] < 1 for kind in ("share", "mass", "area") for turn in (1, 2, 3))
