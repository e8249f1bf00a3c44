"""One reader for truths: every notation of a truth gives the same target in every adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastrl.data import DataError, load_data
from fastrl.data.truth import (
    TruthFault,
    clipped,
    fields_of,
    read_box,
    read_count,
    read_list,
    read_names,
    read_points,
    short,
)
from fastrl.rewards.adapters import record_from

BOX = [10, 20, 200, 150]
WRAPS = ("{}", " {}\n", "<answer>{}</answer>", "<think>so</think>\n<answer> {} </answer>", "```json\n{}\n```")
BOXES: list[Any] = [
    BOX,
    tuple(map(float, BOX)),
    np.array(BOX),
    [BOX],
    {"bbox_2d": BOX},
    {"BBox": BOX, "Label": "cat"},
    [{"bbox_2d": BOX, "label": "cat"}],
    {"bbox": json.dumps(BOX)},
]
POINTS: list[Any] = [
    [[10, 20], [30, 40]],
    {"x": [10, 30], "y": [20, 40]},
    [{"x": 10, "y": 20}, {"x": 30, "y": 40}],
    [{"point_2d": [10, 20], "label": "cat"}, {"Point": [30, 40]}],
    np.array([[10, 20], [30, 40]]),
]


def texts(value: Any) -> list[str]:
    """A value as JSON text, bare and wrapped."""
    text = json.dumps(value if not hasattr(value, "tolist") else value.tolist())
    return [wrap.format(text) for wrap in WRAPS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("truth")
    Image.new("RGB", (240, 160)).save(folder / "a.png")
    return folder


def loaded(folder: Path, adapter: str, row: dict[str, Any]) -> Any:
    text = json.dumps({"image": "a.png", **row}, default=lambda value: value.tolist())
    (folder / "rows.jsonl").write_text(text)
    return load_data(f"{adapter}:{folder / 'rows.jsonl'}")[0].target


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_a_box_is_one_box_through_every_door(folder: Path, box: Any) -> None:
    want = tuple(map(float, BOX))
    for value in (box, *texts(box)):
        assert read_box(value) == want
        assert loaded(folder, "refexp", {"expression": "the cat", "bbox": value})["box"] == want
        row = {"problem": "Where is the cat?", "solution": value, "task": "grounding"}
        assert loaded(folder, "rows", row)["box"] == want
        for name in ("box", "bbox", "solution", "ground_truth", "target"):
            assert record_from("grounding", {name: value}).target["box"] == want
        listed = {"image": "a.png", "prompt": "x", "answers": ["a"], "target": {"box": value}}
        assert loaded(folder, "lists", listed)["box"] == want


@pytest.mark.parametrize("points", POINTS, ids=str)
def test_points_are_the_same_points_through_every_door(folder: Path, points: Any) -> None:
    want = [(10.0, 20.0), (30.0, 40.0)]
    for value in (points, *texts(points)):
        assert read_points(value) == want
        assert loaded(folder, "pixmo", {"label": "cat", "count": 2, "points": value})["points"] == want
        row = {"problem": "How many cats?", "answer": value, "images": ["a.png"]}
        assert loaded(folder, "rows", {**row, "task": "counting"})["points"] == want
        for name in ("points", "ground_truth", "target", "solution"):
            assert record_from("counting", {name: value}).target == {
                "label": "",
                "count": 2,
                "points": want,
                "boxes": None,
            }


def test_labelled_boxes_through_every_door(folder: Path) -> None:
    items = [{"bbox_2d": BOX, "label": "cat"}, {"bbox": [0, 0, 9, 9], "class_name": "dog"}]
    want = {"labels": ["cat", "dog"], "crowd": [False, False], "categories": ["cat", "dog"]}
    places = [tuple(map(float, BOX)), (0.0, 0.0, 9.0, 9.0)]
    for value in (items, *texts(items), {"boxes": [BOX, [0, 0, 9, 9]], "labels": ["cat", "dog"]}):
        rows = loaded(
            folder, "rows", {"problem": "Find all.", "answer": value, "images": ["a.png"], "task": "detection"}
        )
        assert [tuple(box) for box in rows.pop("boxes")] == places
        assert rows == want
        for name in ("ground_truth", "target", "solution"):
            target = dict(record_from("detection", {name: value}).target)
            assert target.pop("boxes") == places
            assert target == want


@pytest.mark.parametrize("value", [2, 2.0, "2", "2.0", "<answer>2</answer>", np.int64(2), np.float32(2)])
def test_a_count_is_a_count_through_every_door(folder: Path, value: Any) -> None:
    assert read_count(value) == 2
    assert loaded(folder, "pixmo", {"label": "cat", "count": value})["count"] == 2
    row = {"problem": "How many cats?", "answer": value, "images": ["a.png"]}
    assert loaded(folder, "rows", row)["count"] == 2
    for name in ("count", "ground_truth", "solution"):
        assert record_from("counting", {name: value}).target["count"] == 2


@pytest.mark.parametrize(
    ("read", "value", "kind"),
    [
        *((read_box, value, "wrong type") for value in ([1, 2, 3], "1, 2, 3, 4", "[1, 2", None, 5, {}, {"box": None})),
        *((read_box, value, "not a number") for value in ([1, 2, "3", 4], [1, 2, None, 4], [1, 2, 10**400, 4])),
        *((read_points, value, "wrong type") for value in ("many", [[1, 2], [3]], {"x": [1]}, 5, [None])),
        *((read_points, value, "not a number") for value in ([[1, "2"]], [{"x": 1}], {"x": [1], "y": [float("nan")]})),
        *((read_count, value, "wrong type") for value in (2.5, True, -1, "two", None, [2], float("inf"))),
        (read_names, ["a", 5], "wrong type"),
        (read_list, {"a": 1}, "wrong type"),
    ],
)
def test_what_is_no_such_truth_is_named_by_kind(read: Any, value: Any, kind: str) -> None:
    with pytest.raises(TruthFault) as fault:
        read(value)
    assert fault.value.kind == kind
    assert str(fault.value).startswith("must ")


def test_fields_of_one_value() -> None:
    assert fields_of("ocr", "[1] x") == {"text": "[1] x"}
    assert fields_of("counting", {"count": 2, "label": "cat"}) == {"count": 2, "label": "cat"}
    assert fields_of("counting", {"bbox": BOX}) == {"boxes": [BOX]}
    assert fields_of("counting", []) == {"points": []}
    assert fields_of("detection", {"bbox": BOX, "label": "cat"}) == {"boxes": [BOX], "labels": ["cat"]}


def test_malformed_rows_are_bad_rows(folder: Path) -> None:
    for value in ("[1, 2", '[{"bbox_2d": [1, 2, 3, 4]}]', [{"bbox_2d": [1, 2], "label": "cat"}], {"boxes": [BOX]}):
        with pytest.raises(DataError):
            loaded(folder, "rows", {"problem": "Find.", "answer": value, "images": ["a.png"], "task": "detection"})


def test_quoted_values_are_bounded() -> None:
    assert short("abc") == "'abc'"
    assert short("x" * 100) == "'" + "x" * 78 + "…"
    assert short(bytes(10**6)).endswith("…")
    assert len(short(bytes(10**6))) == len(short([1] * 1000)) == 80
    assert short("x" * 79) == "'" + "x" * 78 + "…"
    assert clipped("abcdef", 6) == "abcdef"
    assert clipped("abcdefg", 6) == "abc…fg"
