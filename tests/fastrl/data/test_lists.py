"""The adapter for ranked lists: records of valid rows, and the location of errors in bad ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastrl.answers import View
from fastrl.data import DataError, load_data
from fastrl.data.lists import list_row, ranked_list
from fastrl.data.records import Record, question

SOUND: dict[str, Any] = {
    "id": "7",
    "task": "grounding",
    "images": ["a.png"],
    "prompt": "Where is it?",
    "answers": ["x", "y"],
    "rewards": [0.2, 0.9],
    "target": {"box": [1, 2, 30, 40]},
}


def write(folder: Path, *rows: Any) -> str:
    Image.new("RGB", (60, 50)).save(folder / "a.png")
    file = folder / "lists.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return f"lists:{file}"


def test_a_sound_row(tmp_path: Path) -> None:
    (record,) = load_data(write(tmp_path, SOUND))
    found = ranked_list(record)
    assert found == (("x", "y"), (0.2, 0.9), None)
    assert record.target["box"] == (1, 2, 30, 40)
    assert record.messages == question("grounding", prompt="Where is it?")
    assert record.images == (tmp_path / "a.png",)
    assert record.source.endswith("lists.jsonl:1")


def test_rewards_may_be_left_to_the_target(tmp_path: Path) -> None:
    bare = {k: v for k, v in SOUND.items() if k not in ("rewards", "task")}
    (record,) = load_data(write(tmp_path, bare))
    assert record.task == "grounding"
    assert ranked_list(record) == (("x", "y"), None, None)
    (asked,) = load_data(write(tmp_path, SOUND) + "?rewards=target")
    assert ranked_list(asked) == (("x", "y"), None, None)
    (page,) = load_data(write(tmp_path, bare | {"target": {"text": "abc"}}))
    assert page.task == "ocr"


def test_a_row_needs_no_target_where_rewards_are_given(tmp_path: Path) -> None:
    row = {k: v for k, v in SOUND.items() if k not in ("id", "task", "target", "images")} | {"image": "a.png"}
    (record,) = load_data(write(tmp_path, row))
    assert (record.id, record.task) == ("0", "list")
    assert ranked_list(record) == (("x", "y"), (0.2, 0.9), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [0.1]}, "2 answers but 1 rewards"),
        ({"rewards": [0.1, float("nan")]}, r"rewards\[1\] must be a finite number, got nan"),
        ({"rewards": [0.1, float("inf")]}, r"rewards\[1\] must be a finite number"),
        ({"rewards": [0.1, True]}, r"rewards\[1\]"),
        ({"rewards": 3}, "rewards must be a list"),
        ({"rewards": [1e39, 0.0]}, r"rewards\[0\] must lie within"),
        ({"answers": []}, "empty list"),
        ({"answers": ["a", 2]}, "list of strings"),
        ({"answers": None}, "list of strings"),
        ({"answers": ["a"] * 1025, "rewards": [0.0] * 1025}, "at most 1024"),
        ({"images": ["missing.png"]}, "image not found"),
        ({"images": []}, "one or more files"),
        ({"images": ["a.png", 4]}, "must be a file's name"),
        ({"prompt": " "}, "prompt is empty"),
        ({"target": {"box": [5, 5, 3, 9]}}, "inverted box"),
        ({"target": {"box": [5, 5, 300, 9]}}, "outside the image"),
        ({"target": {"text": 4}}, "target.text"),
        ({"target": [1]}, "target must be an object"),
        ({"rewards": None, "target": {}}, "there are no rewards"),
        ({"rewards": None, "task": "counting"}, "there are no rewards"),
        ({"task": 4}, "task must be a name"),
        ({"resized": [[56]]}, "resized must have one"),
        ({"resized": [[56, 28], [56, 28]]}, "resized must have one"),
        ({"resized": 3}, "resized must have one"),
    ],
)
def test_a_bad_row_is_reported_with_file_and_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    spec = write(tmp_path, SOUND, {**SOUND, "id": "8", **change})
    with pytest.raises(DataError, match=rf"lists\.jsonl:2: .*{message}"):
        load_data(spec)
    kept = load_data(spec, skip_bad=True)
    assert [record.id for record in kept] == ["7"]
    assert kept.skipped == 1


def test_all_bad_rows_are_reported_at_once(tmp_path: Path) -> None:
    spec = write(tmp_path, "{", {**SOUND, "answers": []}, SOUND, [1])
    with pytest.raises(DataError) as error:
        load_data(spec)
    assert {p.where.rpartition(":")[2] for p in error.value.problems} == {"1", "2", "4"}


def test_an_unknown_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'rewards'"):
        load_data(write(tmp_path, SOUND) + "?reward=target")
    with pytest.raises(DataError, match="rewards must be one of"):
        load_data(write(tmp_path, SOUND) + "?rewards=given")


def test_a_written_row_is_read_back_best_first(tmp_path: Path) -> None:
    (record,) = load_data(write(tmp_path, SOUND))
    seen = replace(record, views=(View(60, 50, 56, 28),))
    row = list_row(seen, ["a.png"], ["x", "ü\u2028z", "y"], [0.1, 0.9, 0.5])
    (again,) = load_data(write(tmp_path, json.dumps(row, ensure_ascii=False)))
    assert ranked_list(again) == (("ü\u2028z", "y", "x"), (0.9, 0.5, 0.1), ((56, 28),))
    assert (again.id, again.task, again.messages) == (record.id, record.task, record.messages)
    assert again.target["box"] == record.target["box"]


def test_a_prompt_that_a_list_cannot_hold_is_refused() -> None:
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    with pytest.raises(ValueError, match="2 turns"):
        list_row(Record("a", "ocr", (), turns, {}), [], ["x"], [1.0])
    content = [{"type": "text", "text": "a"}, {"type": "image"}]
    late = Record("a", "ocr", (Path("a.png"),), ({"role": "user", "content": content},), {})
    with pytest.raises(ValueError, match="images first"):
        list_row(late, ["a.png"], ["x"], [1.0])
