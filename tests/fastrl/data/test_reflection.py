"""Dialogue files: valid rows, and every kind of error in a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastrl.data import DataError, load_data
from fastrl.data.reflection import SpokenTurn, dialogue_messages, dialogue_of, dialogue_row

GOOD: dict[str, Any] = {
    "images": ["a.png"],
    "question": "Describe.",
    "turns": [{"answer": "A dog.", "score": 0.4, "feedback": "Better?"}, {"answer": "A cat.", "score": 0.9}],
}


def write(folder: Path, *rows: Any) -> str:
    Image.new("RGB", (30, 30)).save(folder / "a.png")
    file = folder / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"reflection:{file}"


def test_a_row_round_trips(tmp_path: Path) -> None:
    candidates = [
        {"answer": "A cat.", "score": 0.9},
        {"answer": "A dog.", "score": 0.4},
        {"answer": "Fog.", "score": 0},
    ]
    row = GOOD | {"id": "x", "candidates": candidates, "target": {"references": ["A cat."]}}
    (record,) = load_data(write(tmp_path, row))
    turns = dialogue_of(record)
    assert turns == (SpokenTurn("A dog.", 0.4, "Better?"), SpokenTurn("A cat.", 0.9))
    assert record.target["list"].rewards == (0.9, 0.4, 0.0)
    assert [m["role"] for m in dialogue_messages(record.messages, turns)] == ["user", "assistant", "user", "assistant"]
    pairs = [(c["answer"], c["score"]) for c in candidates]
    again = dialogue_row(record, ["a.png"], turns, pairs, prompt="Describe.")
    assert again == row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"turns": []}, "turns must be a list of 1 to 16"),
        ({"turns": "A dog."}, "turns must be a list"),
        ({"turns": [{"answer": "A dog.", "score": 1.2}]}, r"turns\[0\].score must be a number from 0 to 1"),
        ({"turns": [{"answer": "A dog.", "score": "0.2"}]}, r"turns\[0\].score"),
        ({"turns": [{"answer": "", "score": 0.2}]}, r"turns\[0\].answer must be text"),
        (
            {"turns": [{"answer": "A.", "score": 0.2}, {"answer": "B.", "score": 0.3}]},
            r"turns\[0\].feedback must be text",
        ),
        ({"turns": [3]}, r"turns\[0\] must be an object"),
        ({"images": ["missing.png"]}, "image not found"),
        ({"question": " "}, "question is empty"),
        ({"candidates": [{"answer": "A.", "score": None}]}, r"candidates\[0\].score"),
        ({"target": 3}, "target must be an object"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(write(tmp_path, GOOD | change))
