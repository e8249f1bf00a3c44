"""DeepSpeed's ZeRO 3 on two and four gloo processes: the losses, gradients and weights of one process, and resuming.
Skipped where DeepSpeed is not installed: pip install '.[distributed]'."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastrl.engine.deepspeed import deepspeed_available
from tests.helpers.engine_runs import FULL, RUNS, local, same, same_bits, same_gradients, together

pytestmark = pytest.mark.skipif(not deepspeed_available(), reason="DeepSpeed is not installed")

ALL = [name for name in RUNS if name != "late"]  # which fsdp2 alone can


@pytest.mark.gate
def test_two_processes_are_one_and_resume_to_the_bit(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model, two = tiny_folder("qwen2_5"), tmp_path / "two"
    local(tmp_path / "one", model, ALL)
    half = {**FULL, "optim__steps": 2}
    runs = [{"name": name, "changes": RUNS[name]} for name in ALL]
    runs += [{"name": "half", "changes": half}, {"name": "half", "changes": FULL, "resume": True}]
    together(two, model, runs, ranks=2, kind="deepspeed", stage=3)
    for name in ALL:
        same(tmp_path / "one" / name, two / name)
        same_gradients(tmp_path / "one" / name, two / name, zeros=True)
    same_bits(two / "full", two / "half", ranks=2)


@pytest.mark.gate
def test_four_processes_go_on_where_two_stopped(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model, two, four = tiny_folder("qwen2_5"), tmp_path / "two", tmp_path / "four"
    local(tmp_path / "one", model, ["full"])
    together(two, model, [{"name": "half", "changes": {**FULL, "optim__steps": 2}}], ranks=2, kind="deepspeed", stage=3)
    four.mkdir()
    shutil.copytree(two / "half", four / "half", symlinks=True)
    again = [{"name": "half", "changes": FULL, "resume": True}]
    together(four, model, again, ranks=4, kind="deepspeed", stage=3)
    same(tmp_path / "one" / "full", four / "half", since=2)
