"""DeepSpeed's ZeRO 3 on two and four gloo processes: the losses, gradients and weights of one process, and resuming.
Skipped where DeepSpeed is not installed: pip install '.[distributed]'."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastrl.engine.deepspeed import deepspeed_available
from tests.fastrl.engine.test_fsdp2 import (
    ADAPTERS,
    AGAIN,
    FULL,
    HOST,
    RUNS,
    SINGLE,
    STACKED,
    local,
    same,
    together,
    weights,
)

pytestmark = pytest.mark.skipif(not deepspeed_available(), reason="DeepSpeed is not installed")

ALL = {"full": FULL, "adapters": ADAPTERS, "stacked": STACKED, "host": HOST, "again": AGAIN, "single": SINGLE}


def same_gradients(one: Path, many: Path) -> None:
    """Where one process has none, the partitioned ones are 0."""
    left, right = (load_file(out / "gradients.safetensors") for out in (one, many))
    assert left.keys() <= right.keys()
    for name, gradient in right.items():
        expected = left.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient.view_as(expected), expected, rtol=1e-6, atol=4e-6, msg=name)


@pytest.mark.gate
def test_two_processes_are_one_and_resume_to_the_bit(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model, two = tiny_folder("qwen2_5"), tmp_path / "two"
    assert ALL.items() <= RUNS.items()
    local(tmp_path / "one", model, list(ALL))
    half = {**FULL, "optim__steps": 2}
    runs = [{"name": name, "changes": changes} for name, changes in ALL.items()]
    runs += [{"name": "half", "changes": half}, {"name": "half", "changes": FULL, "resume": True}]
    together(two, model, runs, ranks=2, kind="deepspeed", stage=3)
    for name in ALL:
        same(tmp_path / "one" / name, two / name)
        same_gradients(tmp_path / "one" / name, two / name)
    whole, parts = weights(two / "full"), weights(two / "half")
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    for rank in range(2):
        first, second = (
            load_file(two / name / "checkpoints" / "step-00000005" / "engine" / f"rank-{rank}.safetensors")
            for name in ("full", "half")
        )
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == []


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
