"""The temporal study's data: clips that move, halves by TPL of the same lengths."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastrl.data import load_data
from fastrl.data.records import Record
from fastrl.studies import temporal
from fastrl.studies.base import Job
from fastrl.studies.runner import run_study
from fastrl.studies.temporal import HALVES, Experiment, half_of, moves, tpl_file, with_wrong


def record(name: str, actions: int, places: int) -> Record:
    boxes = {t: [min(t, places), 0, min(t, places) + 9, 9] for t in range(1, 9)}
    track = {"id": 1, "name": "red circle", "boxes": boxes, "spans": [{"action": "moves left"}] * actions}
    return Record(name, "trajectory", (), (), {"tracks": [track]})


def test_clips_without_three_places_do_not_move() -> None:
    assert [moves(record("a", 1, places)) for places in (1, 2, 3, 8)] == [False, False, True, True]
    found = [moves(each) for each in load_data("scenes:utr?n=40&seed=5&size=84&difficulty=1&frames=8")]
    assert 0 < sum(found) < 40


def test_halves_have_the_highest_and_lowest_tpl_among_answers_of_the_same_length() -> None:
    records = [record(f"r{i}", 1 + i % 2, 8) for i in range(12)]
    tpl = [float((7 * i) % 12) for i in range(12)]
    found = {name: half_of(records, tpl, name) for name in HALVES}
    score = {each.id: value for each, value in zip(records, tpl, strict=True)}
    for actions in (1, 2):
        group = [r for r in records if len(r.target["tracks"][0]["spans"]) == actions]
        ranked = sorted(group, key=lambda r: -score[r.id])
        assert {r.id for r in found["top"] if r in group} == {r.id for r in ranked[:3]}
        assert {r.id for r in found["bottom"] if r in group} == {r.id for r in ranked[3:]}
        assert len([r for r in found["random"] if r in group]) == 3
    assert [r.id for r in found["top"]] == [r.id for r in records if r in found["top"]]
    odd = half_of(records[:5], tpl, "top")
    assert len(odd) == 2 + 1


def test_a_third_of_a_pool_tells_how_other_subjects_move() -> None:
    clips = load_data("scenes:utr?n=40&seed=5&size=84&difficulty=1&frames=8")
    right = [replace(r, target={**r.target, "answer": text_of(r)}) for r in clips if len(r.target["tracks"]) == 1]
    found = with_wrong(right)
    wrong = [(old, new) for old, new in zip(right, found, strict=True) if "wrong" in new.target]
    assert len(right) // 3 - 4 <= len(wrong) <= len(right) // 3 + 4
    assert len(wrong) >= 4
    moved = {json.dumps(track_of(old)["boxes"]): track_of(old) for old, _ in wrong}
    for old, new in wrong:
        assert (new.images, new.messages, track_of(new)["name"]) == (old.images, old.messages, track_of(old)["name"])
        source = moved.pop(json.dumps(track_of(new)["boxes"]))  # each movement is told once
        assert source["boxes"] != track_of(old)["boxes"]
        assert len(source["spans"]) == len(track_of(old)["spans"])
        assert new.target["answer"] == text_of(new)
    assert [new for old, new in zip(right, found, strict=True) if new is not old] == [new for _, new in wrong]


def track_of(record: Record) -> dict[str, Any]:
    (track,) = record.target["tracks"]
    return track


def text_of(record: Record) -> str:
    track = track_of(record)
    return f"Track1: {track['name']}, {json.dumps([track['boxes'], track['spans']])}"


@pytest.mark.gate
def test_a_very_small_study_finds_halves_and_correlations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("QUICK_POOL", 12), ("HELD_OUT", 4)):
        monkeypatch.setattr(temporal, name, value)
    study = Experiment(quick=True)
    study.recipe = study.recipe.model_copy(update={"optim": study.recipe.optim.model_copy(update={"steps": 2})})
    result = run_study(study, tmp_path)
    assert list(result["arms"]) == ["start", *HALVES]
    assert set(result["arms"]["start"]) == {"sampled", "greedy", "tpl", "explaining"}
    assert len(result["findings"]) == 2
    assert all(-1 <= found["low"] <= found["high"] <= 1 for found in result["findings"].values())
    rows = read(tmp_path / "seed-0" / "tpl.jsonl")
    assert len(rows) == 12
    assert len({row["tpl"] for row in rows}) == 12
    full = Experiment()
    full.pool, full.start = 12, study.start
    full.prepare(0, tmp_path / "seed-0")
    assert read(tmp_path / "seed-0" / tpl_file("right")) == rows
    mixed = read(tmp_path / "seed-0" / tpl_file("wrong"))
    wrong = ["wrong" in record.target for record in full._pool(tmp_path / "seed-0", "wrong")]
    assert [new["tpl"] != pytest.approx(old["tpl"]) for old, new in zip(rows, mixed, strict=True)] == wrong
    assert 1 < sum(wrong) <= 6
    # Each arm is trained on the half of the pool that it is named after
    given: dict[str, list[Record]] = {}
    monkeypatch.setattr(temporal, "train_job", lambda recipe, job, records: given.update({job.arm.name: records}))
    for arm in full.arms():
        if arm.group:
            full.run(Job(arm, 0, None, tmp_path, tmp_path / "seed-0", ()))
    assert list(given) == [*HALVES, *(f"{half}, a third wrong" for half in HALVES)]
    parts = {name: sum("wrong" in record.target for record in records) for name, records in given.items()}
    assert [parts[half] for half in HALVES] == [0, 0, 0]
    ends = given["top, a third wrong"], given["bottom, a third wrong"]
    assert {record.id for half in ends for record in half} == {row["id"] for row in rows}
    assert sum("wrong" in record.target for record in {r.id: r for half in ends for r in half}.values()) == sum(wrong)
    found = full.findings(tmp_path)["part of the half of highest TPL that is wrong, of a third"]
    assert found["value"] == pytest.approx(parts["top, a third wrong"] / len(ends[0]))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_moving_records_are_what_is_measured() -> None:
    base = record("a", 1, 8)
    track = base.target["tracks"][0]
    still = replace(base, target={"tracks": [track, {**track, "boxes": {1: [0, 0, 9, 9]}}]})
    assert not moves(still)
