"""Every example runs as printed, from an empty folder, and its output is as described."""

from __future__ import annotations

import json
import re
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
    assert {"detr_matcher.py", "own_data.py", "own_reward.py", "torch_loop.py", "trl_grpo.py"} <= set(SCRIPTS)


@pytest.mark.gate
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs_as_a_script(name: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(EXAMPLES / name)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not list(tmp_path.iterdir())  # no files are left behind


def test_the_torch_loop_learns() -> None:
    first, last = main_of("torch_loop.py")
    assert last > first + 0.2


def test_the_matchers_give_one_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    detr_loss = pytest.importorskip("transformers.loss.loss_for_object_detection")
    monkeypatch.setattr(detr_loss, "HungarianMatcher", detr_loss.HungarianMatcher)  # restored after the test
    before, after = main_of("detr_matcher.py")
    assert after == pytest.approx(before, rel=1e-6)


@pytest.mark.gate
def test_own_data_is_read_and_trained_on() -> None:
    assert main_of("own_data.py") == 24


NOTEBOOK = EXAMPLES / "quickstart.ipynb"


def outputs_of(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def test_the_notebook_holds_its_pictures_and_nothing_of_the_machine_that_ran_it() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    pictures = [output for output in outputs_of(notebook) if "image/png" in output.get("data", {})]
    assert len(pictures) == 4
    message = [output for output in outputs_of(notebook) if output not in pictures]
    assert {output.get("name") for output in message} == {"stdout"}  # no warnings or errors
    assert "site-packages" not in NOTEBOOK.read_text(encoding="utf-8")
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            compile("".join(cell["source"]), cell["id"], "exec")


@pytest.mark.gate
def test_the_notebook_runs_and_its_model_learns(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert sum("image/png" in output.get("data", {}) for output in outputs_of(notebook)) == 4
    text = "".join(output.get("text", "") for output in outputs_of(notebook))
    before, after = map(float, re.findall(r"mean IoU of greedy answers: ([\d.]+) before, ([\d.]+) after", text)[0])
    assert after > before
    assert not list(tmp_path.iterdir())  # no files are left behind
