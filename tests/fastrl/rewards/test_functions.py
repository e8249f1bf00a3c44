"""Reward functions from a user's own file, outside the package: through the command, a recipe and the library."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastrl.cli.main import app
from fastrl.data.records import Record
from fastrl.methods.rollouts import RecipeRewards
from fastrl.recipe import RecipeError, RewardRecipe, load_recipe
from fastrl.rewards.checked import RewardError
from fastrl.rewards.functions import Answer, RewardFunction
from fastrl.run.logs import read_rows
from fastrl.trainer import TrainingError, train
from tests.helpers.training import make_recipe, make_records, steady_rows

Folder = Callable[[str], Path]
CODE = """
import asyncio, random, time
from dataclasses import dataclass
import numpy as np
from fastrl.rewards import Reward

CALLS = []
CLIENT = None

def score(prompts, completions, completion_ids, text, solution=None, **columns):
    CALLS.append((len(completions), completions[0], prompts[0], sorted(columns)))
    return [len(ids) / 10 + random.random() for ids in completion_ids]

def narrow(text, completions):
    return np.array([float(len(t)) for t in text])

async def later(completions, **kwargs):
    global CLIENT
    CLIENT = CLIENT or asyncio.get_running_loop()
    assert CLIENT is asyncio.get_running_loop()
    await asyncio.sleep(0)
    return [0.5 if i % 2 else None for i in range(len(completions))]

class Counter:
    def __init__(self):
        self.calls = 0
    def __call__(self, completions, **kwargs):
        self.calls += 1
        return [float(self.calls)] * len(completions)

@dataclass(frozen=True, kw_only=True)
class Mine(Reward):
    task = "ocr"
    parts = ("a", "b")
    def score(self, answers, records):
        return {"a": [1.0] * len(answers), "b": [float(len(r.target["text"])) for r in records]}

def nothing(completions, **kwargs):
    return [None] * len(completions)

def nan(completions, **kwargs):
    return [float("nan")] * len(completions)

def short(completions, **kwargs):
    return [1.0]

def none(completions, **kwargs):
    return None

def raises(completions, id, **kwargs):
    if "r1" in id:
        raise KeyError("lost")
    return [1.0] * len(id)

def hangs(completions, **kwargs):
    time.sleep(60)

def asks(completions, solutions):
    return [1.0] * len(completions)

def text(completions, **kwargs):
    return [1.0] * len(completions)

def mean(completions, **kwargs):
    return [1.0] * len(completions)

def leaves(completions, **kwargs):
    raise SystemExit(3)

def by_place(prompts, completions, /, **kwargs):
    return [1.0] * len(completions)

def misspelt(completion, **kwargs):
    return [1.0] * len(completion)

def moves(completions, **kwargs):
    import os
    os.chdir("..")
    return [1.0] * len(completions)

def scalars(completions, **kwargs):
    import torch
    return [torch.tensor(1.0), np.float32(2), True][:len(completions)]

class Table:
    def __call__(self, completions, **kwargs):
        return self
    def tolist(self):
        return [1, None, 2]

def keeps_nothing(prompts, completions, completion_ids, records, box, note, **kwargs):
    for value in (*prompts, *completions, *completion_ids, *box, note[0], records[0].target, records[0].columns):
        value.clear()
    records[0].messages[0]["content"].clear()
    return [1.0] * len(prompts)

def breaks_later(completions, **kwargs):
    CALLS.append(len(completions))
    if len(CALLS) == 5:
        raise RuntimeError("the service is gone")
    return [float(len(c[0]["content"])) for c in completions]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_rewards.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(name: str, **options: Any) -> RewardFunction:
    return RewardFunction(f"my_rewards.py:{name}", **{"text": False, "timeout": 20.0, **options})


def answers(n: int = 3, **target: Any) -> list[Answer]:
    records = [Record(f"r{i}", "ocr", (), (), {"text": "x" * i, **target}, source=f"d.jsonl:{i}") for i in range(n)]
    return [Answer(f"answer {i}", [i, 7], record) for i, record in enumerate(records)]


def test_what_a_function_is_given(folder: Path) -> None:
    assert made("narrow")(answers()) == [0.0, 1.0, 2.0]  # no **kwargs: what it names; an array will do
    for text, first in ((False, [{"role": "assistant", "content": "answer 0"}]), (True, "answer 0")):
        function = made("score", text=text)
        function(answers(box=[1, 2]))
        n, completion, prompt, columns = function._target.__globals__["CALLS"].pop()
        assert (n, completion, prompt, columns) == (3, first, [], ["box", "id", "records", "task"])


def test_kinds_of_functions(folder: Path) -> None:
    later = made("later")
    before = threading.active_count()
    for _ in range(3):
        assert later(answers()) == [None, 0.5, None]
    assert threading.active_count() <= before + 1  # one loop for all calls
    counter = made("Counter")
    assert [counter(answers(1)), counter(answers(1))] == [[1.0], [2.0]]
    rows = answers()
    other = rows[1]._replace(record=Record("o", "grounding", (), (), {}))
    assert made("Mine")([rows[0], other, rows[2]]) == [1.0, None, 3.0]


def test_values_of_other_types(folder: Path) -> None:
    assert made("scalars")(answers()) == [1.0, 2.0, 1.0]
    assert made("Table")(answers()) == [1.0, None, 2.0]


def test_what_a_function_changes_stays_as_it_was_in_the_data(folder: Path) -> None:
    def record() -> Record:
        message = {"role": "user", "content": [{"type": "text", "text": "read"}]}
        return Record("r", "ocr", (), (message,), {"text": "x", "box": [1, 2]}, columns={"note": {"a": [1]}})

    given = record()
    made("keeps_nothing")([Answer("a", [1], given), Answer("b", [1], given)])
    assert (given, given.columns) == (record(), record().columns)


def test_a_function_of_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "cell", lambda completions: [0.5] * len(completions), raising=False)
    assert RewardFunction("__main__:cell", text=True, timeout=None)(answers(2)) == [0.5, 0.5]


def test_arguments_by_position_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"by_place: .* prompts, completions can only be given by position"):
        made("by_place")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("leaves", r"leaves: record 'r0' .*raised SystemExit: 3 \(.*my_rewards.py:\d+: in leaves\)"),
        ("moves", "my_rewards.py:moves: changes the working folder to .*; the run's paths are relative to "),
        ("nan", r"my_rewards.py:nan: record 'r0' \(d.jsonl:0\), answer 'answer 0': the value is nan"),
        ("short", "my_rewards.py:short: 1 values for 3 answers to records 'r0', 'r1', 'r2'"),
        ("none", "my_rewards.py:none: must give a list of 3 numbers or None, got None"),
        (
            "raises",
            r"my_rewards.py:raises: record 'r1' \(d.jsonl:1\), answer 'answer 1': raised KeyError: 'lost' \(.*s.py:\d",
        ),
        ("hangs", "my_rewards.py:hangs: no answer within 0.2 s .reward.timeout. for 3 answers to records 'r0'"),
    ],
)
def test_a_fault_names_file_function_and_record(folder: Path, name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        made(name, timeout=0.2 if name == "hangs" else 20.0)(answers())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"function": "gone.py:score"}, "reward.function: no such file: gone.py"),
        ({"function": "my_rewards.py:scoer"}, "my_rewards.py has no function 'scoer'; it has .*score"),
        ({"function": "my_rewards.py"}, "must be my_file.py:function"),
        ({"function": "my_rewards.py:mean"}, "reward/mean is already a metric"),
        ({"function": "my_rewards.py:text"}, "text is already a component of the task"),
        ({"function": ["my_rewards.py:nan", "fastrl_own:nan"]}, "have the same name"),
        ({"function": "my_rewards.py:score", "weights": {"scoer": 1.0}}, "'scoer'; did you mean 'score'"),
        ({"weights": {"score": 1.0}}, "unknown component in 'weights': 'score'"),
        ({"builtin": False}, "leaves nothing to score"),
    ],
)
def test_what_a_recipe_gets_wrong(
    folder: Path, monkeypatch: pytest.MonkeyPatch, section: Mapping[str, Any], message: str
) -> None:
    (folder / "fastrl_own.py").write_text("def nan(completions):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(ValueError, match=message):
        RecipeRewards(RewardRecipe(**section)).check(make_records(1))


def test_functions_go_with_methods_that_score() -> None:
    with pytest.raises(RecipeError, match=r"reward\.function: method\.kind: .* scores no answers"):
        load_recipe("reper-caption-tiny", {"reward.function": "my_rewards.py:score"})


def test_names_are_known_and_weigh(folder: Path, tiny_folder: Folder) -> None:
    reward = {"function": ["my_rewards.py:narrow", "my_rewards.py:nothing"], "weights": {"narrow": 0.5}}
    recipe = make_recipe(tiny_folder("qwen2_5"), folder / "run", reward=reward, optim__steps=1)
    train(recipe, records=make_records(), show=False)
    (row,) = read_rows(folder / "run/metrics.jsonl")
    assert row["reward/mean"] == pytest.approx(row["reward/text"] + 0.5 * row["reward/narrow"])
    assert "reward/nothing" not in row
    alone = make_recipe(
        tiny_folder("qwen2_5"), folder / "alone", optim__steps=1, reward={**reward, "builtin": False, "weights": {}}
    )
    own = [Record(f"{r.id}", "my-task", r.images, r.messages, r.target) for r in make_records()]
    train(alone, records=own, show=False)
    (row,) = read_rows(folder / "alone/metrics.jsonl")
    assert row["reward/mean"] == row["reward/narrow"] > 0
    assert "reward/text" not in row


@pytest.mark.parametrize("name", ["asks", "misspelt", "raises", "nothing"])
def test_it_is_tried_before_anything_is_sampled(folder: Path, tiny_folder: Folder, name: str) -> None:
    section = {"function": f"my_rewards.py:{name}", "builtin": False}
    recipe = make_recipe(tiny_folder("qwen2_5"), folder / "run", reward=section)
    printed = {
        "asks": "needs solutions, which record 'r1' does not have; it has task, id, text",
        "misspelt": "needs completion, which record 'r1' does not have; it has task, id, text, .*completions",
        "raises": "record 'r1'",
        "nothing": "nothing scores record 'r1' of task ocr: all give None",
    }
    with pytest.raises(RewardError, match=printed[name]):
        train(recipe, records=make_records(2)[1:], show=False)
    assert not (folder / "run/recipe.yaml").exists()


def test_a_fault_later_loses_nothing(folder: Path, tiny_folder: Folder) -> None:
    section = {"function": "my_rewards.py:breaks_later"}
    changes: dict[str, Any] = {"reward": section, "checkpoint__every": 0, "optim__steps": 4}
    recipe = make_recipe(tiny_folder("qwen2_5"), folder / "run", **changes)
    message = r"step \d: my_rewards.py:breaks_later: .*the service is gone.*Step \d was saved: continue .* --resume"
    with pytest.raises(TrainingError, match=message):
        train(recipe, records=make_records(), show=False)
    train(recipe, records=make_records(), show=False, resume=True)
    whole = make_recipe(tiny_folder("qwen2_5"), folder / "whole", **changes)
    train(whole, records=make_records(), show=False)
    assert steady_rows(folder / "run") == steady_rows(folder / "whole")
    assert len(steady_rows(folder / "run")) == 4


def test_the_command_takes_it(folder: Path) -> None:
    arguments = ["optim.steps=1", "data.prompts_per_step=2", "rollout.group_size=2", "rollout.max_new_tokens=4"]
    arguments += ["reward.function=my_rewards.py:later", "reward.weights.later=2", "reward.completions=text"]
    sets = [part for argument in arguments for part in ("--set", argument)]
    result = CliRunner().invoke(app, ["train", "perception-r1-grounding-tiny", "--out", "run", *sets])
    assert result.exit_code == 0, result.output
    (row,) = read_rows(folder / "run/metrics.jsonl")
    assert row["reward/later"] == 0.5
    assert math.isfinite(row["reward/mean"])
