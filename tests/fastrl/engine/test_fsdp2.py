"""FSDP2 on two and four gloo processes: the losses, gradients and weights of one process, and resuming on others."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.config.sections import EngineRecipe, OptimRecipe
from fastrl.engine import make_engine
from fastrl.recipe import RecipeError
from tests.helpers.engine_runs import FULL, RUNS, local, same, same_bits, same_gradients, together
from tests.helpers.gloo import start
from tests.helpers.training import make_recipe


@pytest.mark.gate
def test_two_processes_are_one_and_resume_to_the_bit(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model, two = tiny_folder("qwen2_5"), tmp_path / "two"
    local(tmp_path / "one", model, list(RUNS))
    runs = [{"name": name, "changes": changes} for name, changes in RUNS.items()]
    runs.append({"name": "half", "changes": {**FULL, "optim__steps": 2}})
    runs.append({"name": "half", "changes": FULL, "resume": True})
    together(two, model, runs, ranks=2)
    for name in RUNS:
        same(tmp_path / "one" / name, two / name)
        same_gradients(tmp_path / "one" / name, two / name)
    same_bits(two / "full", two / "half", ranks=2)


@pytest.mark.gate
def test_four_processes_are_one_and_others_go_on(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Two ranks go on where four stopped, and four where two did."""
    model, two, four = tiny_folder("qwen2_5"), tmp_path / "two", tmp_path / "four"
    local(tmp_path / "one", model, ["full", "adapters"])
    half = {**FULL, "optim__steps": 2}
    together(two, model, [{"name": "half", "changes": half}], ranks=2)
    four.mkdir()
    shutil.copytree(two / "half", four / "from-two", symlinks=True)
    runs = [{"name": name, "changes": RUNS[name]} for name in ("full", "adapters")]
    runs.append({"name": "from-two", "changes": FULL, "resume": True})
    runs.append({"name": "half", "changes": half})
    together(four, model, runs, ranks=4)
    for name in ("full", "adapters"):
        same(tmp_path / "one" / name, four / name)
        same_gradients(tmp_path / "one" / name, four / name)
    same(tmp_path / "one" / "full", four / "from-two", since=2)
    shutil.copytree(four / "half", two / "from-four", symlinks=True)
    together(two, model, [{"name": "from-four", "changes": FULL, "resume": True}], ranks=2)
    same(tmp_path / "one" / "full", two / "from-four", since=2)


DIES = """
import os, sys
from pathlib import Path
from fastrl.engine.ranks import leave
from fastrl.trainer import train
from tests.helpers.training import make_records, make_recipe

recipe = make_recipe(Path(sys.argv[1]), Path(sys.argv[2]), engine={"kind": "fsdp2"}, data__prompts_per_step=1)

def die(row):
    if os.environ["RANK"] == "1" and row["step"] == 2:
        raise ValueError("the shelf fell down")

try:
    train(recipe, records=make_records(), on_step=die, show=False)
except (RuntimeError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    leave(1)
"""


@pytest.mark.gate
def test_a_rank_that_dies_ends_all_with_its_error(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    first, second = start(DIES, tmp_path, tiny_folder("qwen2_5"), tmp_path / "run")
    own, ended = second.communicate(timeout=600)[1], time.monotonic()
    others = first.communicate(timeout=60)[1]  # within a minute of the other's end, far from engine.timeout
    assert time.monotonic() - ended < 60
    assert first.returncode != 0
    assert second.returncode == 1
    assert "error: the shelf fell down" in own
    assert "rank 1, which ended with: the shelf fell down" in others


def test_without_a_launcher_it_says_how_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    optim = OptimRecipe(steps=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"^engine.kind: fsdp2 needs a launcher.*torchrun --nproc-per-node 8"):
        make_engine(torch.nn.Linear(2, 2), optim, EngineRecipe(kind="fsdp2"), tmp_path)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__states": "8bit"}, "optim.states and optim.gradient_release need engine.kind: local"),
        ({"optim__gradient_release": True, "optim__clip_norm": None}, "gradient_release need engine.kind: local"),
        ({"rollout__keep_prompts": "on"}, "engine.kind: fsdp2 reduces gradients batch by batch"),
        ({"engine": {"kind": "deepspeed", "reduce_gradients": "last"}}, "last needs engine.kind: fsdp2"),
        ({"model__quantize": "4bit", "model__lora": {"rank": 2}}, "model.quantize needs engine.kind: local"),
    ],
)
def test_what_it_does_not_do_is_refused_before_any_work(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(tmp_path, tmp_path, **{"engine": {"kind": "fsdp2"}, **changes})
