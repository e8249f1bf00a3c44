"""The preference study's lists: the same answers in one drawn order, noise, plateau, and lists of other lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastrl.studies import preference
from fastrl.studies.preference import LONGEST, Experiment, on_plateau, varied
from fastrl.studies.runner import run_study

ROW: dict[str, Any] = {
    "id": "scene-3",
    "prompt": "…",
    "answers": [f"answer {i}" for i in range(12)],
    "rewards": [1 - i / 11 for i in range(12)],
}
TRUE = dict(zip(ROW["answers"], ROW["rewards"], strict=True))


def test_smooth_rewards_without_noise_are_those_of_the_file_in_another_order() -> None:
    row = varied(ROW, "smooth", 0.0, LONGEST, seed=0)
    assert dict(zip(row["answers"], row["rewards"], strict=True)) == TRUE
    assert row["answers"] != ROW["answers"]
    assert row["prompt"] == ROW["prompt"]


def test_shorter_lists_are_the_beginning_of_longer_ones() -> None:
    whole = varied(ROW, "smooth", 0.2, LONGEST, seed=1)
    for n in (2, 4, 8):
        short = varied(ROW, "smooth", 0.2, n, seed=1)
        assert (short["answers"], short["rewards"]) == (whole["answers"][:n], whole["rewards"][:n])


def test_the_noise_of_an_answer_is_the_same_for_every_form_and_grows_with_sigma() -> None:
    def deviates(form: str, sigma: float) -> list[float]:
        row = varied(ROW, form, sigma, LONGEST, seed=2)
        known = [TRUE[a] if form == "smooth" else on_plateau(TRUE[a]) for a in row["answers"]]
        return [(reward - value) / sigma for reward, value in zip(row["rewards"], known, strict=True)]

    first = deviates("smooth", 0.2)
    assert deviates("smooth", 0.4) == pytest.approx(first)
    assert deviates("plateau", 0.4) == pytest.approx(first)
    assert len(set(first)) == LONGEST
    other = varied(ROW, "smooth", 0.2, LONGEST, seed=3)
    assert other["answers"] != varied(ROW, "smooth", 0.2, LONGEST, seed=2)["answers"]


def test_the_deviates_are_standard_normal() -> None:
    rows = [varied({**ROW, "id": str(i)}, "smooth", 1.0, LONGEST, seed=0) for i in range(400)]
    found = [r - TRUE[a] for row in rows for a, r in zip(row["answers"], row["rewards"], strict=True)]
    mean = sum(found) / len(found)
    assert abs(mean) < 0.06  # four standard errors of 4,800 deviates
    assert sum(f * f for f in found) / len(found) == pytest.approx(1.0, abs=0.09)


def test_a_plateau_does_not_reveal_which_of_its_answers_is_better() -> None:
    places = []
    for i in range(200):
        row = varied({**ROW, "id": str(i)}, "plateau", 0.0, LONGEST, seed=0)
        first = row["answers"][row["rewards"].index(max(row["rewards"]))]
        assert on_plateau(TRUE[first]) == 1.0
        places.append(first)
    assert len(set(places)) == sum(on_plateau(value) == 1.0 for value in TRUE.values())


def test_it_is_claimed_that_longer_lists_are_better_and_sft_worse_under_noise() -> None:
    study = Experiment()
    compared, claims = {c.name: c for c in study.comparisons()}, study.claims()
    longer = compared["PerPO, smooth: N 12 − N 2"]
    assert (longer.before, longer.after) == (("perpo, smooth, N 2", "sampled"), ("perpo, smooth", "sampled"))
    assert claims[longer.name] == "rises"
    noisy = compared["PerPO − SFT, smooth, σ 0.4"]
    assert (noisy.before[0], noisy.after[0]) == ("sft, smooth, σ 0.4", "perpo, smooth, σ 0.4")
    assert claims[noisy.name] == "rises"
    assert "PerPO − DPO, plateau" in compared


@pytest.mark.gate
def test_a_very_small_study_runs_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("QUICK_PROMPTS", 24), ("QUICK_STEPS", 2), ("QUICK_HELD_OUT", 6)):
        monkeypatch.setattr(preference, name, value)
    result = run_study(Experiment(quick=True), tmp_path)
    assert result["records"] == 6
    assert len(result["arms"]) == 13
    assert {row["sampled"]["mean"] for row in result["arms"].values()} != {result["arms"]["start"]["sampled"]["mean"]}
    kept = len((tmp_path / "seed-0" / "lists.jsonl").read_text().splitlines())
    for path in (tmp_path / "seed-0").glob("lists-*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == kept
        assert all(len(row["answers"]) == len(row["rewards"]) for row in rows)
    said: list[str] = []
    assert run_study(Experiment(quick=True, say=said.append), tmp_path)["changes"] == result["changes"]
    assert said == ["13 of 13 runs are finished already and are not done again"]
