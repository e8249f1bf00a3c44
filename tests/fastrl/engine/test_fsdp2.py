"""FSDP2 on two and four gloo processes: the losses, gradients and weights of one process, and resuming on others."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastrl.config.sections import EngineRecipe, OptimRecipe
from fastrl.engine import make_engine
from fastrl.recipe import RecipeError
from fastrl.run import keeping
from fastrl.run.logs import read_rows
from tests.helpers.engine_worker import run
from tests.helpers.gloo import REPO, start
from tests.helpers.training import make_recipe

FULL = {"method": {"kind": "perception-r1", "beta": 0.04}, "optim__weight_decay": 0.01}  # with a copy as reference
ADAPTERS = {
    "method": {"kind": "perception-r1", "beta": 0.04},
    "model__lora": {"rank": 4, "dora": True, "also_train": ["projector"]},
    "model__gradient_checkpointing": True,
}
STACKED = {**ADAPTERS, "model__lora": {"rank": 4}, "model__gradient_checkpointing": False}
HOST = {
    "engine__offload_optimizer": True,
    "model__gradient_checkpointing": True,
    "model__offload_activations": True,
    "model__freeze": ["vision"],
    "optim__row_local_head": True,
}
AGAIN = {"optim__updates_per_batch": 2, "optim__token_budget": 4096}
SINGLE = {**FULL, "optim__token_budget": 32}  # micro-batches of one prompt, some without pictures
LATE = {**SINGLE, "engine__reduce_gradients": "last"}
RUNS = {
    "full": FULL,
    "adapters": ADAPTERS,
    "stacked": STACKED,
    "host": HOST,
    "again": AGAIN,
    "single": SINGLE,
    "late": LATE,
}


def together(
    folder: Path, model: Path, runs: Sequence[dict[str, Any]], *, ranks: int, kind: str = "fsdp2", stage: int = 2
) -> None:
    """Make ``runs`` (arguments of ``engine_worker.run``) into ``folder`` on so many ranks."""
    folder.mkdir(exist_ok=True)
    described = [{**each, "model": str(model)} for each in runs]
    for each in described:
        each["changes"] = {**each["changes"], "engine__kind": kind, "engine__zero_stage": stage}
    (folder / "runs.json").write_text(json.dumps(described))
    worker = (REPO / "tests" / "helpers" / "engine_worker.py").read_text()
    ended = [(process, process.communicate(timeout=900)[1]) for process in start(worker, folder, folder, ranks=ranks)]
    for rank, (process, message) in enumerate(ended):
        report = folder / f"found-{rank}.json"
        found = json.loads(report.read_text()) if report.is_file() else {}
        assert process.returncode == 0, "\n".join([*found.values(), message[:3000]])


def weights(out: Path) -> dict[str, torch.Tensor]:
    last = keeping.latest_checkpoint(out)
    assert last is not None
    assert last.name == "step-00000005"
    return {name: weight.float() for name, weight in load_file(last / "model" / "model.safetensors").items()}


def same(one: Path, many: Path, *, since: int = 0) -> None:
    """Losses, gradients and weights of two runs are equal, in float32."""
    first, second = (read_rows(out / "metrics.jsonl")[since:] for out in (one, many))
    assert [row["step"] for row in first] == [row["step"] for row in second]
    for key in ("loss", "reward/mean"):
        assert [row[key] for row in second] == pytest.approx([row[key] for row in first], abs=1e-6)
    assert [row["grad_norm"] for row in second] == pytest.approx([row["grad_norm"] for row in first], rel=2e-6)
    assert all(row["grad_norm"] > 0.1 for row in first)
    left, right = weights(one), weights(many)
    assert left.keys() == right.keys()
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 1e-6


def same_gradients(one: Path, many: Path) -> None:
    left, right = (load_file(out / "gradients.safetensors") for out in (one, many))
    assert left.keys() == right.keys()
    for name, gradient in left.items():
        torch.testing.assert_close(right[name], gradient, rtol=1e-6, atol=4e-6, msg=name)


def local(root: Path, model: Path, names: Sequence[str]) -> None:
    """The same runs in this process."""
    for name in names:
        changes = {key: value for key, value in RUNS[name].items() if not key.startswith("engine")}
        run(root, name, changes, model=str(model))


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
