"""The demos in a few steps: what they return and what they leave behind."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fastrl.toy.demos import run_demo

KEYS = {"method", "metric", "before", "after", "greedy_before", "greedy_after", "seconds"}


@pytest.mark.parametrize("task", ["grounding", "counting"])
def test_perception_r1_measures_trains_and_measures_again(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_demo("perception-r1", task=task, out=tmp_path, seed=1, say=lambda _: None, held_out=8, steps=2)
    assert set(result) >= KEYS
    json.dumps(result)
    assert all(0 <= result[k] <= 1 for k in ("before", "after", "greedy_before", "greedy_after"))
    exact = [f"{kind}exact_{when}" for kind in ("", "greedy_") for when in ("before", "after")]
    counts = task == "counting"  # where matched points alone flatter an answer that never looked
    assert [key in result and 0 <= result[key] <= 1 for key in exact] == [counts] * 4
    assert ("exact count" in capsys.readouterr().out) == counts
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert (tmp_path / "before_after.png").stat().st_size > 10_000


def test_utr_trains_on_both_sets_of_the_same_clips(tmp_path: Path) -> None:
    result = run_demo("utr", out=tmp_path, seed=1, say=lambda _: None, clips=6, held_out=4, steps=2)
    assert set(result) >= KEYS
    json.dumps(result)
    assert list(result["models"]) == ["start", "hack", "utr"]
    assert (result["before"], result["after"]) == tuple(result["models"][m]["mean_iou"] for m in ("start", "utr"))
    for name in ("hack", "utr"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2]
        assert all(math.isfinite(row["loss"]) for row in rows)
    asked = {json.loads(line)["id"].split("/")[0] for line in (tmp_path / "utr.jsonl").read_text().splitlines()}
    assert len(asked) == 6  # every clip
    assert (tmp_path / "comparison.png").stat().st_size > 5_000


def test_a_demo_never_overwrites_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrl.toy.demos import fresh

    monkeypatch.chdir(tmp_path)
    assert fresh(Path("runs/demo")) == Path("runs/demo")
    Path("runs/demo").mkdir(parents=True)
    assert fresh(Path("runs/demo")) == Path("runs/demo-2")


def test_reper_reflects_trains_and_reflects_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_demo("reper", out=tmp_path, seed=1, say=lambda _: None, held_out=6, pictures=32, steps=2)
    assert set(result) >= KEYS | {"false_captions_before", "false_captions_after", "chair_i_before", "chair_i_after"}
    json.dumps(result)
    assert [len(result[k]) for k in ("turns_before", "turns_after")] == [3, 3]
    assert result["before"] == result["turns_before"][2]["score"] > 0.3  # the model that ships can answer again
    assert result["greedy_after"] == result["turns_after"][0]["score"]
    assert 0 < result["dialogues"] <= 32
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [len(row["before"]) for row in rows] == [3] * 6
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
    assert "CHAIR-i" in capsys.readouterr().out
