"""Callbacks of ``train``: their arguments, how they end a run, which are refused; and the names of the package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastrl
from fastrl.run import checkpoint
from fastrl.run.callbacks import HOOKS, Callback, Callbacks, StopRun
from fastrl.run.logs import read_rows
from tests.helpers.training import make_recipe, make_records

Folder = Callable[[str], Path]


class Listener:
    """A duck-typed callback without a base class."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.paths: list[Path] = []

    def on_step(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def on_samples(self, rows: list[dict[str, Any]]) -> None:
        self.samples += rows

    def on_checkpoint(self, path: Path) -> None:
        assert (path / "model" / "config.json").is_file()
        self.paths.append(path)


class Stop(Callback):
    """Stops in one hook, at one step."""

    def __init__(self, hook: str, step: int) -> None:
        self.hook, self.step, self.told = hook, step, 0

    def on_step(self, row: dict[str, Any]) -> None:
        self.told = row["step"]
        row.clear()  # its own copy
        if (self.hook, self.told) == ("on_step", self.step):
            raise StopRun("good enough")

    def on_checkpoint(self, path: Path) -> None:
        if self.hook == "on_checkpoint" and path.name.endswith(str(self.step)):
            raise StopRun("good enough")


@pytest.mark.parametrize(("hook", "step"), [("on_step", 1), ("on_checkpoint", 1)])
def test_callbacks_are_told_and_stop_run_saves_and_ends(
    tiny_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str], hook: str, step: int
) -> None:
    every = 1 if hook == "on_checkpoint" else 2
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, optim__steps=3, checkpoint__every=every)
    listener = Listener()
    summary = fastrl.train(recipe, records=make_records(), callbacks=[Stop(hook, step), listener])
    saved = tmp_path / "checkpoints" / f"step-{step:08d}"
    assert (summary.interrupted, summary.steps, summary.checkpoint) == (True, step, saved)
    assert f"stopped after step {step} (good enough)" in capsys.readouterr().err
    assert listener.rows == read_rows(tmp_path / "metrics.jsonl")
    assert json.loads(json.dumps(listener.samples)) == read_rows(tmp_path / "samples.jsonl") != []
    assert listener.paths == checkpoint.list_checkpoints(tmp_path) == [saved]


@pytest.mark.parametrize("hook", ["on_samples", "on_step", "on_eval", "on_checkpoint"])
def test_a_run_that_a_callback_broke_can_be_resumed(tiny_folder: Folder, tmp_path: Path, hook: str) -> None:
    """Also before its first checkpoint: it then starts again from the beginning."""
    recipe = make_recipe(
        *(tiny_folder("qwen2_5"), tmp_path / "run"),
        optim__steps=2,
        checkpoint__every=2,
        eval={"spec": "scenes:ocr?n=1&size=56", "every": 1, "max_new_tokens": 2, "at_start": False},
    )

    def breaks(_: object, what: Any) -> None:
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fastrl.train(recipe, records=make_records(), callbacks=[type("Mine", (), {hook: breaks})()], show=False)
    summary = fastrl.train(recipe, records=make_records(), resume=True, show=False)
    assert [row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl")] == [1, 2]
    assert summary.steps == 2


def test_every_hook_is_called_and_the_first_reason_is_kept() -> None:
    told = []

    class Any_:
        def __getattr__(self, name: str) -> Any:
            if name not in HOOKS:
                raise AttributeError(name)

            def say(value: Any) -> None:
                told.append(name)
                raise StopRun

            return say

    callbacks = Callbacks([Any_()])
    callbacks.step({"step": 1})
    assert callbacks.reason == "a callback raised StopRun"
    callbacks.samples(1, [])
    callbacks.checkpoint(Path())
    callbacks.evaluation({})
    assert sorted(told) == sorted(HOOKS)


async def wait(self: object, row: Any) -> None:
    """No callback can be awaited."""


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"on_steps": print}, "on_steps is not a hook; did you mean on_step"),
        ({"on_step": print, "on_checkpoints": print}, "did you mean on_checkpoint"),
        ({"on_step": 3}, "on_step must be a function, got 3"),
        ({"on_step": lambda self: None}, r"on_step is called as <lambda>\(row\): too many positional"),
        ({"on_eval": wait}, "on_eval is async: it would never be awaited"),
        ({}, "has none of the hooks: on_step, on_samples, on_checkpoint, on_eval"),
    ],
)
def test_a_callback_that_would_never_be_called_is_refused_before_any_work(
    tmp_path: Path, attributes: dict[str, Any], message: str
) -> None:
    recipe = make_recipe(tmp_path / "no model", tmp_path / "out")
    with pytest.raises(TypeError, match=message):
        fastrl.train(recipe, callbacks=[type("Mine", (), attributes)()])
    with pytest.raises(TypeError, match="is a class"):
        fastrl.train(recipe, callbacks=[Listener])
    assert not (tmp_path / "out").exists()


def test_the_package_gives_its_names_and_imports_them_when_asked_for() -> None:
    from fastrl.evaluate import evaluate

    assert callable(evaluate)
    for name in fastrl.__all__:
        assert getattr(fastrl, name).__name__ == name
    assert set(fastrl.__all__) <= set(dir(fastrl))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = fastrl.trian
    code = (
        "import sys\nimport fastrl\nassert 'train' in dir(fastrl)\nassert 'torch' not in sys.modules\n"
        "from fastrl import Record, StopRun, reward_for\nassert 'fastrl.trainer' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
