"""DeepSpeed itself on two local processes: an update, its errors, and whole runs. Skipped where DeepSpeed is not
installed: pip install '.[distributed]'."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastrl.engine.deepspeed import deepspeed_available
from fastrl.engine.local import LocalEngine
from fastrl.recipe import OptimRecipe
from fastrl.run.logs import read_rows

pytestmark = pytest.mark.skipif(not deepspeed_available(), reason="DeepSpeed is not installed")

UPDATES = """
import json, sys, torch
from pathlib import Path
from torch import nn
from fastrl.engine import make_engine
from fastrl.engine.base import NonFiniteError
from fastrl.recipe import EngineRecipe, OptimRecipe

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).to(getattr(torch, sys.argv[2]))
options = EngineRecipe(kind="deepspeed", zero_stage=int(sys.argv[1]))
engine = make_engine(model, OptimRecipe(lr=0.01, steps=9), options, Path(sys.argv[3]))
out = []
for bad in (False, True, False):
    for part in range(2):
        x = torch.full((3, 4), 0.1 * (1 + engine.rank + part), dtype=model[0].weight.dtype)
        loss = engine.forward(lambda: model(x).square().sum())
        engine.backward(loss * (float("nan") if bad and engine.rank == 1 else 1.0), last=part == 1)
    try:
        info = engine.step()
        norm = info.grad_norm
    except NonFiniteError:
        norm = None
    with engine.gathered(model):
        out.append({"norm": norm, "weights": [p.detach().float().flatten().tolist() for p in model.parameters()]})
every = engine.gather(out)
assert all(one == every[0] for one in every), "ranks disagree"
if engine.rank == 0:
    print("RESULT" + json.dumps(out))
engine.close()
"""

RUN = """
import sys
from pathlib import Path
from fastrl.trainer import train
from tests.helpers.training import make_records, make_recipe

model, out, steps, resume, lora = sys.argv[1:6]
changes = {"optim__steps": int(steps), "engine": {"kind": "deepspeed", "zero_stage": 2}, "data__prompts_per_step": 1}
changes |= {"model__lora": {"rank": 4}} if lora == "1" else {}
recipe = make_recipe(Path(model), Path(out), **changes)
try:
    train(recipe, records=make_records(), resume=resume == "1", show=False)
except ValueError as error:
    print("REFUSED" + str(error), flush=True)
"""


def launch(code: str, *arguments: Any, folder: Path) -> str:
    """Standard output of ``code`` run by two processes under torchrun."""
    script = folder / "script.py"
    script.write_text(code)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    repo = Path(__file__).resolve().parents[3]
    path = os.pathsep.join([str(repo), str(repo / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)),
            *(str(script), *map(str, arguments)),
        ],
        env=os.environ | {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_is_the_local_engines_and_nan_changes_nothing(stage: int, dtype: str, tmp_path: Path) -> None:
    out = launch(UPDATES, stage, dtype, tmp_path / "ranks", folder=tmp_path)
    found = json.loads(out.split("RESULT")[1].splitlines()[0])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).to(getattr(torch, dtype))
    engine = LocalEngine(model, OptimRecipe(lr=0.01, steps=9))
    tolerance = 1e-6 if dtype == "float32" else 1e-2
    for number, one in enumerate(found):
        if number == 1:
            assert one["norm"] is None
            assert one["weights"] == found[0]["weights"]
            continue
        for rank in range(2):
            for part in range(2):
                x = torch.full((3, 4), 0.1 * (1 + rank + part), dtype=model[0].weight.dtype)
                engine.backward(0.5 * model(x).square().sum(), last=rank + part == 2)  # averaged over ranks
        info = engine.step()
        assert one["norm"] == pytest.approx(info.grad_norm, rel=10 * tolerance)
        for ours, theirs in zip(one["weights"], model.parameters(), strict=True):
            torch.testing.assert_close(torch.tensor(ours), theirs.detach().float().flatten(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("lora", [0, 1])
def test_a_run_of_two_ranks_resumes(tiny_folder: Any, lora: int, tmp_path: Path) -> None:
    model = tiny_folder("qwen2_5")
    launch(RUN, model, tmp_path / "whole", 4, 0, lora, folder=tmp_path)
    launch(RUN, model, tmp_path / "parts", 2, 0, lora, folder=tmp_path)
    launch(RUN, model, tmp_path / "parts", 4, 1, lora, folder=tmp_path)
    whole, parts = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert [row["step"] for row in parts] == [1, 2, 3, 4]
    for key in ("reward/mean", "grad_norm", "loss"):
        assert [row[key] for row in parts] == pytest.approx([row[key] for row in whole], abs=1e-4)
    assert any(row["grad_norm"] > 0 for row in whole)


def test_what_deepspeed_would_pass_over_is_refused_by_every_rank(tiny_folder: Any, tmp_path: Path) -> None:
    """A checkpoint from before checksums, without one rank's moments; and one with damaged weights."""
    model, run = tiny_folder("qwen2_5"), tmp_path / "run"
    launch(RUN, model, run, 2, 0, 1, folder=tmp_path)
    (folder,) = (run / "checkpoints").glob("step-*")
    state = json.loads((folder / "state.json").read_text())
    del state["files"]
    (folder / "state.json").write_text(json.dumps(state))
    shard = next((folder / "engine").glob("*zero_pp_rank_1_*"))
    kept = shard.read_bytes()
    shard.unlink()
    out = launch(RUN, model, run, 4, 1, 1, folder=tmp_path)
    assert out.count("REFUSED") == 2
    assert out.count("zero_pp_rank_1_mp_rank_00_optim_states.pt: missing; it has the moments of rank 1") == 2
    shard.write_bytes(kept)
    weights = folder / "engine" / "mp_rank_00_model_states.pt"
    weights.write_bytes(weights.read_bytes()[:-100])
    out = launch(RUN, model, run, 4, 1, 1, folder=tmp_path)
    assert out.count("REFUSED") == out.count("mp_rank_00_model_states.pt: cannot be read (") == 2
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [1, 2]
