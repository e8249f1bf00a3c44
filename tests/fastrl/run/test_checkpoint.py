"""Checkpoints: whole or not at all, the last few kept, logs cut back, one process per folder."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastrl.data.records import Record
from fastrl.data.stream import RecordStream
from fastrl.engine.local import LocalEngine
from fastrl.recipe import OptimRecipe
from fastrl.run import checkpoint
from fastrl.run.checkpoint import CheckpointError, RunState


class SmallPolicy:
    def __init__(self) -> None:
        self.model = nn.Linear(2, 2)

    def save(self, folder: Path) -> None:
        folder.mkdir()
        save_file(self.model.state_dict(), folder / "model.safetensors")


def run_state(seed: int = 0) -> RunState:
    torch.manual_seed(seed)
    policy = SmallPolicy()
    records = [Record(id=str(i), task="ocr", images=(), messages=(), target={}) for i in range(7)]
    engine = LocalEngine(policy.model, OptimRecipe(steps=5, lr=0.1))
    return RunState(policy, engine, RecordStream(records), torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def advance(run: RunState) -> list[object]:
    """A step's worth of everything that has state."""
    model = run.policy.model
    run.engine.backward(model(torch.randn(3, 2, generator=run.rng)).square().sum() * (1 + random.random()))
    run.engine.step()
    weights = [p.detach().clone().tolist() for p in model.parameters()]
    return [weights, [r.id for r in run.stream.take(3)], torch.rand(2).tolist(), np.random.rand(2).tolist()]


def test_everything_goes_on_where_it_was(tmp_path: Path) -> None:
    run = run_state()
    advance(run)
    folder = checkpoint.save_checkpoint(tmp_path, 1, run, keep=2)
    expected = [advance(run) for _ in range(3)]
    random.seed(99)
    np.random.seed(99)
    other = run_state(seed=5)
    assert checkpoint.load_checkpoint(folder, other) == 1
    assert [advance(other) for _ in range(3)] == expected


def test_last_few_are_kept_and_the_newest_model_is_linked(tmp_path: Path) -> None:
    run = run_state()
    for step in (1, 2, 9, 10):
        advance(run)
        checkpoint.save_checkpoint(tmp_path, step, run, keep=2)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step-00000009", "step-00000010"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000009", "step-00000010"]
    weight = load_file(tmp_path / "model" / "model.safetensors")["weight"]
    assert torch.equal(weight, run.policy.model.weight)


def test_death_while_writing_leaves_the_last_complete_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_state()
    checkpoint.save_checkpoint(tmp_path, 1, run, keep=1)

    def die(*_: object) -> None:
        raise SystemExit

    monkeypatch.setattr(checkpoint, "_flush", die)
    with pytest.raises(SystemExit):
        checkpoint.save_checkpoint(tmp_path, 2, run, keep=1)
    monkeypatch.undo()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    latest = checkpoint.latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "step-00000001"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1  # the half-written one is gone
    checkpoint.load_checkpoint(latest, run)


def test_death_while_dropping_an_old_one_leaves_none_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_state()
    checkpoint.save_checkpoint(tmp_path, 1, run, keep=1)

    def die(path: Path, **_: object) -> None:
        if "dropped" in path.name:
            raise SystemExit

    monkeypatch.setattr(checkpoint.shutil, "rmtree", die)
    with pytest.raises(SystemExit):
        checkpoint.save_checkpoint(tmp_path, 2, run, keep=1)
    monkeypatch.undo()
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step-00000002"]
    assert checkpoint.latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000002"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert checkpoint.latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ('{"version": 99, "step": 1, "world_size": 1}', "version 99"),
        ('{"version": 1, "step": 1, "world_size": 4}', "4 ranks"),
        ("{", "not readable"),
    ],
)
def test_unusable_checkpoint_says_why(tmp_path: Path, state: str, message: str) -> None:
    folder = checkpoint.save_checkpoint(tmp_path, 1, run_state(), keep=1)
    (folder / "state.json").write_text(state)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_checkpoint(folder, run_state())


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"step": 1}\n{"step": 2}\n{"step": 3}\n', 2),
        ('{"step": 1}\n{"step": 2}\n{"st', 2),
        ('{"step": 1}\n{"step": 2}', 1),
        ("", 0),
        ('{"step": 5}\n', 0),
        ('{"step": 1}\nnot json\n{"step": 2}\n', 1),
    ],
)
def test_log_is_cut_after_the_checkpoints_step(tmp_path: Path, text: str, kept: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    checkpoint.truncate_rows(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, kept + 1))
    assert checkpoint.truncate_rows(tmp_path / "absent.jsonl", 2) == 0


def test_one_process_per_folder(tmp_path: Path) -> None:
    other = checkpoint.lock_run(tmp_path)
    with checkpoint.lock_run(tmp_path), pytest.raises(CheckpointError, match="another process"):
        other.__enter__()
    with checkpoint.lock_run(tmp_path):
        pass
