"""The demos with few steps: their results and their files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fastrl.answers import View
from fastrl.data.records import Record
from fastrl.recipe import load_recipe
from fastrl.toy.demos import perception_r1, perpo, run_demo, utr
from fastrl.toy.demos.families import rates_of

KEYS = {"method", "metric", "before", "after", "greedy_before", "greedy_after", "seconds", "unseen"}


def shows_evidence(result: dict[str, Any], out: Path, n: int) -> None:
    """A line of scores for each record of the reported set, and an interval around each change."""
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == result["unseen"]["n"] == n
    for found in result["unseen"]["changes"].values():
        assert found["low"] <= found["change"] <= found["high"]
        assert found["change"] == pytest.approx(found["after"] - found["before"])


@pytest.mark.parametrize(
    "task", ["grounding", *(pytest.param(task, marks=pytest.mark.gate) for task in ("counting", "detection", "ocr"))]
)
def test_perception_r1_measures_trains_and_measures_again(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_demo("perception-r1", task=task, out=tmp_path, seed=1, say=lambda _: None, held_out=8, steps=2)
    assert set(result) >= KEYS
    json.dumps(result)
    assert all(0 <= result[k] <= 1 for k in ("before", "after", "greedy_before", "greedy_after"))
    counts = task == "counting"  # matched points alone would favour answers without looking
    assert result["metric"] == perception_r1.METRICS[task]
    for name in ("distance", "points"):
        keys = [f"{kind}{name}_{when}" for kind in ("", "greedy_") for when in ("before", "after")]
        assert [key in result and 0 <= result[key] <= 1 for key in keys] == [counts] * 4
    assert [result.get(f"{kind}unmatched_before") in range(17) for kind in ("", "greedy_")] == [counts] * 2
    printed = capsys.readouterr().out
    assert ("exact count" in printed) == counts
    assert ("a share of the picture's diagonal" in printed) == counts
    assert ("greedy, AP" in printed) == (task == "detection")
    assert (0 <= result["ap_before"] <= 1) if task == "detection" else ("ap_before" not in result)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert (tmp_path / "before_after.png").stat().st_size > 10_000
    shows_evidence(result, tmp_path, 8)
    beside = ["sampled, distance", "greedy, distance", "sampled, points", "greedy, points"] if counts else []
    assert list(result["unseen"]["changes"]) == ["sampled", "greedy", *beside]


def test_scores_of_counting_tell_a_right_number_from_points_at_the_right_place() -> None:
    target = {"label": "dog", "count": 2, "points": [(10, 10), (70, 70)], "boxes": None}
    row = Record("a", "counting", (), (), target, views=(View.unresized(80, 80),), frame="original")
    answers = ["[[10, 10], [70, 70]]", "[[40, 40], [40, 40]]", "[[10, 10]]", "none"]
    found = perception_r1.scores_of("counting", answers, [row] * 4)
    assert found == {
        "exact": [1.0, 1.0, 0.0, 0.0],
        "distance": [0.0, pytest.approx(30 / 80), 0.0, None],
        "points": [1.0, pytest.approx(1 - 30 / 80), 0.5, 0.0],
    }


@pytest.mark.gate
@pytest.mark.parametrize("family", [None, "llava"])
def test_utr_trains_on_both_sets_of_the_same_clips(tmp_path: Path, family: str | None) -> None:
    result = run_demo(
        "utr", family=family, out=tmp_path, seed=1, say=lambda _: None, clips=6, held_out=4, reported=5, steps=2
    )
    assert set(result) >= KEYS
    shows_evidence(result, tmp_path, 5)
    json.dumps(result)
    assert list(result["models"]) == ["start", "hack", "utr"]
    assert (result["before"], result["after"]) == tuple(result["models"][m]["mean_iou"] for m in ("start", "utr"))
    rates = utr.RATES.get(family or "qwen2_5_vl", dict.fromkeys(utr.SETS, load_recipe("utr-llava-tiny").optim.lr))
    assert result["rates"] == rates
    for name in ("hack", "utr"):
        assert load_recipe(str(tmp_path / name / "recipe.yaml")).optim.lr == rates[name]
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


@pytest.mark.gate
@pytest.mark.parametrize("family", [None, "llava"])
def test_reper_reflects_trains_and_reflects_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str | None
) -> None:
    result = run_demo(
        "reper", family=family, out=tmp_path, seed=1, say=lambda _: None, held_out=6, pictures=32, steps=2
    )
    assert set(result) >= KEYS | {"false_captions_before", "false_captions_after", "chair_i_before", "chair_i_after"}
    json.dumps(result)
    assert [len(result[k]) for k in ("turns_before", "turns_after")] == [3, 3]
    assert result["before"] == result["turns_before"][2]["score"] > 0.3  # the model that ships can answer again
    assert result["greedy_after"] == result["turns_after"][0]["score"]
    assert 0 < result["dialogues"] <= 32
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [len(row["before"]) for row in rows] == [3] * 6
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
    shows_evidence(result, tmp_path, 6)
    assert "CHAIR-i" in capsys.readouterr().out


def test_each_kind_has_its_own_rate_where_one_was_chosen() -> None:
    chosen = {"qwen2_5_vl": {"a": 1e-3, "b": 2e-3}}
    assert rates_of(chosen, None, "ab", 3e-4) == rates_of(chosen, "qwen2_5_vl", "ab", 3e-4) == {"a": 1e-3, "b": 2e-3}
    assert rates_of(chosen, "llava", "ab", 3e-4) == {"a": 3e-4, "b": 3e-4}
    for demo, kinds in ((perpo, perpo.METHODS), (utr, utr.SETS)):
        assert all(set(rates) == set(kinds) for rates in demo.RATES.values())


@pytest.mark.gate
def test_perpo_on_a_small_llava_compares_three_ways_to_learn_from_the_same_lists(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = run_demo("perpo", family="llava", out=out, seed=1, say=lambda _: None, held_out=6, prompts=24, steps=2)
    assert set(result) >= KEYS
    assert list(result["models"]) == ["start", "perpo", "dpo", "sft"]
    shows_evidence(result, out, 6)
    for kind, rate in result["rates"].items():
        assert load_recipe(str(out / kind / "recipe.yaml")).optim.lr == rate
    assert (out / "perpo" / "recipe.yaml").read_text().count("tiny:llava") == 1


def test_a_family_without_a_small_model_or_a_demo_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown family of small models 'llama'; did you mean 'llava'"):
        run_demo("perpo", family="llama", out=tmp_path / "a")
    with pytest.raises(ValueError, match="the demo of perception-r1 runs on qwen2_5_vl; perpo, reper, utr have both"):
        run_demo("perception-r1", family="llava", out=tmp_path / "a")
    assert not list(tmp_path.iterdir())
