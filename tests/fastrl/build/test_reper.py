"""Building RePer dialogues: filters, order and wording; interrupted builds give the same bytes; the result loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastrl.batch import Completion
from fastrl.build.reper import BuildOptions, build_dialogues, make_turns, parse_temperatures
from fastrl.critics import Case, CriticError, Critique, RuleCritic
from fastrl.critics.feedback import REQUESTS, rng_for
from fastrl.data import load_data
from fastrl.data.records import Record
from fastrl.data.reflection import dialogue_of

SPEC = "scenes:caption?n=80&seed=3&difficulty=1"


def options(**changes: Any) -> BuildOptions:
    return BuildOptions(**{"model": "scripted", "data": SPEC, "critic": "rule", **changes})


def scripted(monkeypatch: pytest.MonkeyPatch, captions: Callable[[Record], Sequence[str]]) -> Any:
    """A policy whose session answers the n-th temperature with the n-th caption (ending in "…": truncated)."""
    prefills: list[int] = []

    class Session:
        def __init__(self, prompts: Sequence[Record]) -> None:
            self.prompts, self.turn = prompts, 0
            prefills.append(len(prompts))

        def generate(self, sampling: Any, rng: Any) -> list[list[Any]]:
            texts = [captions(record)[self.turn % len(captions(record))] for record in self.prompts]
            self.turn += 1
            return [
                [Completion(None, text=t.removesuffix("…"), finished=not t.endswith("…"))]  # type: ignore[arg-type]
                for t in texts
            ]

    monkeypatch.setattr("fastrl.rollout.Generator", lambda policy: SimpleNamespace(session=Session))
    return SimpleNamespace(encode=lambda record: (record, record), prefills=prefills)


def ranked_captions(record: Record) -> list[str]:
    """A true caption, one with wrong sizes, an invented one, a truncated one, and the true one again."""
    true = record.target["references"][0]
    return [true, true.replace("large", "small"), "A star. A star. A star.", "A large…", true]


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_dialogues_go_from_bad_to_good_and_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    policy = scripted(monkeypatch, ranked_captions)
    out = tmp_path / "d.jsonl"
    summary = build_dialogues(options(), out, policy=policy, critic=RuleCritic())
    assert policy.prefills == [32, 32, 16]  # one prefill for all temperatures
    assert summary["kept"] == len(rows_of(out)) > 60
    assert sum(summary["turns"].values()) == summary["kept"]
    assert set(summary["turns"]) == {"1", "2", "3"}
    for record in load_data(f"reflection:{out}"):
        turns = dialogue_of(record)
        scores = [turn.score for turn in turns]
        ranking = record.target["list"]
        assert scores == sorted(scores)
        assert turns[-1].answer == ranking.answers[0]
        assert turns[-1].score == max(ranking.rewards) > 0.55
        assert len(set(ranking.answers)) == len(ranking.answers)
        assert "A large" not in ranking.answers  # it was truncated
        if len(turns) > 1:
            assert turns[0].score == min(ranking.rewards)
        assert all(turn.feedback in REQUESTS for turn in turns[:-1])


def test_filters_are_exclusive_and_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = {"good": 0.95, "bad": 0.5, "fair": 0.9}

    class Judge:
        rules = False

        def score(self, cases: Sequence[Case]) -> list[Critique]:
            return [Critique(table.get(c.answer), "This caption can only get the score 5.") for c in cases]

    for texts, reason in (
        (["good", "bad"], None),
        (["fair", "bad"], "best score at most 0.9"),
        (["good", "fair"], "gap at most 0.4"),
        (["good", "good"], "fewer than two captions"),
        (["good", "unscored"], "fewer than two captions"),
    ):
        out = tmp_path / f"{'-'.join(texts)}.jsonl"
        policy = scripted(monkeypatch, lambda record, texts=texts: texts)
        summary = build_dialogues(options(limit=4), out, policy=policy, critic=Judge())
        assert summary["kept"] == (4 if reason is None else 0)
        assert summary["dropped"] == ({} if reason is None else {reason: 4})
        if "unscored" in texts:
            assert summary["captions"] == {"scored": 4, "unscored": 4}


def test_a_stopped_build_goes_on_to_the_same_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole" / "d.jsonl", tmp_path / "parts" / "d.jsonl"
    build_dialogues(options(), whole, policy=scripted(monkeypatch, ranked_captions), critic=RuleCritic())

    class Failing(RuleCritic):
        calls = 0

        def score(self, cases: Sequence[Case]) -> list[Critique]:
            self.calls += 1
            if self.calls == 2:
                raise CriticError("out of reach")
            return super().score(cases)

    with pytest.raises(CriticError):
        build_dialogues(options(), parts, policy=scripted(monkeypatch, ranked_captions), critic=Failing())
    done = parts.read_bytes()
    assert whole.read_bytes().startswith(done)
    assert done
    parts.write_bytes(done + b'{"half')  # as if the machine had stopped while writing
    build_dialogues(options(), parts, policy=scripted(monkeypatch, ranked_captions), critic=RuleCritic())
    assert parts.read_bytes() == whole.read_bytes()
    with pytest.raises(ValueError, match="seed: was 0, is 1"):
        build_dialogues(options(seed=1), parts, policy=scripted(monkeypatch, ranked_captions), critic=RuleCritic())


def test_a_middle_turn_lies_strictly_between() -> None:
    ranked = [(name, Critique(score, f"{name}?")) for name, score in (("a", 0.1), ("b", 0.1), ("c", 0.9), ("d", 0.9))]
    lengths = {len(make_turns(ranked, rng_for(i))) for i in range(60)}
    assert lengths == {1, 2}  # no score is between 0.1 and 0.9
    ranked.insert(2, ("m", Critique(0.5, "m?")))
    triples = [turns for i in range(60) if len(turns := make_turns(ranked, rng_for(i))) == 3]
    assert triples
    assert all([t.answer for t in turns] == ["a", "m", "d"] for turns in triples)
    assert [t.feedback for t in triples[0]] == ["a?", "m?", ""]


def test_bad_options(tmp_path: Path) -> None:
    assert parse_temperatures("0,0.5,1") == (0.0, 0.5, 1.0)
    with pytest.raises(ValueError, match=r"numbers such as 0,0\.5,1"):
        parse_temperatures("0;1")
    with pytest.raises(ValueError, match="two or more"):
        options(temperatures=(1.0,))
    for name in ("min_best", "min_gap"):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}: expected a number, got nan"):
            options(**{name: float("nan")})
    with pytest.raises(ValueError, match="dialogues need"):
        build_dialogues(options(data="scenes:counting?n=2"), tmp_path / "x.jsonl")
