"""Rollouts on servers with vLLM's API from two processes: the first pushes, both ask, and both stop together."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastrl.engine.deepspeed import deepspeed_available
from fastrl.run.logs import read_rows
from tests.helpers.gloo import start
from tests.helpers.vllm_server import VllmServer

pytestmark = [
    pytest.mark.gate,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
WORKER = """
import json, os, sys, traceback
from pathlib import Path
import torch
import torch.distributed as dist
from fastrl.engine.ranks import leave
from fastrl.trainer import train
from tests.helpers.training import make_records, make_recipe

folder = Path(sys.argv[1])
os.environ["LOCAL_RANK"] = os.environ["RANK"]
torch.set_num_threads(1)
dist.init_process_group("gloo")
for name, changes in json.loads((folder / "runs.json").read_text()).items():
    recipe = make_recipe(Path(sys.argv[2]), folder / name, **changes)
    message = ""
    try:
        held_out = make_records(2) if "eval" in changes else None
        train(recipe, records=make_records(), eval_records=held_out, show=False)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    (folder / f"{name}-{os.environ['RANK']}.txt").write_text(message)
    dist.barrier()
leave(0)
"""
LORA = {"model__lora": {"rank": 4}}
EVALUATED = {"eval": {"every": 2, "max_new_tokens": 4}}


@pytest.fixture
def servers(tiny_folder: Callable[[str], Path]) -> Iterator[list[VllmServer]]:
    made = [VllmServer(tiny_folder("qwen2_5")) for _ in range(3)]
    for each in made:
        threading.Thread(target=each.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield made
    for each in made:
        each.shutdown()
        each.server_close()


def together(folder: Path, model: Path, runs: dict[str, dict[str, Any]], engine: dict[str, Any]) -> None:
    """Make the runs on two ranks, one prompt a step on each."""
    common: dict[str, Any] = {"rollout__backend": "vllm", "data__prompts_per_step": 2, "checkpoint__every": 0}
    common |= {"optim__steps": 3, "optim__lr": 0.02, "engine": engine}
    (folder / "runs.json").write_text(json.dumps({name: {**common, **run} for name, run in runs.items()}))
    for process in start(WORKER, folder, folder, model):
        message = process.communicate(timeout=900)[1]
        assert process.returncode == 0, message[-3000:]


def ended(folder: Path, name: str) -> list[str]:
    """The error of each rank, empty without one."""
    return [(folder / f"{name}-{rank}.txt").read_text() for rank in range(2)]


def right(folder: Path, name: str, servers: Sequence[VllmServer], path: str, pushes: int) -> None:
    """Every step was sampled with the weights of its step, on all servers, which got each set once."""
    assert ended(folder, name) == ["", ""]
    rows = read_rows(folder / name / "metrics.jsonl")
    assert len(rows) == 3
    for row in rows:
        assert row["grad_norm"] > 0
        assert row["sampler/gap_max"] < 1e-3  # those of the step before would differ by far more
    for server in servers:
        assert len(server.asked(path)) == pushes
        assert len(server.asked("/v1/chat/completions")) > 2
    assert not list((folder / name / "rollout").iterdir())


ENGINES = [
    pytest.param({"kind": "fsdp2"}, id="fsdp2"),
    pytest.param(
        {"kind": "deepspeed", "zero_stage": 2},
        id="deepspeed",
        marks=pytest.mark.skipif(not deepspeed_available(), reason="DeepSpeed is not installed"),
    ),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_share_servers_with_the_weights_of_the_step(
    engine: dict[str, Any], servers: list[VllmServer], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    one, two, three = servers
    runs: dict[str, dict[str, Any]] = {
        "full": {"rollout__server": one.url, **EVALUATED},
        "lora": {"rollout__server": [two.url, three.url], **LORA},
    }
    together(tmp_path, tiny_folder("qwen2_5"), runs, engine)
    right(tmp_path, "full", [one], "/collective_rpc", 4)  # the last for an evaluation
    right(tmp_path, "lora", [two, three], "/v1/load_lora_adapter", 3)
    assert not two.adapters


def test_old_weights_stop_all_ranks_and_a_dead_server_none(
    servers: list[VllmServer], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The stale server of two is named on both ranks, whichever asked it."""
    good, stale, dead = servers
    stale.keeps = "head"
    dead.shutdown()
    dead.server_close()
    pair = {"rollout__server": [good.url, stale.url], "rollout__server_gap": 0.01}
    rest = {"rollout__server": [dead.url, good.url], "optim__steps": 2}
    none = {"rollout__server": dead.url, "optim__steps": 2}
    together(tmp_path, tiny_folder("qwen2_5"), {"stale": pair, "dead": rest, "none": none}, {"kind": "fsdp2"})
    assert len(read_rows(tmp_path / "stale" / "metrics.jsonl")) == 1
    for message in ended(tmp_path, "stale"):
        assert f"TrainingError: step 2: the vLLM server at {stale.url} does not sample" in message
    assert ended(tmp_path, "dead") == ["", ""]
    assert len(read_rows(tmp_path / "dead" / "metrics.jsonl")) == 2
    for message in ended(tmp_path, "none"):
        assert f"RolloutError: the vLLM server at {dead.url} did not answer, tried 5 times" in message
