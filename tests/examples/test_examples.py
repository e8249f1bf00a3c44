"""Every example runs as it stands, from a folder of its own, and does what it says."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def main_of(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / name))["main"]()


def test_there_is_an_example_for_each_audience() -> None:
    assert {"detr_matcher.py", "torch_loop.py", "trl_grpo.py"} <= set(SCRIPTS)


@pytest.mark.gate
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs_as_a_script(name: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(EXAMPLES / name)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not list(tmp_path.iterdir())  # nothing left behind


def test_the_torch_loop_learns() -> None:
    first, last = main_of("torch_loop.py")
    assert last > first + 0.2


def test_the_matchers_give_one_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    detr_loss = pytest.importorskip("transformers.loss.loss_for_object_detection")
    monkeypatch.setattr(detr_loss, "HungarianMatcher", detr_loss.HungarianMatcher)  # put back afterwards
    before, after = main_of("detr_matcher.py")
    assert after == pytest.approx(before, rel=1e-6)
