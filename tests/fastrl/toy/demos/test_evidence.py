"""The reported set's scores and intervals, as demos write and return them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from fastrl.toy.demos.evidence import Compared, change, known_per_record, per_record, print_evidence, report


class Row(NamedTuple):
    id: str


def test_every_record_has_a_line_and_every_comparison_an_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {
        "start": {"a": [0.0, 0.5, 1.0], "b": [1.0, 1.0, 1.0]},
        "perpo": {"a": [0.5, 1.0, 0.9], "b": [0.0, 1.0, 1.0]},
    }
    wanted = [change("gain", "a", "start", "perpo"), Compared("b less a", ("perpo", "a"), ("perpo", "b"))]
    found = report(tmp_path / "scores.jsonl", [Row(name) for name in "xyz"], scores, wanted)
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert lines[2] == {"id": "z", "start": {"a": 1.0, "b": 1.0}, "perpo": {"a": 0.9, "b": 1.0}}
    assert (found["n"], list(found["changes"])) == (3, ["gain", "b less a"])
    gain = found["changes"]["gain"]
    assert (gain["before"], gain["after"], gain["change"]) == pytest.approx((0.5, 0.8, 0.3))
    assert (gain["low"], gain["high"]) == pytest.approx((-0.1, 0.5))
    assert found["changes"]["b less a"]["change"] == pytest.approx(2 / 3 - 0.8)
    json.dumps(found)
    print_evidence(found, "scenes")
    shown = capsys.readouterr().out
    assert "+0.300 [-0.100, +0.500]" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_records_without_a_score_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {
        "before": {"distance": [0.4, None, 0.2, 0.3], "other": [None, None, None, 0.1]},
        "after": {"distance": [0.1, 0.0, 0.3, None], "other": [0.5, 0.5, 0.5, None]},
    }
    found = report(
        tmp_path / "scores.jsonl", [Row(c) for c in "wxyz"], scores, [change("d", "distance"), change("o", "other")]
    )
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "id": "x",
        "before": {"distance": None, "other": None},
        "after": {"distance": 0.0, "other": 0.5},
    }
    assert list(found["changes"]) == ["d"]  # no record has the other before and after
    both = found["changes"]["d"]
    assert (both["before"], both["after"], both["change"]) == pytest.approx((0.3, 0.2, -0.1))
    assert both["left_out"] == 2
    print_evidence(found, "scenes")
    assert "d: without 2 scenes that have no score before or after" in capsys.readouterr().out


def test_samples_of_a_record_are_one_score() -> None:
    assert known_per_record([0.0, None, None, None, 0.5, 1.0], 2) == [0.0, None, 0.75]
    assert per_record([0.0, 1.0, 0.5, 0.5], 2) == [0.5, 0.5]
    assert per_record([0.25, 1.0], 1) == [0.25, 1.0]
