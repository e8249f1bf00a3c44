"""A correct answer in each family's own format scores exactly 1.0 through ``fastrl eval --predictions --family``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastrl.answers import FAMILIES, View, format_answer, style_of
from fastrl.cli.main import main
from fastrl.data import load_data
from fastrl.evaluate.run import run_evaluation

WIDTH, HEIGHT = 1120, 560  # multiples of 28 pixels and of 1/100: every frame can represent the boxes exactly
BOXES = [(112, 56, 560, 280), (560, 0, 1008, 504)]
EIGHTHS = [(140, 70, 560, 280), (560, 0, 980, 490)]  # for steps of 1024
TASKS = ("grounding", "counting", "detection", "ocr", "trajectory")
FIRST = {style_of(family).name: family for family in reversed(FAMILIES)}  # one family of each style
CASES = [
    (family, task)
    for family in FAMILIES
    for task in (TASKS if family in FIRST.values() else ("detection",))
    if style_of(family).boxes or task in ("counting", "ocr", "trajectory")
]
PIXELS = (56 * 56, WIDTH * HEIGHT // 4)  # families that answer in pixels of the resized picture saw half of each side
RIGHT = {
    "grounding": ("mean_iou", "acc@0.5", "acc@0.95"),
    "counting": ("accuracy",),
    "detection": ("AP", "AP50", "AP75"),
    "ocr": ("f1",),
    "trajectory": ("mean_iou", "recall@0.5"),
}


def written(folder: Path, task: str, family: str) -> tuple[str, Path]:
    """A data spec with one record, and a file with the correct answer in the family's format."""
    style = style_of(family)
    boxes = EIGHTHS if style.steps == 1024 else BOXES
    view = View.padded(WIDTH, HEIGHT, 336) if style.frame == "padded_unit" else View(WIDTH, HEIGHT, 560, 280)
    size: dict[str, Any] = {"id": 1, "image": "gone.png", "width": WIDTH, "height": HEIGHT}
    data = folder / "data.jsonl"
    if task == "trajectory":
        spec = "scenes:trajectory?n=1&size=1000&frames=2"
        (record,) = load_data(spec)
        target: dict[str, Any] = dict(record.target)
        size["id"] = record.id
        view = View.unresized(1000, 1000)
    elif task == "detection":
        data = folder / "instances.json"
        image = {"id": 1, "file_name": "gone.png", "width": WIDTH, "height": HEIGHT}
        marked = [
            {"id": n, "image_id": 1, "category_id": n, "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0}
            | {"area": (x2 - x1) * (y2 - y1)}
            for n, (x1, y1, x2, y2) in enumerate(boxes, start=1)
        ]
        kinds = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        data.write_text(json.dumps({"images": [image], "annotations": marked, "categories": kinds}))
        target = {"boxes": boxes, "labels": ["cat", "dog"]}
        spec = f"coco:{data}"
    elif task == "grounding":
        data.write_text(json.dumps({**size, "expression": "the cat", "bbox": boxes[0]}))
        target, spec = {"box": boxes[0], "expression": "the cat"}, f"refexp:{data}"
    elif task == "counting":
        places = [box[:2] for box in boxes]
        data.write_text(json.dumps({**size, "label": "cat", "count": 2, "points": places}))
        target, spec = {"label": "cat", "count": 2, "points": places, "boxes": None}, f"pixmo:{data}"
    else:
        target = {"text": "A page.\nTwo lines, café."}
        data.write_text(json.dumps({**size, **target}))
        spec = f"ocr:{data}"
    answers = folder / "answers.jsonl"
    answers.write_text(json.dumps({"id": size["id"], "answer": format_answer(task, target, style.name, view)}))
    return spec, answers


@pytest.mark.parametrize(("family", "task"), CASES)
def test_a_right_answer_is_exactly_right(tmp_path: Path, family: str, task: str) -> None:
    spec, answers = written(tmp_path, task, family)
    frame = style_of(family).frame
    pixels = PIXELS if frame == "resized" else (None, None)
    found = run_evaluation(task, spec, predictions=answers, family=family, pixels=pixels)
    assert {name: found[name] for name in RIGHT[task]} == dict.fromkeys(RIGHT[task], 1.0)
    if task == "counting":  # a frame that is read wrongly has the right number too
        assert found["point_distance"] == pytest.approx(0.0, abs=1e-9)
    if task not in ("ocr", "trajectory"):
        assert found["frame"] == frame


@pytest.mark.parametrize(("family", "task"), [("llava", "grounding"), ("internvl", "detection"), ("molmo", "counting")])
def test_the_command_says_the_same(
    tmp_path: Path, family: str, task: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, answers = written(tmp_path, task, family)
    command = ["fastrl", "eval", task, "--data", spec, "--predictions", str(answers), "--family", family, "--json"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [found[name] for name in RIGHT[task]] == [1.0] * len(RIGHT[task])
