"""Runs of several processes by an engine, beside the same runs of one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastrl.run import keeping
from fastrl.run.logs import read_rows
from tests.helpers.engine_worker import run
from tests.helpers.gloo import REPO, start

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


def same_gradients(one: Path, many: Path, *, zeros: bool = False) -> None:
    """``zeros``: where one process has none, those of many are 0."""
    left, right = (load_file(out / "gradients.safetensors") for out in (one, many))
    assert left.keys() <= right.keys() if zeros else left.keys() == right.keys()
    for name, gradient in right.items():
        expected = left.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient.view_as(expected), expected, rtol=1e-6, atol=4e-6, msg=name)


def same_bits(one: Path, other: Path, *, ranks: int) -> None:
    """Weights, and every rank's part of a checkpoint, of two runs are the same bits."""
    files = [Path("engine") / f"rank-{rank}.safetensors" for rank in range(ranks)]
    for file in (Path("model") / "model.safetensors", *files):
        first, second = (load_file(out / "checkpoints" / "step-00000005" / file) for out in (one, other))
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == []


def local(root: Path, model: Path, names: Sequence[str]) -> None:
    """The same runs in this process."""
    for name in names:
        changes = {key: value for key, value in RUNS[name].items() if not key.startswith("engine")}
        run(root, name, changes, model=str(model))
