"""Difficulty from a file of scores."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrl.data.difficulty import Curriculum, difficulty, read_scores
from fastrl.data.mixture import MixturePlan, parts_of
from fastrl.data.records import Record
from fastrl.data.validate import DataError


def records(count: int) -> list[Record]:
    return [Record(f"r{i}", "ocr", (), (), {"text": "x"}) for i in range(count)]


def test_a_file_of_scores_orders_records_by_their_own_ids(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(f'{{"id": "r{i}", "difficulty": {(7 * i) % 10}, "reward": {i}}}\n' for i in range(10)))
    found = Curriculum("difficulty", 10, 0.1, read_scores(path, "difficulty"))
    assert [difficulty(record, found) for record in records(10)] == [(7 * i) % 10 for i in range(10)]
    plan = MixturePlan(parts_of(records(10)), seed=0, step=1, curriculum=found)
    assert plan.epoch(0)[0] == 0  # only the easiest at first
    hardest = [(7 * index) % 10 for index in plan.epoch(0)]
    assert all(value < round((0.1 + 0.9 * step / 10) * 10) + 1 for step, value in enumerate(hardest))
    other = read_scores(path, "reward")
    assert other["r9"] == 9.0


def test_a_record_without_a_score_is_named() -> None:
    with pytest.raises(DataError, match="no line for record 'r1'"):
        difficulty(records(2)[1], Curriculum("difficulty", 1, 1.0, {"r0": 0.5}))


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"id": 3, "difficulty": 1}', '{"id": "a"}', '{"id": "a", "difficulty": "x"}']
)
def test_lines_that_are_no_scores_are_bad_rows(line: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(f'{{"id": "r0", "difficulty": 0}}\n{line}\n')
    with pytest.raises(DataError, match=r"scores\.jsonl:2.*'difficulty'"):
        read_scores(path, "difficulty")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.curriculum\.scores"):
        read_scores(tmp_path / "none.jsonl", "difficulty")
