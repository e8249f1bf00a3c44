"""Records created by user code are checked like those of the adapters: form, pictures, and truth of each task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastrl.data import load_data
from fastrl.data.made import problems_of
from fastrl.data.records import Record, question
from fastrl.data.validate import ImageFolder

PICTURE = Image.new("RGB", (120, 80))
TRUTHS: dict[str, dict[str, Any]] = {
    "grounding": {"box": (1, 2, 30, 40)},
    "counting": {"count": 2, "points": [(1, 2), (3, 4)], "boxes": None, "label": "cat"},
    "detection": {"boxes": [[1, 2, 30, 40]], "labels": ["cat"], "crowd": [False], "categories": ["cat", "dog"]},
    "ocr": {"text": "hello"},
    "caption": {"references": ["a cat"]},
    "qa": {"answer": "yes"},
    "trajectory": {"tracks": []},
    "my-task": {},
}


def record(task: str = "grounding", **changes: Any) -> Record:
    target = {**TRUTHS[task], **changes.pop("target", {})}
    known = {name: value for name, value in target.items() if value is not ...}
    messages = question("grounding", "cat")
    return replace(Record("r", task, (PICTURE,), messages, known, source="my_data.py:rows:record 3"), **changes)


def problems(given: Record) -> list[tuple[str, str]]:
    return [(problem.kind, str(problem)) for problem in problems_of(given, ImageFolder(Path()), given.source)]


@pytest.mark.parametrize("task", TRUTHS)
def test_a_good_record_of_each_task(task: str) -> None:
    assert problems(record(task)) == []


@pytest.mark.parametrize("task", ["caption", "counting", "detection", "grounding", "ocr", "shown", "trajectory", "utr"])
def test_records_of_our_own_are_good(task: str) -> None:
    """What ``load_data`` gives may be handed on as a list."""
    for made in load_data(f"scenes:{task}?n=4&difficulty=3"):
        assert problems(made) == []


@pytest.mark.parametrize(
    ("task", "target"),
    [
        ("grounding", {"box": [1, 2, 30, 40]}),
        ("grounding", {"box": np.array([1.0, 2.0, 30.0, 40.0])}),
        ("grounding", {"box": (0, 0, 120.5, 80)}),  # at most one pixel outside, as in every row
        ("grounding", {"box": ..., "list": ()}),  # ranked answers need no truth
        ("counting", {"points": None, "label": ...}),
        ("counting", {"count": ..., "points": ((1, 2),)}),
        ("counting", {"count": 1, "points": ..., "boxes": ((1, 2, 3, 4),)}),
        ("counting", {"count": 2, "points": None, "boxes": None}),
        ("detection", {"boxes": (), "labels": (), "crowd": ..., "categories": ...}),
    ],
)
def test_other_ways_to_say_it(task: str, target: dict[str, Any]) -> None:
    assert problems(record(task, target=target)) == []


@pytest.mark.parametrize(
    ("task", "target", "kind", "message"),
    [
        ("grounding", {"box": ..., "bbox": [1, 2, 3, 4]}, "missing field", "target has no 'box'; its keys: bbox"),
        ("grounding", {"box": (50, 5, 10, 60)}, "inverted box", "needs x1 < x2"),
        ("grounding", {"box": (5, 5, 500, 60)}, "box outside", "lies outside the image of 120x80 pixels"),
        ("grounding", {"box": (5, 5, float("nan"), 60)}, "not a number", "box must be four finite numbers"),
        ("grounding", {"box": (0.1, 0.1, 0.5, 0.5)}, "box in 0 to 1", "frame unit"),
        ("grounding", {"box": "[1, 2, 3, 4]"}, "wrong type", "box must be four numbers"),
        ("grounding", {"box": 3}, "wrong type", "box must be four numbers"),
        ("counting", {"count": ..., "points": ...}, "missing field", "target has no 'count'; its keys: boxes, label"),
        ("counting", {"count": 2.5, "points": None}, "wrong type", "count must be a whole number"),
        ("counting", {"count": 3}, "count and points differ", "count is 3, but 2 are given"),
        ("counting", {"points": [(1, 2), (3, 400)]}, "point outside", "(3, 400) lies outside"),
        ("counting", {"points": ..., "boxes": [[1, 2, 3]]}, "wrong type", "boxes[0] must be four numbers"),
        ("detection", {"labels": ["cat", "dog"]}, "different lengths", "2 labels for 1 boxes"),
        ("detection", {"crowd": []}, "different lengths", "0 crowd for 1 boxes"),
        ("detection", {"labels": [3]}, "wrong type", "labels must be a list of names"),
        ("detection", {"boxes": [[1, 2, 3, 4], [9, 9, 1, 1]]}, "inverted box", "boxes[1] [9, 9, 1, 1]"),
        ("detection", {"categories": "cat"}, "wrong type", "categories must be a list of names"),
        ("ocr", {"text": " "}, "wrong type", "text must be a text that is not empty"),
        ("caption", {"references": [1]}, "wrong type", "references must be a list of names"),
        ("qa", {"answer": ...}, "missing field", "target has no 'answer'; its keys: none"),
        ("trajectory", {"tracks": ...}, "missing field", "target has no 'tracks'"),
    ],
)
def test_a_truth_that_its_reward_could_not_use(task: str, target: dict[str, Any], kind: str, message: str) -> None:
    found = problems(record(task, target=target))
    assert found[0][0] == kind
    assert found[0][1].startswith("my_data.py:rows:record 3: ")
    assert message in found[0][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": 7}, "id must be a non-empty string, got 7"),
        ({"target": {}, "task": "ocr", "images": PICTURE}, "images must be a tuple, got Image"),
        ({"images": (b"bytes",)}, "image 0 must be a path or a PIL image, got bytes"),
        ({"images": (np.zeros((4, 4, 3), np.uint8),)}, "image 0 must be a path or a PIL image, got ndarray"),
        ({"images": ("gone.png",)}, "image not found: gone.png"),
        ({"images": ()}, "0 images, but the messages have 1 image places"),
        ({"messages": ()}, "messages must be a list of one or more turns"),
        ({"messages": "find"}, "messages must be a list of one or more turns, got 'find'"),
        ({"messages": ({"role": "user"},)}, "the content of turn 0 must be a text, or a list of"),
        ({"messages": ({"role": "usr", "content": "x"},)}, "turn 0 must have a role (system, user, assistant)"),
        ({"messages": ({"role": "user", "content": [{"type": "txt"}]},)}, "the content of turn 0 must be"),
        ({"messages": ({"role": "user", "content": [{"type": "text"}]},)}, "the content of turn 0 must be"),
    ],
)
def test_the_form_of_a_record(changes: dict[str, Any], message: str) -> None:
    assert message in problems(record(**changes))[0][1]


def test_a_target_that_is_none() -> None:
    assert "target must be a mapping" in problems(replace(record(), target=None))[0][1]  # type: ignore[arg-type]


def test_bad_records_of_a_function_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from PIL import Image\nfrom fastrl.data import Record, question\n\n"
        "def rows(path):\n"
        "    for i in range(4):\n"
        "        box = [50, 5, 10, 60] if i == 2 else [5, 5, 10, 60]\n"
        "        yield Record(str(i), 'grounding', [Image.new('RGB', (99, 99))], question('grounding', 'x'), "
        "{'box': box})\n"
    )
    data = load_data("mine.py:rows:x", skip_bad=True)
    assert ([record.id for record in data], data.reasons) == (["0", "1", "3"], {"inverted box": 1})
    with pytest.raises(ValueError, match=r"mine.py:rows:record 2: box .* inverted box"):
        load_data("mine.py:rows:x")
