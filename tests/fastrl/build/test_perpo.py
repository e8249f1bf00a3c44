"""Building ranked lists: what is kept, dropped and counted; interrupted builds continue; the lists train."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastrl.batch import Completion, PromptGroup
from fastrl.build import perpo
from fastrl.build.perpo import BuildOptions, build_lists, list_reward, make_options
from fastrl.data import DataError, load_data
from fastrl.data.records import Record
from fastrl.methods.ranking import rank_answers, worst_reward
from fastrl.recipe import load_recipe
from fastrl.trainer import train

SPEC = "scenes:grounding?n=10&seed=3&difficulty=1"


def box(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'[{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}]}}]'


def scripted(answers: Callable[[Record], Sequence[str]], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A policy and a sampler in one, with fixed answers for each record."""
    asked: list[Record] = []

    class Generator:
        def __init__(self, policy: Any) -> None: ...

        def generate(self, prompts: Sequence[Record], sampling: Any, rng: Any) -> list[list[Completion]]:
            asked.extend(prompts)
            return [
                [Completion(None, text=t.removesuffix("…"), finished=not t.endswith("…")) for t in answers(record)]  # type: ignore[arg-type]
                for record in prompts
            ]

    monkeypatch.setattr("fastrl.rollout.Generator", Generator)
    return SimpleNamespace(encode=lambda record: (record, record), asked=asked)


def around(record: Record) -> list[str]:
    """Worst first: empty, half right, the same twice, right, unparsable, truncated."""
    x1, y1, x2, y2 = record.target["box"]
    half = box(x1, y1, x2, (y1 + y2) / 2)
    return [box(0, 0, 1, 1), half, half, box(x1, y1, x2, y2), "no idea", box(x1, y1, x2, y2) + "…"]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_lists_are_distinct_readable_whole_and_best_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    policy = scripted(around, monkeypatch)
    out = tmp_path / "lists.jsonl"
    summary = build_lists(make_options("grounding", "m", SPEC, n=6), out, policy=policy)
    rows = lines(out)
    assert [row["id"] for row in rows] == [record.id for record in load_data(SPEC)]
    for row, record in zip(rows, load_data(SPEC), strict=True):
        assert row["rewards"] == pytest.approx([1.0, 0.5, 0.0], abs=0.02)
        assert row["answers"][0] == around(record)[3]
        assert row["prompt"] == record.messages[0]["content"][1]["text"]
        assert (tmp_path / row["images"][0]).is_file()
    assert summary["kept"] == summary["prompts"] == 10
    assert summary["answers"] == {"sampled": 60, "kept": 30, "duplicate": 10, "unreadable": 10, "truncated": 10}
    assert summary["mean_best"] == 1.0
    assert (tmp_path / "lists.rewards.png").stat().st_size > 1000
    read = load_data(f"lists:{out}")
    assert [list(r.target["box"]) for r in read] == [[float(v) for v in r.target["box"]] for r in load_data(SPEC)]
    assert read[0].target["list"].rewards == tuple(rows[0]["rewards"])


def test_unreadable_answers_may_stay_as_the_worst(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    policy = scripted(lambda record: [*around(record), "no idea", "none"], monkeypatch)
    out = tmp_path / "lists.jsonl"
    options = make_options("grounding", "m", SPEC, n=8, limit=2, unreadable="worst")
    summary = build_lists(options, out, policy=policy)
    for row in lines(out):
        assert row["answers"][-2:] == ["no idea", "none"]
        assert row["rewards"] == pytest.approx([1.0, 0.5, 0.0, -1.0, -1.0], abs=0.02)
    assert summary["answers"] == {"sampled": 16, "kept": 10, "duplicate": 4, "truncated": 2}
    assert (summary["mean_best"], summary["mean_worst"]) == (1.0, -1.0)
    read = load_data(f"lists:{out}")
    assert read[0].target["list"].rewards == tuple(lines(out)[0]["rewards"])
    with pytest.raises(ValueError, match="unknown value of --unreadable 'last'"):
        make_options("grounding", "m", SPEC, unreadable="last")


@pytest.mark.parametrize(("rewards", "below"), [([], -1.0), ([0.9, 0.2], -1.0), ([0.0], -1.0), ([1.0, -3.0], -4.0)])
def test_the_worst_is_below_every_other(rewards: list[float], below: float) -> None:
    assert worst_reward(rewards) == below


def test_prompts_are_dropped_for_a_counted_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def answers(record: Record) -> list[str]:
        number = int(record.id.rpartition("-")[2])
        good, half = around(record)[3], around(record)[1]
        return [[good, good], [half, good], [box(0, 0, 1, 1), box(0, 0, 1, 2)], [good, box(0, 0, 1, 1)]][number % 4]

    policy = scripted(answers, monkeypatch)
    summary = build_lists(make_options("grounding", "m", SPEC, n=2), tmp_path / "l.jsonl", policy=policy)
    assert summary["kept"] == 2
    assert summary["dropped"] == {"fewer than two answers": 3, "gap below 0.8": 3, "equal rewards": 2}


def test_a_stopped_build_goes_on_to_the_same_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(perpo, "PORTION", 3)
    policy = scripted(around, monkeypatch)
    options = make_options("grounding", "m", SPEC)
    whole = build_lists(options, tmp_path / "whole.jsonl", policy=policy)
    policy.asked.clear()

    def stop(line: str) -> None:
        if line.startswith("6/"):
            raise KeyboardInterrupt

    parts = tmp_path / "parts.jsonl"
    with pytest.raises(KeyboardInterrupt):
        build_lists(options, parts, policy=policy, say=stop)
    with parts.open("a") as file:
        file.write('{"half a li')  # killed while writing the next portion
    seen = len(policy.asked)
    again = build_lists(options, parts, policy=policy)
    assert (seen, len(policy.asked)) == (6, 10)
    fixed = parts.read_text().replace("parts.images", "whole.images")
    assert fixed == (tmp_path / "whole.jsonl").read_text()
    assert again | {"seconds": 0} == whole | {"seconds": 0}
    build_lists(options, parts, policy=policy)  # complete: no prompt is sampled again
    assert len(policy.asked) == 10


def test_a_build_does_not_go_on_with_other_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    policy = scripted(around, monkeypatch)
    out = tmp_path / "l.jsonl"
    build_lists(make_options("grounding", "m", SPEC, min_gap=0.5), out, policy=policy)
    with pytest.raises(ValueError, match=r"min_gap: was 0\.5, is 0\.8"):
        build_lists(make_options("grounding", "m", SPEC), out, policy=policy)
    foreign = tmp_path / "other.jsonl"
    foreign.write_text("{}\n")
    with pytest.raises(ValueError, match="cannot be continued"):
        build_lists(make_options("grounding", "m", SPEC), foreign, policy=policy)
    assert foreign.read_text() == "{}\n"
    sound = json.loads(out.with_suffix(".summary.json").read_text())
    for tally in ({}, {**sound["tally"], "unknown": 1}):
        out.with_suffix(".summary.json").write_text(json.dumps({**sound, "tally": tally}))
        with pytest.raises(ValueError, match=r"l\.jsonl: its summary has no tally"):
            build_lists(make_options("grounding", "m", SPEC, min_gap=0.5), out, policy=policy)
    for damaged in ("{", "{}", "[]", '{"options": 3}'):
        out.with_suffix(".summary.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"l\.summary\.json: not a build's summary .*remove it and l\.jsonl"):
            build_lists(make_options("grounding", "m", SPEC, min_gap=0.5), out, policy=policy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "groundin"}, "did you mean 'grounding'"),
        ({"n": 1}, "at least 2 answers"),
        ({"temperature": 0.0}, "greedy"),
        ({"min_gap": -1.0}, "0 or more"),
        ({"min_gap": float("nan")}, "0 or more"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_options(**{"task": "grounding", "model": "m", "data": SPEC, **options})


def test_the_papers_constants_are_the_defaults() -> None:
    assert make_options("grounding", "m", "d").n == 20
    assert make_options("grounding", "m", "d").min_gap == 0.8
    assert (make_options("ocr", "m", "d").n, make_options("ocr", "m", "d").min_gap) == (5, 0.04)
    assert make_options("ocr", "m", "d").temperature == 1.0


def test_records_of_another_task_and_bad_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a grounding record, but lists are built for ocr"):
        build_lists(make_options("ocr", "m", SPEC), tmp_path / "l.jsonl")
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        build_lists(make_options("ocr", "m", "ocr:missing.jsonl"), tmp_path / "l.jsonl")


def test_equal_rewards_keep_the_order_they_were_sampled_in() -> None:
    record = load_data(SPEC)[0]
    texts = [box(0, 0, 1, 1), box(*record.target["box"]), box(0, 0, 1, 2)]
    group = PromptGroup(None, [Completion(None, text=t) for t in texts], record)  # type: ignore[arg-type]
    (ranking,) = rank_answers([group], list_reward("grounding"))
    assert ranking.order == [1, 0, 2]
    assert ranking.gap == 1.0
    assert ranking.dropped == Counter()
    assert rank_answers([], list_reward("ocr")) == []


def test_lists_from_real_expressions_train(data_dir: Path, tmp_path: Path) -> None:
    """The shipped small model on COCO photographs: poor answers and real files, from sampling to training."""
    spec = f"refexp:{data_dir / 'refexp' / 'refcocos' / 'refcocos.jsonl'}?images={data_dir}"
    limit = 112 * 112  # the small model was trained on small pictures
    options = BuildOptions("grounding", "tiny:perception", spec, 24, 1.0, 0.0, 48, skip_bad=True, max_pixels=limit)
    out = tmp_path / "lists.jsonl"
    summary = build_lists(options, out)
    assert summary["kept"] >= 2
    assert all(Path(row["images"][0]).is_absolute() for row in lines(out))  # the photographs are referenced, not copied
    changes = {"data.spec": f"lists:{out}", "data.prompts_per_step": 2, "optim.steps": 20, "method.min_gap": 0.0}
    changes["model.max_pixels"] = limit
    recipe = load_recipe("perpo-grounding-tiny", {**changes, "out": str(tmp_path / "run"), "log.tensorboard": False})
    done = train(recipe, show=False)
    assert done.steps == 20
    assert done.last["list/margin"] > 0
    assert done.last["lists/used"] == 2.0
