"""Any value anywhere in a row: the row is read or reported, and never ends the reading of the others."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastrl.data import DataError, read_data

ODD: tuple[Any, ...] = (
    *(None, "", 0, 1.5, True, -1, 10**20, float("nan"), float("inf")),
    *("null", "[1, 2", "[1, 2, 30, 40]", '{"bbox_2d": []}', "<image>", "<think>", "\U0001f600", "a.png", "gone.png"),
    *([], {}, [[]], [None], [1, 2, 3, 4], [[1, 2], [3]], {"a": 1}, {"x": [1]}, ["a.png", "a.png"]),
    *([{"role": "user"}], [{"from": "human"}], [{"from": "gpt", "value": "x"}], [{"answer": "x"}], [{"bbox_2d": 3}]),
)
GONE = object()
BOX = [1, 2, 30, 40]
TRACK = {"id": 1, "name": "dog", "boxes": {"1": BOX, "2": BOX}, "spans": [{"action": "runs", "first": 1, "last": 2}]}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "EasyR1": ("rows", {"images": ["a.png"], "problem": "<image>Where is it?", "answer": "[1, 2, 30, 40]"}),
    "verl": (
        "rows",
        {
            "data_source": "mine/boxes",
            "prompt": [{"role": "user", "content": "<image>Where is it?"}],
            "images": ["a.png"],
            "reward_model": {"style": "rule", "ground_truth": "[1, 2, 30, 40]"},
            "extra_info": {"index": 0, "task": "grounding"},
        },
    ),
    "ms-swift": (
        "rows",
        {
            "messages": [
                {"role": "user", "content": "<image>Find <ref-object>"},
                {"role": "assistant", "content": "<bbox>"},
            ],
            "images": ["a.png"],
            "objects": {"ref": ["cat"], "bbox": [BOX], "bbox_type": "real"},
        },
    ),
    "TRL": (
        "rows",
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is it?"}]}],
            "image": "a.png",
            "solution": "<answer>[1, 2, 30, 40]</answer>",
        },
    ),
    "LLaVA": (
        "rows",
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "3"}],
        },
    ),
    "PR1": ("rows", {"image": "a.png", "problem": "cat", "solution": BOX, "width": 60, "height": 50}),
    "PR1, scaled": ("rows", {"image": "a.png", "problem": "cat", "normalized_solution": BOX}),
    "refexp": ("refexp", {"image": "a.png", "expression": "the cat", "bbox": BOX}),
    "pixmo": ("pixmo", {"image": "a.png", "label": "cat", "count": 2, "points": {"x": [1, 2], "y": [3, 4]}}),
    "ocr": ("ocr", {"image": "a.png", "text": "hello"}),
    "captions": ("captions", {"image": "a.png", "references": ["a cat", "the cat"], "objects": ["cat"]}),
    "lists": (
        "lists",
        {
            "task": "grounding",
            "images": ["a.png"],
            "prompt": "Where is it?",
            "answers": ["x", "y"],
            "rewards": [0.2, 0.9],
            "target": {"box": BOX},
        },
    ),
    "reflection": (
        "reflection",
        {
            "images": ["a.png"],
            "question": "Describe.",
            "turns": [{"answer": "A dog.", "score": 0.4, "feedback": "Better?"}, {"answer": "A cat.", "score": 0.9}],
            "candidates": [{"answer": "A cat.", "score": 0.9}],
            "target": {"references": ["A cat."]},
        },
    ),
    "tracks": (
        "tracks",
        {"frames": ["a.png", "a.png"], "width": 60, "height": 50, "fps": 2, "caption": "A dog.", "subjects": [TRACK]},
    ),
    "pope": ("pope", {"image": "a.png", "text": "Is there a dog?", "label": "no"}),
    "AI2D": ("choice", {"question": "What?", "options": ["2", "1"], "answer": "1", "image": "a.png"}),
    "MVBench": ("choice", {"video": "v", "question": "What?", "candidates": ["one", "2"], "answer": "2", "start": 1}),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {  # whose ids are made of other columns
    "MMBench": ("choice", {"index": 1, "question": "Which?", "A": "cat", "B": "dog", "answer": "B", "image": "a.png"}),
    "SEED": ("choice", {"question_id": 5, "question": "Who?", "choice_a": "a", "choice_b": "b", "answer": "A"}),
    "TempCompass": ("choice", {"video_id": "v", "question": "Q\nA. a\nB. b", "answer": "A. a", "dim": "x"}),
    "hallusion": (
        "hallusion",
        {"category": "VD", "subcategory": "s", "visual_input": "1", "question": "Is it?", "gt_answer": "1"}
        | {"set_id": "0", "figure_id": "1", "question_id": "2", "image": "a.png"},
    ),
    "mme": ("mme", {"question_id": "7", "image": "a.png", "question": "Is it?", "answer": "Yes", "category": "color"}),
    "detailcaps": ("captions", {"binary": "a.png", "GT_Caption_GPT4O": "A cat."}),
}
LONG: tuple[Any, ...] = ("x" * 20_000, "/9j/4AAQ" * 2_500, ["y" * 20_000], {"z" * 20_000: 1}, ["v" * 9] * 2_000)


def changed(row: dict[str, Any], values: Sequence[Any] = (*ODD, GONE)) -> Iterator[dict[str, Any]]:
    """The row with every value at every depth replaced by every odd one, or left out."""

    def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            yield (*path, key)
            yield from places(inner, (*path, key))

    for path in places(row):
        for odd in values:
            other = copy.deepcopy(row)
            holder: Any = other
            for key in path[:-1]:
                holder = holder[key]
            if odd is GONE:
                del holder[path[-1]]
            else:
                holder[path[-1]] = odd
            yield other


@pytest.mark.parametrize("layout", ROWS)
def test_every_odd_row_is_read_or_reported(tmp_path: Path, layout: str) -> None:
    adapter, row = ROWS[layout]
    Image.new("RGB", (60, 50)).save(tmp_path / "a.png")
    file = tmp_path / "rows.jsonl"
    odd = list(changed(row))
    rows = [{"id": f"row {number}"} | other for number, other in enumerate([row, *odd, row])]
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    data = read_data(f"{adapter}:{file}")
    assert {record.id for record in data} >= {"row 0", f"row {len(odd) + 1}"}, data.problems[:3]
    assert len(data) + data.skipped == len(rows)
    assert data.problems
    for record in data:
        assert all(isinstance(message["content"], str | list) for message in record.messages)


@pytest.mark.parametrize("layout", [*ROWS, *OTHERS])
def test_no_message_repeats_a_long_value(tmp_path: Path, layout: str) -> None:
    """A picture in the column of a text would fill the screen."""
    adapter, row = (ROWS | OTHERS)[layout]
    Image.new("RGB", (60, 50)).save(tmp_path / "a.png")
    file = tmp_path / "rows.jsonl"
    long = [other | {"id": f"row {number}"} for number, other in enumerate(changed(row, LONG))]
    file.write_text("".join(json.dumps(each) + "\n" for each in [*long, row | {"id": "x" * 20_000}, row | {"id": 7}]))
    try:
        data = read_data(f"{adapter}:{file}")
    except DataError as error:
        data = error
    assert data.problems
    for problem in data.problems:
        assert len(problem.message) < 1000, problem
        assert len(problem.where) < 1100
        assert not re.search(r"(.)\1{499}", problem.message)
    assert len(str(DataError(data.problems))) < 30_000


@pytest.mark.parametrize("layout", [name for name, (adapter, _) in ROWS.items() if adapter == "rows"])
@pytest.mark.parametrize("task", ["grounding", "counting", "detection", "ocr", "caption", "qa"])
def test_odd_rows_of_a_stated_task(tmp_path: Path, layout: str, task: str) -> None:
    Image.new("RGB", (60, 50)).save(tmp_path / "a.png")
    file = tmp_path / "rows.jsonl"
    row = ROWS[layout][1]
    file.write_text("".join(json.dumps(each) + "\n" for each in [row, *changed(row)]))
    try:
        data = read_data(f"rows:{file}?task={task}")
    except DataError as error:
        data = error
    assert data.problems


@pytest.mark.parametrize(
    "adapter", ["rows", "refexp", "captions", "choice", "hallusion", "mme", "refcoco", "coco", "ocr"]
)
def test_no_message_repeats_a_long_spec(tmp_path: Path, adapter: str) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"references": ["a"]}))
    captions = f"captions:{tmp_path}/c.jsonl?"
    rest = (f"{captions}images={'x' * 9000}", f"{captions}limit={'9' * 9000}", f"{captions}{'x' * 9000}=1")
    for spec in (f"{adapter}:{'x' * 9000}", f"{adapter}:{'x/' * 9000}a.jsonl", *rest):
        with pytest.raises(DataError) as error:
            read_data(spec)
        assert len(str(error.value)) < 3300
