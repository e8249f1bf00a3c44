"""The demos in a few steps: what they return and what they leave behind."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fastrl.demo import run_demo

KEYS = {"method", "metric", "before", "after", "greedy_before", "greedy_after", "seconds"}


@pytest.mark.parametrize("task", ["grounding", "counting"])
def test_perception_r1_measures_trains_and_measures_again(task: str, tmp_path: Path) -> None:
    result = run_demo("perception-r1", task=task, out=tmp_path, seed=1, say=lambda _: None, held_out=8, steps=2)
    assert set(result) >= KEYS
    json.dumps(result)
    assert all(0 <= result[k] <= 1 for k in ("before", "after", "greedy_before", "greedy_after"))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert (tmp_path / "before_after.png").stat().st_size > 10_000


def test_a_demo_never_overwrites_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrl.demo import _fresh

    monkeypatch.chdir(tmp_path)
    assert _fresh(Path("runs/demo")) == Path("runs/demo")
    Path("runs/demo").mkdir(parents=True)
    assert _fresh(Path("runs/demo")) == Path("runs/demo-2")
