"""Evaluation while training: no side effects, equal to ``fastrl eval``, keeps the best checkpoint, stops in time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastrl.data.records import Dataset, Record
from fastrl.evaluate import during, evaluate
from fastrl.evaluate.during import Evaluation, EvaluationError, held_out
from fastrl.evaluate.run import sample_records
from fastrl.models.open import open_policy
from fastrl.rollout import Generator, Sampling
from fastrl.run import keeping
from fastrl.run.callbacks import StopRun
from fastrl.run.logs import read_rows
from fastrl.trainer import Run, TrainingError, train
from tests.helpers.gloo import start
from tests.helpers.training import make_recipe, make_records, steady_evaluations, steady_rows

Folder = Callable[[str], Path]
SMALL = {"data__prompts_per_step": 1, "rollout__group_size": 2, "rollout__max_new_tokens": 4}
EVERY_TWO = {"eval__every": 2, "eval__samples": 2, "eval__max_new_tokens": 6, "eval__batch": 2}


def evaluated(model: Path, out: Path, **changes: Any) -> Any:
    return make_recipe(model, out, **{**EVERY_TWO, "checkpoint__keep": 9, **changes})


@pytest.fixture(scope="module")
def whole(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, evaluated before the first and after every second step."""
    out = tmp_path_factory.mktemp("whole")
    train(evaluated(tiny_folder("qwen2_5"), out), records=make_records(), eval_records=make_records(3), show=False)
    return out


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(keeping.folder_of(out, step) / "model" / "model.safetensors")


def test_a_run_that_is_evaluated_is_the_run_that_is_not(tiny_folder: Folder, whole: Path, tmp_path: Path) -> None:
    train(make_recipe(tiny_folder("qwen2_5"), tmp_path), records=make_records(), show=False)
    assert steady_rows(whole) == steady_rows(tmp_path)
    one, other = weights(whole, 4), weights(tmp_path, 4)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    for row in read_rows(whole / "metrics.jsonl"):  # evaluation time is counted separately
        parts = [value for key, value in row.items() if key.startswith("time/") and key != "time/step"]
        assert "time/eval" not in row
        assert row["time/step"] == pytest.approx(sum(parts))


def test_its_numbers_are_those_of_the_protocols(whole: Path) -> None:
    """Greedy metrics of the saved weights, and means over sampled answers beside them."""
    rows = read_rows(whole / "eval.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4]
    policy = open_policy(keeping.folder_of(whole, 4) / "model", device="cpu")
    records, found = make_records(3), []
    for temperature, n in ((0.0, 1), (1.0, 2)):
        answered = list(sample_records(policy, records, Sampling(n, 6, temperature), 0, portion=2))
        seen = [record for record, _ in answered]
        found.append([evaluate("ocr", seen, [c[i].text for _, c in answered]) for i in range(n)])
    expected = {f"eval/{name}": value for name, value in found[0][0].items()}
    means = {name: (found[1][0][name] + found[1][1][name]) / 2 for name in found[1][0]}
    expected |= {f"eval/sampled/{name}": value for name, value in means.items()}
    row = {key: value for key, value in rows[-1].items() if key.startswith("eval/")}
    assert row == pytest.approx(expected)
    assert rows[-1]["time/eval"] > 0
    assert row["eval/n"] == 3


def test_a_stop_between_a_step_and_its_evaluation_loses_nothing(
    tiny_folder: Folder, whole: Path, tmp_path: Path
) -> None:
    """A stopping run skips the evaluation, as it may have little time; it follows when the run is resumed."""

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 2:
            raise StopRun

    given = {"records": make_records(), "eval_records": make_records(3), "show": False}
    recipe = evaluated(tiny_folder("qwen2_5"), tmp_path)
    assert train(recipe, on_step=stop, **given).interrupted
    assert [row["step"] for row in steady_evaluations(tmp_path)] == [0]
    summary = train(recipe, resume=True, **given)
    assert steady_evaluations(tmp_path) == steady_evaluations(whole)
    assert steady_rows(tmp_path) == steady_rows(whole)
    assert summary.best is not None
    assert summary.best.samefile(whole / "checkpoints" / "best") is False
    assert summary.best.name == (whole / "checkpoints" / "best").resolve().name


@pytest.mark.parametrize("error", [OSError("it is gone"), torch.OutOfMemoryError("full")])
def test_an_evaluation_that_fails_loses_no_step(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    recipe = evaluated(
        tiny_folder("qwen2_5"), tmp_path, optim__steps=2, checkpoint__every=0, eval__at_start=False, **SMALL
    )
    given = {"records": make_records(), "eval_records": make_records(1), "show": False}

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(during, "sample_records", fail)
        with pytest.raises(TrainingError, match=f"evaluation after step 2: {error}. Step 2 was saved"):
            train(recipe, **given)
    assert train(recipe, resume=True, **given).steps == 2
    assert [row["step"] for row in steady_evaluations(tmp_path)] == [2]


@pytest.mark.parametrize("merge", ["on", "off"])
def test_adapters_are_merged_as_in_rollouts(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: str
) -> None:
    """The same tokens as with separate adapters in float32, and every weight to the bit what it was."""
    compared: list[bool] = []

    def both(policy: Any, *given: Any, generator: Any) -> Any:
        assert generator.merge is (merge == "on")
        modules = dict(policy.core.named_modules())
        before = {name: tensor.clone() for name, tensor in policy.core.state_dict().items()}
        answered = list(sample_records(policy, *given, generator=generator))
        assert dict(policy.core.named_modules()) == modules
        assert all(torch.equal(tensor, before[name]) for name, tensor in policy.core.state_dict().items())
        separate = sample_records(policy, *given, generator=Generator(policy))
        for (_, found), (_, expected) in zip(answered, separate, strict=True):
            assert [c.token_ids.tolist() for c in found] == [c.token_ids.tolist() for c in expected]
        compared.append(any(bool(t.any()) for name, t in before.items() if "lora_B" in name))
        return answered

    monkeypatch.setattr(during, "sample_records", both)
    recipe = evaluated(
        tiny_folder("qwen2_5"), tmp_path, model__lora={"rank": 4}, rollout__merge_lora=merge, optim__steps=2,
        optim__lr=0.05, **SMALL,
    )  # fmt: skip
    train(recipe, records=make_records(), eval_records=make_records(2), show=False)
    assert compared == [False, False, True, True]  # greedy and sampled, before the first and after the last step


def scripted(monkeypatch: pytest.MonkeyPatch, values: Mapping[int, float | None], name: str = "edit_distance") -> None:
    """Evaluations with these values, by step."""
    monkeypatch.setattr(Evaluation, "_metrics", lambda self, step, greedy: {name: values[step]})


def saved(out: Path) -> list[int]:
    return [keeping.step_of(path) for path in keeping.list_checkpoints(out)]


def test_the_best_is_kept_and_the_run_stops_when_nothing_gets_better(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, {0: 0.1, 1: 0.9, 2: 0.4, 3: 0.5, 4: None, 5: 0.39, 6: 0.3})
    changes = {**SMALL, "eval__every": 1, "checkpoint__every": 0, "checkpoint__keep": 1, "optim__steps": 6}
    given = {"records": make_records(), "eval_records": make_records(1)}
    heard: list[dict[str, Any]] = []
    listener = type("Listener", (), {"on_eval": lambda self, row: heard.append(row)})()
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, eval__patience=2, **changes)
    summary = train(recipe, callbacks=[listener], **given)
    assert (summary.steps, summary.stopped_early, summary.interrupted) == (4, True, False)
    assert summary.best == keeping.folder_of(tmp_path, 2)
    assert saved(tmp_path) == [2, 4]
    assert (tmp_path / "checkpoints" / "best").resolve() == summary.best.resolve()
    assert (tmp_path / "best").resolve() == (summary.best / "model").resolve()
    assert heard == read_rows(tmp_path / "eval.jsonl")
    assert [row["best"] for row in heard] == [False, True, True, False, False]
    verdict = (
        "stopped early after step 4: no better edit_distance in 2 evaluations (eval.patience); "
        "best: 0.4 after step 2 (before the first step: 0.1)"
    )
    shown = capsys.readouterr().err
    assert verdict in shown
    assert (
        "evaluation after step 3: edit_distance 0.5, sampled/edit_distance 0.5, best so far 0.4 after step 2" in shown
    )
    assert "eval edit_distance 0.4 (best 0.4 after step 2)" in next(s for s in shown.splitlines() if "step 3/6" in s)
    assert read_rows(tmp_path / "notes.jsonl")[-1] == {"step": 4, "note": verdict}

    again = train(recipe, resume=True, show=False, **given)  # patience is exhausted
    assert (again.steps, again.stopped_early) == (4, True)
    patient = make_recipe(tiny_folder("qwen2_5"), tmp_path, eval__patience=3, eval__min_delta=0.05, **changes)
    summary = train(patient, resume=True, show=False, **given)
    assert (summary.steps, summary.stopped_early, summary.best) == (5, True, keeping.folder_of(tmp_path, 2))
    more = make_recipe(tiny_folder("qwen2_5"), tmp_path, eval__min_delta=0.05, **changes)
    assert train(more, resume=True, show=False, **given).best == keeping.folder_of(tmp_path, 6)
    assert keeping.kept(tmp_path)["best"] == 6
    assert set(saved(tmp_path)) == {6, *keeping.kept(tmp_path).values()}  # that of step 2 is no longer the best


def test_going_back_goes_back_to_the_best_of_then(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {1: 0.5, 2: 0.3, 3: 0.4})
    changes = {**SMALL, "eval__every": 1, "eval__at_start": False, "checkpoint__every": 1, "checkpoint__keep": 9}
    given = {"records": make_records(), "eval_records": make_records(1), "show": False}
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, optim__steps=3, **changes)
    train(recipe, **given)
    assert keeping.kept(tmp_path)["best"] == 2
    scripted(monkeypatch, {2: 0.7, 3: 0.8})
    train(recipe, resume=True, from_step=1, **given)
    assert keeping.kept(tmp_path)["best"] == 1
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step-00000001"
    assert [row["eval/edit_distance"] for row in read_rows(tmp_path / "eval.jsonl")] == [0.5, 0.7, 0.8]
    scripted(monkeypatch, {3: 0.1, 4: 0.9}, name="f1")
    other = make_recipe(tiny_folder("qwen2_5"), tmp_path, optim__steps=4, eval__metric="f1", **changes)
    train(other, resume=True, **given)  # with another metric, the previous best is meaningless
    assert "the best so far is discarded" in (tmp_path / "notes.jsonl").read_text()
    assert keeping.kept(tmp_path)["best"] == 4


def test_a_run_that_a_callback_ends_is_saved_with_what_was_measured(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {0: 0.5, 1: 0.3})

    class Enough:
        def on_eval(self, row: dict[str, Any]) -> None:
            if row["eval/edit_distance"] < 0.4:
                raise StopRun("good enough")

    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, eval__every=1, checkpoint__every=0, **SMALL)
    given = {"records": make_records(), "eval_records": make_records(1), "show": False}
    summary = train(recipe, callbacks=[Enough()], **given)
    assert (summary.steps, summary.interrupted) == (1, True)
    assert summary.best == summary.checkpoint == keeping.folder_of(tmp_path, 1)


def rows_of(*tasks: str) -> list[Record]:
    targets: dict[str, Any] = {
        "ocr": {"text": "abc"},
        "counting": {"label": "cat", "count": 1, "points": None, "boxes": None},
        "qa": {"answer": "yes"},
        "mine": {},
    }
    image = make_records(1)[0].images
    messages = ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},)
    return [
        Record(f"{task}{i}", task, () if task == "qa" else image, messages, targets[task])
        for i, task in enumerate(tasks)
    ]


@pytest.mark.parametrize(
    ("changes", "tasks", "message"),
    [
        ({"eval__spec": "ocr:/nowhere.jsonl"}, None, "eval.spec: /nowhere.jsonl: no such file"),
        ({"eval__spec": "ocrr:x"}, None, "eval.spec: .*unknown data adapter 'ocrr'"),
        ({"eval__every": 3}, None, "eval.spec: missing, although other keys of eval are set"),
        ({"eval__metric": "f11"}, ["ocr"], "no metric 'f11' here; did you mean f1"),
        ({"eval__metric": "sampled/f1", "eval__samples": 0}, ["ocr"], "no metric 'sampled/f1' here"),
        ({"eval__metric": "n"}, ["ocr"], "no metric 'n' here"),
        ({}, ["ocr", "counting"], "eval.metric: required, as the set has several tasks.*ocr/f1.*counting/accuracy"),
        ({}, ["qa"], "eval.spec: these questions come without pictures"),
        ({}, ["ocr", "mine"], "eval.spec: unknown task to evaluate 'mine'.*and no reward: .*unknown task for a reward"),
        (
            {"eval__metric": "reward", "reward__options": {"metric": "x"}},
            ["ocr"],
            "eval.spec: the data is ocr, which the recipe.s reward does not fit",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_any_work(
    tmp_path: Path, changes: dict[str, Any], tasks: list[str] | None, message: str
) -> None:
    recipe = make_recipe(tmp_path / "no model", tmp_path / "out", **changes)
    with pytest.raises(ValueError, match=message):
        train(recipe, records=make_records(), eval_records=Dataset(rows_of(*tasks)) if tasks else None, show=False)


def test_a_broken_picture_of_the_set_is_found_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    whole = tmp_path / "b.png"
    make_records(1)[0].images[0].save(whole)  # type: ignore[union-attr]
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:-40])
    rows = [{"image": name, "text": "abc"} for name in ("b.png", "cut.png")]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(tmp_path, tmp_path / "out", eval__spec=f"ocr:{tmp_path / 'set.jsonl'}", eval__at_start=False)
    with pytest.raises(ValueError, match=r"eval\.spec: .*cut\.png"):
        held_out(recipe)
    first = held_out(make_recipe(tmp_path, tmp_path / "out", eval__spec=f"ocr:{tmp_path / 'set.jsonl'}", eval__n=1))
    assert first is not None
    assert len(first) == 1
    assert held_out(make_recipe(tmp_path, tmp_path / "out")) is None


def test_a_set_in_a_format_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from fastrl import Record\n"
        "def rows(path, n):\n"
        "    for i in range(int(n)):\n"
        "        message = {'role': 'user', 'content': open(path).read()}\n"
        "        yield Record(f'r{i}', 'ocr', (), (message,), {'text': 'abc'})\n"
    )
    (tmp_path / "question.txt").write_text("Which letters?")
    section = {"spec": "question.txt?n=3", "adapter": "mine.py:rows", "metric": "sampled/f1", "n": 2}
    found = held_out(make_recipe(tmp_path, tmp_path / "out", eval=section))
    assert found is not None
    assert [record.messages[0]["content"] for record in found.tasks["ocr"]] == ["Which letters?"] * 2
    assert (found.metric, found.mode) == ("sampled/f1", "max")


def test_several_tasks_have_their_names_and_a_reward_measures_what_no_protocol_does(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def long(completions, **_):\n    return [float(len(c)) for c in completions]\n")
    reward = {"function": "mine.py:long", "builtin": False, "completions": "text"}
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path / "out", eval__max_new_tokens=4, reward=reward)
    run = Run(recipe, records=make_records(), eval_records=rows_of("ocr", "counting", "mine"))
    row = run.evaluation.measure(0).row
    assert {"eval/ocr/f1", "eval/counting/accuracy", "eval/reward", "eval/sampled/reward"} <= set(row)
    assert not any("mine" in key for key in row)
    assert row["eval/reward"] > 0
    assert run.evaluation.held_out is not None
    assert (run.evaluation.held_out.metric, run.evaluation.held_out.mode) == ("reward", "max")


@pytest.mark.parametrize("metric", ["edit_distance", "reward"])
def test_ranks_answer_a_part_each_and_all_find_the_same(tiny_folder: Folder, tmp_path: Path, metric: str) -> None:
    changes = {"eval__samples": 0, "eval__max_new_tokens": 6, "eval__metric": metric}
    run = Run(
        make_recipe(tiny_folder("qwen2_5"), tmp_path, **changes), records=make_records(), eval_records=make_records(5)
    )
    alone = {key: value for key, value in run.evaluation.measure(0).row.items() if key != "time/eval"}
    heard: dict[int, list[Any]] = {0: [], 1: []}
    for rank in (0, 1, 0, 1):  # the other rank's results are known from the second time on
        other = heard[1 - rank]
        engine = Scripted(rank, other)
        with contextlib.suppress(IndexError):  # the other rank has not arrived yet
            found = Evaluation(run.recipe, run.evaluation.held_out, run.context, engine).measure(0)  # type: ignore[arg-type]
            assert {key: value for key, value in found.row.items() if key != "time/eval"} == alone
        heard[rank] = engine.given
    assert [len(given) for given in heard.values()] == [2, 2]
    assert [len(answers) for answers, _ in (heard[0][0], heard[1][0])] == [3, 2]
    assert heard[1][1] == ({}, None)  # the first rank computes the scores


class Scripted:
    """One of two ranks; the other's results are given in advance."""

    world_size = 2

    def __init__(self, rank: int, other: Sequence[Any]) -> None:
        self.rank, self.other, self.given = rank, list(other), list[Any]()

    def gather(self, value: Any) -> list[Any]:
        self.given.append(value)
        theirs = self.other[len(self.given) - 1]
        return [value, theirs] if self.rank == 0 else [theirs, value]


def test_what_fails_on_one_rank_fails_on_all(tiny_folder: Folder, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, eval__max_new_tokens=2)
    run = Run(recipe, records=make_records(), eval_records=make_records(2))
    engine = Scripted(1, [(None, "evaluation after step 3: a.png: gone")])
    with pytest.raises(EvaluationError, match=r"^evaluation after step 3: a\.png: gone$"):
        Evaluation(recipe, run.evaluation.held_out, run.context, engine).measure(3)  # type: ignore[arg-type]


RANKS = """
import sys
from pathlib import Path
import fastrl.trainer
from fastrl.trainer import train
from tests.helpers.gloo import GlooEngine
from tests.helpers.gloo import start
from tests.helpers.training import make_records, make_recipe

fastrl.trainer.make_engine = GlooEngine
section = {"every": 1, "samples": 1, "max_new_tokens": 6, "patience": 1, "min_delta": 9}
engine = {"kind": "deepspeed", "timeout": 300.0}  # as every engine of several processes
changes = {"data__prompts_per_step": 1, "checkpoint__every": 0, "optim__steps": 5}
recipe = make_recipe(Path(sys.argv[1]), Path(sys.argv[2]), engine=engine, eval=section, **changes)
summary = train(recipe, records=make_records(), eval_records=make_records(5), show=False)
assert (summary.steps, summary.stopped_early) == (2, True), summary
assert summary.best is not None and summary.best.name == "step-00000001", summary
"""


@pytest.mark.gate
def test_two_processes_evaluate_together_and_stop_together(tiny_folder: Folder, tmp_path: Path) -> None:
    for process in start(RANKS, tmp_path, tiny_folder("qwen2_5"), tmp_path / "run"):
        _, message = process.communicate(timeout=600)
        assert process.returncode == 0, message
    rows = read_rows(tmp_path / "run" / "eval.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path / "alone", eval__samples=0, eval__max_new_tokens=6)
    alone = Run(recipe, records=make_records(), eval_records=make_records(5)).evaluation.measure(0).row
    greedy = {key: value for key, value in alone.items() if key.startswith("eval/")}
    assert {key: rows[0][key] for key in greedy} == pytest.approx(greedy)
