"""Loggers: their calls, that none can end a run, and that the built-in ones write their data, offline."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastrl.answers import View
from fastrl.cli.main import main
from fastrl.config.sections import LOGGERS
from fastrl.data.records import Record
from fastrl.data.scenes import scene_record
from fastrl.recipe import RecipeError
from fastrl.run.loggers import BUILT_IN, FAILURES, Logger, Loggers, make_loggers
from fastrl.run.logs import read_rows
from fastrl.run.samples import SIDE, Sample, drawn, with_picture
from fastrl.trainer import train
from tests.helpers.logged import SAMPLES, SIZE, info, write
from tests.helpers.training import make_recipe, make_records

Folder = Callable[[str], Path]
REPO = Path(__file__).resolve().parents[3]
SMALL = {"data__prompts_per_step": 1, "rollout__group_size": 2, "rollout__max_new_tokens": 4, "optim__steps": 2}
MINE = '''
import json
from pathlib import Path


class Logger:
    """Writes down what it is told."""

    def open(self, run):
        self.file = (run.folder / "mine.txt").open("a")
        self.say("open", run.name, run.step, run.recipe["method"]["kind"], run.project)

    def log(self, step, values):
        assert all(type(value) is float for value in values.values())
        self.say("log", step, sorted(key for key in values if key.startswith(("reward/mean", "eval/f1", "step"))))

    def samples(self, step, rows):
        self.say("samples", step, [[row["id"], list(row["picture"].size)] for row in rows])

    def close(self):
        self.say("close")
        self.file.close()

    def say(self, *words):
        self.file.write(json.dumps(words) + "\\n")


class Plain:
    def log(self, step, values):
        pass


class Raises:
    """Fails in one hook."""

    hook = "log"

    def __init__(self):
        setattr(self, self.hook, self.fail)

    def log(self, step, values):
        pass

    def fail(self, *given):
        raise OSError("no network")


class Open(Raises):
    hook = "open"


class Samples(Raises):
    hook = "samples"


class Close(Raises):
    hook = "close"


class Exits:
    def log(self, step, values):
        raise SystemExit(3)


class Needs:
    def __init__(self, key):
        pass


class Misspelt(Plain):
    def sample(self, step, rows):
        pass


class NoFunction(Plain):
    samples = True


class Nothing:
    pass


class Awaited:
    async def log(self, step, values):
        pass


class OneArgument:
    def log(self, values):
        pass


class Moves:
    def log(self, step, values):
        import os
        os.chdir("/")
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a user, with a file in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_logger.py").write_text(MINE)
    return tmp_path


def test_a_logger_of_a_users_own_is_told_of_a_run_from_the_command_line(
    tiny_folder: Folder, mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (56, 84), "blue").save(mine / "a.png")
    (mine / "data.jsonl").write_text(json.dumps({"image": "a.png", "text": "abc"}) + "\n")
    keys = {
        "optim.steps": 2,
        "rollout.group_size": 2,
        "rollout.max_new_tokens": 4,
        "data.prompts_per_step": 1,
        "log.to": "[my_logger.py:Logger, my_logger.py:Raises, my_logger.py:Close]",
        "log.project": "words",
        "log.samples_every": 2,
        "log.samples": 1,
        "eval.spec": "ocr:data.jsonl",
        "eval.every": 2,
        "eval.max_new_tokens": 4,
        "checkpoint.final": "false",
    }
    arguments = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    command = ["train", "perception-r1-ocr-tiny", "--model", str(tiny_folder("qwen2_5")), "--data", "ocr:data.jsonl"]
    monkeypatch.setattr(sys, "argv", ["fastrl", *command, "--out", "out", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    message = capsys.readouterr().err
    assert ended.value.code in (0, None), message
    assert [json.loads(line) for line in (mine / "out/mine.txt").read_text().splitlines()] == [
        ["open", "out", 0, "perception-r1", "words"],
        ["log", 0, ["eval/f1"]],
        ["log", 1, ["reward/mean"]],
        ["samples", 1, [["0", [56, 84]]]],
        ["log", 2, ["reward/mean"]],
        ["log", 2, ["eval/f1"]],
        ["close"],
    ]
    for name, hook in (("Raises", "log"), ("Close", "close")):
        assert (
            message.count(f"logger my_logger.py:{name} failed in {hook}: ")
            == message.count(f"my_logger.py:{name}")
            == 1
        )
    assert "in fail: OSError: no network; the run continues" in message
    noted = [row["note"] for row in read_rows(mine / "out/notes.jsonl")]
    assert any(text.startswith("logger my_logger.py:Raises failed in log") for text in noted)


@pytest.mark.parametrize(
    ("name", "hook"), [("Open", "open"), ("Samples", "samples"), ("Exits", "log"), ("Moves", "log")]
)
def test_a_logger_that_fails_is_named_once_and_never_ends_a_run(
    tiny_folder: Folder, mine: Path, capsys: pytest.CaptureFixture[str], name: str, hook: str
) -> None:
    recipe = make_recipe(
        tiny_folder("qwen2_5"), mine / "out", log__to=f"my_logger.py:{name}", log__samples_every=1,
        checkpoint__final=False, checkpoint__every=0, **SMALL,
    )  # fmt: skip
    assert train(recipe, records=make_records()).steps == 2
    assert capsys.readouterr().err.count(f"logger my_logger.py:{name} failed in {hook}: ") == 1


def test_a_logger_that_fails_too_often_in_a_row_is_called_no_more() -> None:
    calls: list[int] = []

    class Flaky(Logger):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            calls.append(step)
            if step != 2:
                raise ValueError(step)

    message: list[str] = []
    loggers = Loggers({"flaky": Flaky()}, info(Path()), message.append)
    for step in range(10):
        loggers.log(step, {"step": step, "a": 1})
    assert calls == [0, 1, 2, 3, 4, 5] == list(range(3 + FAILURES))
    assert len(message) == 1
    loggers.close()


def test_a_logger_is_handed_finite_numbers_of_its_own() -> None:
    heard: list[dict[str, Any]] = []

    class Greedy(Logger):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            heard.append(dict(values))
            values.clear()  # type: ignore[attr-defined]

        def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
            heard.append(dict(rows[0]))
            rows[0].clear()  # type: ignore[attr-defined]

    loggers = Loggers({"one": Greedy(), "two": Greedy()}, info(Path()), print)
    row = {"step": 3, "a": 1, "b": float("nan"), "c": None, "d": "x", "e": True, "f": float("inf"), "g": 0.5}
    loggers.log(3, row)
    loggers.samples(3, lambda: [{"answer": "x"}])
    assert heard == [{"a": 1.0, "g": 0.5}] * 2 + [{"answer": "x"}] * 2
    assert len(row) == 8


def test_samples_are_only_made_for_a_logger_that_takes_them(mine: Path) -> None:
    class Numbers(Logger):
        def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def rows() -> list[dict[str, Any]]:
        raise AssertionError("pictures are drawn for nobody")

    plain = make_loggers(["my_logger.py:Plain"])
    assert all(isinstance(logger, Logger) for logger in plain.values())
    loggers = Loggers({**plain, "numbers": Numbers()}, info(mine), print)
    loggers.samples(1, rows)
    (mine / "run").mkdir()
    about = replace(info(mine / "run"), recipe={"method": {"kind": "perpo"}})
    loggers = Loggers({**plain, **make_loggers(["my_logger.py:Logger"])}, about, print)
    loggers.samples(1, lambda: [{"id": "a", "picture": Image.new("RGB", (3, 2))}])
    loggers.close()
    assert '["samples", 1, [["a", [3, 2]]]]' in (mine / "run" / "mine.txt").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_logger.py:Needs", "my_logger.py:Needs cannot be created without arguments"),
        ("my_logger.py:Misspelt", "sample is not a hook of a logger; did you mean samples"),
        ("my_logger.py:NoFunction", "samples must be a function, got True"),
        ("my_logger.py:Awaited", "log is async: it would never be awaited"),
        ("my_logger.py:OneArgument", r"log is called as log\(step, values\): too many positional"),
        ("my_logger.py:Nothing", r"has no log\(step, values\); a logger may have open, log, samples, close"),
        ("my_logger.py:Gone", "has no function 'Gone'"),
        ("other.py:Logger", "no such file: other.py"),
        ("no_such_module.at_all:Logger", "no_such_module.at_all cannot be imported"),
        ("fastrl.run.loggers:Logger", r"has no log\(step, values\)"),
    ],
)
def test_what_is_no_logger_is_refused_before_any_work(mine: Path, name: str, message: str) -> None:
    recipe = make_recipe(mine / "no model", mine / "out", log__to=[name])
    with pytest.raises(ValueError, match=f"log.to: .*{message}"):
        train(recipe)
    assert not (mine / "out").exists()


def test_a_logger_that_is_not_installed_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastrl.run.loggers._installed", lambda name: False)
    for name in LOGGERS:
        with pytest.raises(ValueError, match=rf"log.to: {name} is not installed: pip install 'fastrl\[track\]'"):
            train(make_recipe(tmp_path / "no model", tmp_path / "out", log={"to": [name]}))
    assert not (tmp_path / "out").exists()
    assert make_loggers(None) == {}  # TensorBoard where it is installed


def test_a_class_of_a_notebook_is_a_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cell(Logger):
        def log(self, step: int, values: Mapping[str, float]) -> None: ...

    monkeypatch.setattr(sys.modules["__main__"], "Cell", Cell, raising=False)
    assert isinstance(make_loggers(["__main__:Cell"])["__main__:Cell"], Cell)


@pytest.mark.parametrize(("name", "near"), [("wandbb", "wandb"), ("tensor-board", "tensorboard"), ("mlflow", "")])
def test_an_unknown_name_is_refused_with_the_recipe(tmp_path: Path, name: str, near: str) -> None:
    hint = f"did you mean {near}" if near else "there are tensorboard, wandb, trackio and my_logger.py:Logger"
    with pytest.raises(RecipeError, match=rf"log\.to: no logger '{name}'; {hint}"):
        make_recipe(tmp_path, tmp_path, log__to=[name])


@pytest.mark.parametrize(
    ("given", "to"),
    [
        ({}, None),
        ({"tensorboard": True}, None),
        ({"tensorboard": False}, []),
        ({"tensorboard": False, "to": ["wandb", "tensorboard"]}, ["wandb"]),
        ({"tensorboard": True, "to": "wandb"}, ["tensorboard", "wandb"]),
        ({"to": ["wandb", "wandb"]}, ["wandb"]),
    ],
)
def test_the_key_from_before_is_still_read(tmp_path: Path, given: dict[str, Any], to: list[str] | None) -> None:
    recipe = make_recipe(tmp_path, tmp_path, log=given)
    assert recipe.log.to == to
    assert "tensorboard:" not in recipe.dump()
    with pytest.raises(RecipeError, match=r"log: tensorboard must be true or false, got 'x'; log\.to replaces it"):
        make_recipe(tmp_path, tmp_path, log={"tensorboard": "x"})


def test_every_name_of_the_recipe_has_its_logger() -> None:
    assert tuple(BUILT_IN) == LOGGERS


# Pictures


def seen(**changes: Any) -> Record:
    return replace(scene_record("grounding", 0, seed=1), views=(View(112, 112, 224, 224),), frame="resized", **changes)


def test_a_picture_shows_the_true_boxes_and_those_of_the_answer() -> None:
    white = Image.new("RGB", (112, 112), "white")
    record = seen(images=(white,), target={"box": (10, 20, 50, 60), "expression": "it"})
    picture = drawn(record, '[{"bbox_2d": [140, 140, 180, 180]}, {"bbox_2d": [-9e9, 200, 9e9, 1]}]')
    green, red = (26, 152, 80), (215, 48, 39)
    assert picture.getpixel((10, 40)) == picture.getpixel((30, 60)) == green
    assert picture.getpixel((70, 80)) == red
    assert picture.getpixel((30, 40)) == (255, 255, 255)
    assert white.getpixel((10, 40)) == (255, 255, 255)  # the record's picture is unchanged
    large = drawn(seen(images=(Image.new("RGB", (2000, 1000)),)), "nothing")
    assert large.size == (SIDE, SIDE // 2)


@pytest.mark.parametrize("record", [None, seen(images=()), seen(images=(Path("gone.png"),))])
def test_a_sample_without_a_picture_is_shown_without_one(record: Record | None) -> None:
    assert with_picture(Sample({"answer": "[1, 2, 3, 4]"}, record)) == {"answer": "[1, 2, 3, 4]", "picture": None}


# The built-in loggers themselves


def write_alone(name: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """:func:`write` in a new process, which must print nothing: the standard output of a command is its result."""
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    command = [sys.executable, "-m", "tests.helpers.logged", name, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_tensorboard_holds_numbers_texts_and_pictures(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert write("tensorboard", tmp_path) == []
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.125), (2, 0.25)]
    assert [(e.step, e.value) for e in events.Scalars("eval/f1")] == [(1, 0.5), (2, 0.5)]
    (picture,) = events.Images("samples/0")
    assert (picture.step, picture.width, picture.height) == (1, *SIZE)
    (text,) = events.Tensors("samples/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert r"| r1 | a \| b | [1, 2, 30, 40]\x1b[31m | 0.500 |" in shown


def test_wandb_holds_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a new process: the last rows may reach the file only when the process ends."""
    pytest.importorskip("wandb")
    from tests.helpers.wandb_file import history

    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB__SERVICE_WAIT", "WANDB_INIT_TIMEOUT"):  # a busy machine takes longer than the usual 30 and 90 s
        monkeypatch.setenv(name, "3600")
    write_alone("wandb", tmp_path / "out", monkeypatch)
    rows = {row["_step"]: row for row in history(tmp_path / "out" / "wandb")}
    assert {step: (row["reward/mean"], row["eval/f1"]) for step, row in rows.items()} == {
        1: (0.125, 0.5),
        2: (0.25, 0.5),
    }
    runs = list((tmp_path / "out" / "wandb").glob("offline-run-*"))
    assert len({run.name.rpartition("-")[2] for run in runs}) == 1  # one run, resumed
    assert all((tmp_path / "out" / "wandb-id").read_text() in run.name for run in runs)
    (table,) = (tmp_path / "out").rglob("*.table.json")
    assert [row[1:4] for row in json.loads(table.read_text())["data"]] == [
        [sample["id"], sample["question"], sample["answer"]] for sample in SAMPLES
    ]
    (picture,) = (tmp_path / "out").rglob("media/images/**/*.png")
    with Image.open(picture) as image:
        assert image.size == SIZE


def test_trackio_holds_a_run_in_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a new process, as trackio reads its folder when it is imported."""
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    write_alone("trackio", tmp_path / "out", monkeypatch)
    with sqlite3.connect(tmp_path / "trackio" / "birds.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    found = [(name, step, json.loads(metrics)) for name, step, metrics in rows]
    numbers = [(name, step, row) for name, step, row in found if "samples" not in row]
    assert numbers == [
        ("words", 1, {"reward/mean": 0.125}),
        ("words", 1, {"eval/f1": 0.5}),
        ("words", 2, {"reward/mean": 0.25}),
        ("words", 2, {"eval/f1": 0.5}),
    ]
    (table,) = (row["samples"]["_value"] for _, _, row in found if "samples" in row)
    assert [row["answer"] for row in table] == [sample["answer"] for sample in SAMPLES]
    with Image.open(tmp_path / "trackio" / "media" / table[0]["picture"]["file_path"]) as image:
        assert image.size == SIZE
