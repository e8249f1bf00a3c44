"""Checkpoints: complete or absent, the last few kept, every file checked, one process per folder."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastrl.data.records import Record
from fastrl.data.stream import RecordStream
from fastrl.engine.local import LocalEngine
from fastrl.recipe import OptimRecipe
from fastrl.run import checkpoint, keeping
from fastrl.run.checkpoint import RunState
from fastrl.run.integrity import CheckpointError, Damaged, inspect
from tests.helpers.disk import file_size_limit


class SmallPolicy:
    peft = None

    def __init__(self) -> None:
        self.model = self.core = nn.Linear(2, 2)

    @property
    def saved_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.core.parameters())

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file(self.model.state_dict(), folder / "model.safetensors")


def run_state(seed: int = 0) -> RunState:
    torch.manual_seed(seed)
    policy = SmallPolicy()
    records = [Record(id=str(i), task="ocr", images=(), messages=(), target={}) for i in range(7)]
    engine = LocalEngine(policy.model, OptimRecipe(steps=5, lr=0.1))
    return RunState(policy, engine, RecordStream(records), torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def advance(run: RunState) -> list[object]:
    """Everything that has state, as a step needs it."""
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
    assert checkpoint.load_checkpoint(folder, other) == (1, [])
    assert [advance(other) for _ in range(3)] == expected


def test_last_few_are_kept_and_the_newest_model_is_linked(tmp_path: Path) -> None:
    run = run_state()
    for step in (1, 2, 9, 10):
        advance(run)
        checkpoint.save_checkpoint(tmp_path, step, run, keep=2)
    assert [p.name for p in keeping.list_checkpoints(tmp_path)] == ["step-00000009", "step-00000010"]
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
    latest = keeping.latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "step-00000001"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1  # the incomplete one is removed
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
    assert [p.name for p in keeping.list_checkpoints(tmp_path)] == ["step-00000002"]
    assert keeping.latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000002"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert keeping.latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ('{"version": 99, "step": 1, "world_size": 1}', "version 99"),
        ('{"version": 1, "step": 1, "world_size": 4}', "4 ranks"),
        ('{"version": 1, "step": 2, "world_size": 1}', "state.json: has step 2, but its folder is step-00000001"),
        ('{"version": 1, "step": "1", "world_size": 1}', "state.json: step is '1', not a count"),
        ('{"version": 1, "step": 1, "world_size": true}', "state.json: world_size is True, not a count"),
        ("[1, 2]", "state.json: expected an object, got a list"),
        ("null", "state.json: expected an object, got null"),
        ("{", "state.json: not readable as JSON"),
        ("[" * 100_000, "state.json: not readable as JSON"),
    ],
)
def test_unusable_checkpoint_says_why(tmp_path: Path, state: str, message: str) -> None:
    folder = checkpoint.save_checkpoint(tmp_path, 1, run_state(), keep=1)
    (folder / "state.json").write_text(state)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_checkpoint(folder, run_state())


def edit_json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        changed = change(value)
        (folder / name).write_text(json.dumps(value if changed is None else changed))

    return edit


def edit_tensors(name: str, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return edit


OPTIMIZER = "optimizer.safetensors"


def drop(*keys: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(key) for key in keys]


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (edit_tensors(OPTIMIZER, drop("state.exp_avg.weight")), "moments of weight have a missing .*: exp_avg"),
        (
            edit_tensors(OPTIMIZER, drop(*(f"state.{k}.weight" for k in ("step", "exp_avg", "exp_avg_sq")))),
            "the moments of 1 parameters are missing, the first: weight",
        ),
        (edit_tensors(OPTIMIZER, lambda t: t.update({"state.exp_avg.bias": torch.ones(3)})), r"bias .*shape \[3\]"),
        (edit_tensors(OPTIMIZER, lambda t: t.update({"weight.bias": torch.ones(2, 2)})), r"bias .*shape \[2, 2\]"),
        (
            edit_tensors(OPTIMIZER, lambda t: t.update({"weight.bias": torch.ones(2).half()})),
            "float16, but is now .*float32",
        ),
        (edit_tensors(OPTIMIZER, drop("weight.bias")), "other trainable parameters; 1 differ, the first: bias"),
        (lambda folder: (folder / OPTIMIZER).write_bytes(b"x" * 50), "optimizer.safetensors: cannot be read"),
        (lambda folder: (folder / OPTIMIZER).unlink(), "optimizer.safetensors: cannot be read"),
        (edit_json("optimizer.json", lambda v: [v]), "optimizer.json: cannot be read"),
        (edit_json("optimizer.json", lambda v: v.update(updates="1")), "optimizer.json: updates"),
        (edit_json("optimizer.json", lambda v: v.update(moments=3)), "optimizer.json: cannot be read"),
        (edit_json("rank-0.json", lambda v: [v]), "rank-0.json: expected an object, got a list"),
        (edit_json("rank-0.json", lambda v: v.pop("stream") and None), "rank-0.json: stream is missing"),
        (edit_json("rank-0.json", lambda v: v["stream"].update(epoch="0")), "rank-0.json: the data position has epoch"),
        (edit_json("rank-0.json", lambda v: v.update(python=[3])), "rank-0.json: the random state of Python"),
        (edit_json("rank-0.json", lambda v: v["python"].__setitem__(1, ["a"])), "the random state of Python"),
        (edit_json("rank-0.json", lambda v: v["numpy"].__setitem__(1, [1, 2])), "the random state of NumPy"),
        (
            edit_tensors("rank-0.safetensors", drop("sampler")),
            "rank-0.safetensors: the random state of torch .*sampler",
        ),
        (
            edit_tensors("rank-0.safetensors", lambda t: t.update(torch=torch.ones(3, dtype=torch.uint8))),
            "rank-0.safetensors: the random state of torch",
        ),
        (edit_json("data.json", lambda v: v.update(ids=3)), "data.json: not the identity"),
        (edit_json("data.json", lambda v: [v]), "data.json: expected an object, got a list"),
    ],
)
def test_a_file_that_is_not_what_was_written_is_one_line(
    tmp_path: Path, edit: Callable[[Path], object], text: str
) -> None:
    """Even if its checksum matches, or there is none."""
    run = run_state()
    advance(run)
    folder = checkpoint.save_checkpoint(tmp_path, 1, run, keep=1)
    edit(folder)
    with pytest.raises((CheckpointError, ValueError), match=text) as error:
        checkpoint.load_checkpoint(folder, run_state())
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_a_refused_optimizer_leaves_the_engine_as_it_was(tmp_path: Path) -> None:
    run, other = run_state(), run_state(seed=5)
    advance(run)
    folder = checkpoint.save_checkpoint(tmp_path, 1, run, keep=1)
    edit_tensors(OPTIMIZER, drop("state.exp_avg.bias"))(folder)
    before = [p.detach().clone() for p in other.policy.model.parameters()]
    with pytest.raises(ValueError, match="exp_avg"):
        other.engine.load(folder)
    assert all(torch.equal(a, b) for a, b in zip(before, other.policy.model.parameters(), strict=True))


def test_a_checkpoint_older_than_checksums_loads_with_one_note(tmp_path: Path) -> None:
    run = run_state()
    advance(run)
    folder = checkpoint.save_checkpoint(tmp_path, 1, run, keep=1)
    edit_json("state.json", lambda v: v.pop("files") and None)(folder)
    edit_json("optimizer.json", lambda v: v.pop("moments") and None)(folder)
    edit_json("rank-0.json", lambda v: v["stream"].update(fingerprint=None))(folder)
    (folder / "data.json").unlink()
    inspect(folder, 1)
    step, notes = checkpoint.load_checkpoint(folder, run_state())
    assert (step, len(notes)) == (1, 1)
    assert "has no checksums" in notes[0]


def test_every_file_has_a_checksum_and_any_change_of_it_is_named(tmp_path: Path) -> None:
    run = run_state()
    advance(run)
    folder = checkpoint.save_checkpoint(tmp_path, 1, run, keep=1)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "state.json")
    listed = json.loads((folder / "state.json").read_text())["files"]
    assert sorted(folder / name for name in listed) == files
    assert len(files) == 7
    assert inspect(folder, 1).checked
    for path in files:
        whole = path.read_bytes()
        flipped = bytes([whole[len(whole) // 2] ^ 1])
        for data in (whole[: len(whole) // 2] + flipped + whole[len(whole) // 2 + 1 :], whole[:-1], b"", None):
            if data is None:
                path.unlink()
            else:
                path.write_bytes(data)
            with pytest.raises(Damaged, match=f"^{re.escape(str(path))}: (missing|damaged)"):
                inspect(folder, 1)
        path.write_bytes(whole)
    assert inspect(folder, 1).checked


@pytest.mark.parametrize("size", [0, 1, 60, 200, 600, 2000])
def test_a_write_that_fails_names_the_path_and_the_bytes_and_leaves_the_last_checkpoint(
    tmp_path: Path, size: int
) -> None:
    run = run_state()
    advance(run)
    last = checkpoint.save_checkpoint(tmp_path, 1, run, keep=1)
    advance(run)
    text = (
        rf"^{tmp_path}/checkpoints/step-00000002: not written: .*(too large|os error 27).*; "
        r"needs \d+ bytes, [\d,]+ are free; the last checkpoint, step-00000001, is kept$"
    )
    with file_size_limit(size), pytest.raises(CheckpointError, match=text):
        checkpoint.save_checkpoint(tmp_path, 2, run, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    inspect(last, 1)
    assert checkpoint.save_checkpoint(tmp_path, 2, run, keep=1).name == "step-00000002"


def test_a_save_that_cannot_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_state()
    needed = checkpoint.bytes_needed(run)
    assert needed == 6 * 4 + 6 * 12
    checkpoint.save_checkpoint(tmp_path, 1, run, keep=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    monkeypatch.setattr(run.policy, "save", None)  # would be called
    with pytest.raises(
        CheckpointError, match=rf"step-00000002: .*needs {needed} bytes, {needed - 1} are free; the last"
    ):
        checkpoint.save_checkpoint(tmp_path, 2, run, keep=1)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


class Killed(BaseException):
    """Like a SIGKILL at a call: no code that catches errors may catch it."""


@pytest.mark.gate  # each of about 70 kills flushes to the disk many times
def test_a_kill_at_any_call_leaves_a_sound_checkpoint_and_a_folder_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saves with rotation, a kept checkpoint and repeated steps, killed at each call that changes the folder."""
    left: list[int] = []  # calls until the kill; empty: none

    def lethal(whole: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if left:
                left[0] -= 1
                if not left[0]:
                    raise Killed
            return whole(*arguments, **options)

        return call

    def work(out: Path) -> None:
        run = run_state()
        for step in (1, 2, 3):
            checkpoint.save_checkpoint(out, step, run, keep=1)
            keeping.keep(out, keeping.BEST, 2 if step > 1 else 1)
        keeping.set_aside(out, 2)
        checkpoint.save_checkpoint(out, 3, run, keep=1)

    for module, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (os, "open")):
        monkeypatch.setattr(module, name, lethal(getattr(module, name)))
    monkeypatch.setattr(Path, "mkdir", lethal(Path.mkdir))
    kills, reached, over = 0, set[int](), False
    while not over:
        out = tmp_path / str(kills)
        out.mkdir()
        left[:] = [kills + 1]
        try:
            work(out)
            over = True
        except Killed:
            kills += 1
        left.clear()
        latest = keeping.latest_checkpoint(out)
        if latest is not None:
            reached.add(keeping.step_of(latest))
            inspect(latest, keeping.step_of(latest))
            checkpoint.load_checkpoint(latest, run_state())
        keeping.kept(out)
        work(out)
        assert [path.name[-1] for path in keeping.list_checkpoints(out)] == ["2", "3"]
        assert not list((out / "checkpoints").glob(f"{keeping.TEMPORARY}*"))
    assert kills > 60
    assert reached == {1, 2, 3}


def test_one_process_per_folder(tmp_path: Path) -> None:
    other = checkpoint.lock_run(tmp_path)
    with checkpoint.lock_run(tmp_path), pytest.raises(CheckpointError, match="another process"):
        other.__enter__()
    with checkpoint.lock_run(tmp_path):
        pass
