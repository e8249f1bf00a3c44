"""Stopped and resumed equals never stopped: the same weights to the bit, the same metrics, whatever stopped it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastrl.run import checkpoint
from fastrl.run.checkpoint import CheckpointError
from fastrl.trainer import train
from tests.helpers.training import make_recipe, make_records, steady_rows

Folder = Callable[[str], Path]
REPO = Path(__file__).resolve().parents[3]


class Stop(Exception):
    """Stands for anything that ends a run between two steps."""


def same_ending(a: Path, b: Path) -> None:
    """The last checkpoints and the metrics of two runs are equal."""
    assert steady_rows(a) == steady_rows(b)
    first, second = checkpoint.latest_checkpoint(a), checkpoint.latest_checkpoint(b)
    assert first is not None
    assert second is not None
    assert first.name == second.name
    for name in ("optimizer.safetensors", "model/model.safetensors", "rank-0.safetensors"):
        left, right = load_file(first / name), load_file(second / name)
        assert left.keys() == right.keys()
        assert [key for key in left if not torch.equal(left[key], right[key])] == []
    assert (first / "rank-0.json").read_text() == (second / "rank-0.json").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__schedule": "cosine", "optim__warmup": 1},
        {"optim__updates_per_batch": 2, "method__beta": 0.05, "method__aggregate": "token"},
        {"optim__updates_per_batch": 2, "method__beta": 0.05, "model__lora": {"rank": 2, "dropout": 0.1}},
        {"method__zero_variance": "resample", "rollout__max_new_tokens": 2, "model__gradient_checkpointing": True},
        {"optim__states": "8bit", "optim__token_budget": 96},
        {"optim__states": "offload", "model__gradient_checkpointing": True, "model__offload_activations": True},
        {"optim__gradient_release": True, "optim__clip_norm": None, "model__dtype": "bfloat16"},
    ],
    ids=["plain", "two-updates", "lora-two-updates", "resample", "8bit", "offload", "release"],
)
def test_pain_07_resumed_equals_never_stopped(tiny_folder: Folder, tmp_path: Path, changes: dict[str, Any]) -> None:
    model = tiny_folder("qwen2_5")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(make_recipe(model, whole, **changes), records=make_records(), show=False)

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:  # a step after the checkpoint: it is logged, lost, and done again
            raise Stop

    recipe = make_recipe(model, parts, **changes)
    with pytest.raises(Stop):
        train(recipe, records=make_records(), on_step=stop, show=False)
    assert len(steady_rows(parts)) == 3
    summary = train(recipe, records=make_records(), resume=True, show=False)
    assert summary.steps == 4
    same_ending(whole, parts)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_run_goes_on_only_from_the_weights_it_began_with(tiny_folder: Folder, tmp_path: Path, lora: Any) -> None:
    """The trained model is no place to resume from: the reference would move, an adapter would count twice."""
    changes: dict[str, Any] = {"model__lora": lora, "method__beta": 0.1, "optim__steps": 2, "optim__lr": 1e-2}
    out = tmp_path / "run"
    train(make_recipe(tiny_folder("qwen2_5"), out, **changes), records=make_records(), show=False)
    changes["optim__steps"] = 3
    with pytest.raises(CheckpointError, match="began with other weights"):
        train(make_recipe(out / "model", out, **changes), records=make_records(), resume=True, show=False)
    moved = shutil.copytree(tiny_folder("qwen2_5"), tmp_path / "moved")
    assert train(make_recipe(moved, out, **changes), records=make_records(), resume=True, show=False).steps == 3


@pytest.fixture(scope="module")
def never_stopped(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the killed ones must equal."""
    out = tmp_path_factory.mktemp("never_stopped")
    train(make_recipe(tiny_folder("qwen2_5"), out, checkpoint__keep=1), records=make_records(), show=False)
    return out


CHILD = """
    import os, signal, sys
    from pathlib import Path
    import torch
    torch.set_num_threads({threads})  # sums are split among threads: another number rounds otherwise
    sys.path.insert(0, {tests!r})
    from tests.helpers.training import make_recipe, make_records
    from fastrl.run import checkpoint
    from fastrl.trainer import train

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    point, saved, flush = {point!r}, [], checkpoint._flush
    if point == "writing":  # in the middle of the second checkpoint
        checkpoint._flush = lambda folder: die() if saved else (saved.append(1), flush(folder))
    recipe = make_recipe(Path({model!r}), Path({out!r}), checkpoint__keep=1)
    on_step = lambda row: die() if point == "logged" and row["step"] == 3 else None
    train(recipe, records=make_records(), on_step=on_step, show=False)
"""


@pytest.fixture(scope="module")
def killed(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs that killed themselves at a point, by its name; the processes run side by side."""
    folders = {point: tmp_path_factory.mktemp(point) for point in ("logged", "writing")}
    started = []
    for point, out in folders.items():
        values = {
            "tests": str(REPO),
            "threads": torch.get_num_threads(),
            "point": point,
            "model": str(tiny_folder("qwen2_5")),
            "out": str(out),
        }
        script = textwrap.dedent(CHILD).format(**values)
        started.append(subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True))
    for process in started:
        _, errors = process.communicate(timeout=1200)
        assert process.returncode == -signal.SIGKILL, errors
    return folders


@pytest.mark.parametrize("point", ["logged", "writing"])
def test_pain_07_kill_9_loses_at_most_the_steps_since_the_checkpoint(
    tiny_folder: Folder, never_stopped: Path, killed: dict[str, Path], point: str
) -> None:
    out = killed[point]
    assert [row["step"] for row in steady_rows(out)][-1] == {"logged": 3, "writing": 4}[point]
    assert checkpoint.list_checkpoints(out)[-1].name == "step-00000002"
    recipe = make_recipe(tiny_folder("qwen2_5"), out, checkpoint__keep=1)
    summary = train(recipe, records=make_records(), resume=True, show=False)
    assert summary.steps == 4
    same_ending(never_stopped, out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000004"]


def test_resume_without_a_checkpoint_begins_anew(tiny_folder: Folder, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, optim__steps=1)

    def stop(row: dict[str, Any]) -> None:
        raise Stop

    with pytest.raises(Stop):
        train(recipe, records=make_records(), on_step=stop, show=False)
    train(recipe, records=make_records(), resume=True, show=False)
    assert [row["step"] for row in steady_rows(tmp_path)] == [1]


def test_finished_run_can_be_made_longer_but_not_another(tiny_folder: Folder, tmp_path: Path) -> None:
    model = tiny_folder("qwen2_5")
    train(make_recipe(model, tmp_path, optim__steps=1), records=make_records(), show=False)
    again = train(make_recipe(model, tmp_path, optim__steps=1), records=make_records(), resume=True, show=False)
    assert (again.steps, again.last) == (1, {})
    with pytest.raises(CheckpointError, match=r"optim\.lr: was 0\.001, is 0\.5"):
        train(make_recipe(model, tmp_path, optim__lr=0.5), records=make_records(), resume=True, show=False)
    with pytest.raises(ValueError, match="records was 6 and is now 5"):
        train(make_recipe(model, tmp_path, optim__steps=2), records=make_records(5), resume=True, show=False)
    longer = train(make_recipe(model, tmp_path, optim__steps=2), records=make_records(), resume=True, show=False)
    assert longer.steps == 2
    assert [row["step"] for row in steady_rows(tmp_path)] == [1, 2]
