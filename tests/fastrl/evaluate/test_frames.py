"""A wrong coordinate frame is reported: the frame used, and how many answers would score differently in another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastrl.answers import View
from fastrl.data import DataError
from fastrl.data.records import Record
from fastrl.evaluate.frames import frame_report
from fastrl.evaluate.run import run_evaluation

VIEW = View(640, 480, 640, 480)


def row(box: tuple[float, ...], frame: str = "auto", name: str = "a", view: View = VIEW) -> Record:
    return Record(name, "grounding", (), (), {"box": box, "expression": "x"}, views=(view,), frame=frame)


THOUSAND = '[{"bbox_2d": [100, 100, 400, 300]}]'  # of a 640 x 480 picture: [64, 48, 256, 144]


def test_a_right_answer_in_another_frame_is_noticed() -> None:
    rows = [row((64.0, 48.0, 256.0, 144.0), name=str(i)) for i in range(4)]
    report = frame_report("grounding", rows, [THOUSAND] * 3 + ["no box"])
    assert report is not None
    assert (report.frame, report.changes) == ("original", 3)
    assert report.better is not None
    assert (report.better[0], report.better[2]) == ("thousand", pytest.approx(0.75))
    message = report.words(guessed=True)
    assert len(message) == 2
    assert "--frame thousand" in message[1]


def test_the_right_frame_leaves_nothing_to_say() -> None:
    report = frame_report("grounding", [row((64.0, 48.0, 256.0, 144.0), "thousand")], [THOUSAND])
    assert report is not None
    assert (report.frame, report.better) == ("thousand", None)
    assert report.changes == 1  # pixels were also plausible, but would have been wrong
    assert report.words(guessed=False) == []


@pytest.mark.parametrize(
    ("answer", "frame", "changes"),
    [
        ("[0.1, 0.1, 0.4, 0.3]", "unit", 1),  # of the picture, or of the picture padded to a square
        ('[{"bbox_2d": [700, 100, 900, 300]}]', "thousand", 0),  # outside the picture, so no other frame is plausible
        ("<|box_start|>(100,100),(400,300)<|box_end|>", "thousand", 1),
        ("nothing", "thousand", 0),
    ],
)
def test_only_plausible_frames_count(answer: str, frame: str, changes: int) -> None:
    report = frame_report("grounding", [row((64.0, 48.0, 256.0, 144.0), frame)], [answer])
    assert report is not None
    assert (report.frame, report.changes) == (frame, changes)


def test_a_square_picture_has_one_unit_frame() -> None:
    view = View(500, 500, 500, 500)
    report = frame_report("grounding", [row((50.0, 50.0, 200.0, 150.0), view=view)], ["[0.1, 0.1, 0.4, 0.3]"])
    assert report == ("unit", 0, None)


def test_detection_and_counting_and_text() -> None:
    target: dict[str, Any] = {"boxes": [[64, 48, 256, 144]], "labels": ["cat"], "crowd": [False], "categories": ["cat"]}
    found = Record("a", "detection", (), (), target, views=(VIEW,))
    report = frame_report("detection", [found], ['[{"bbox_2d": [100, 100, 400, 300], "label": "cat"}]'])
    assert report is not None
    assert (report.changes, report.better and report.better[0]) == (1, "thousand")
    counted = Record("a", "counting", (), (), {"label": "x", "count": 1, "points": None, "boxes": None}, views=(VIEW,))
    assert frame_report("counting", [counted], ['[{"point_2d": [5, 5]}]']) == ("original", 0, None)
    assert frame_report("ocr", [Record("a", "ocr", (), (), {"text": "x"})], ["x"]) is None


# ---- eval --predictions


def instances(folder: Path, **size: Any) -> Path:
    image = {"id": 7, "file_name": "gone.jpg", **size}
    annotation = {"id": 1, "image_id": 7, "category_id": 1, "bbox": [64, 48, 192, 96], "area": 1, "iscrowd": 0}
    data = {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "cat"}]}
    path = folder / "instances_val.json"
    path.write_text(json.dumps(data))
    return path


def test_predictions_need_no_picture_files_where_rows_state_sizes(tmp_path: Path) -> None:
    path = instances(tmp_path, width=640, height=480)
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{"image_id": 7, "category_id": 1, "bbox": [64, 48, 192, 96], "score": 0.9}]))
    got = run_evaluation("detection", f"coco:{path}", predictions=results)
    assert (got["AP"], got["frame"], got["frame_changes"]) == (1.0, "original", 1)

    answers = tmp_path / "answers.jsonl"
    text = json.dumps([{"bbox_2d": [100, 100, 400, 300], "label": "cat"}])
    answers.write_text(json.dumps({"id": 7, "answer": text}))
    messages: list[str] = []
    wrong = run_evaluation("detection", f"coco:{path}?images=/nowhere", predictions=answers, say=messages.append)
    assert (wrong["AP"], wrong["frame"], wrong["frame_changes"]) == (0.0, "original", 1)
    assert any("--frame thousand" in line for line in messages)
    right = run_evaluation("detection", f"coco:{path}", predictions=answers, family="qwen3_vl", say=messages.append)
    assert (right["AP"], right["frame"]) == (1.0, "thousand")


def test_rows_of_other_adapters_may_state_sizes_too(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": 1, "image": "gone.png", "width": 640, "height": 480, "expression": "a",
                                "bbox": [64, 48, 256, 144]}))  # fmt: skip
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"id": 1, "answer": THOUSAND}))
    got = run_evaluation("grounding", f"refexp:{rows}", predictions=answers, frame="thousand")
    assert got["mean_iou"] == 1.0


def test_without_files_and_sizes_the_row_is_named(tmp_path: Path) -> None:
    path = instances(tmp_path)
    results = tmp_path / "results.json"
    results.write_text("[]")
    with pytest.raises(DataError, match=r"image 7: image not found: .*gone\.jpg"):
        run_evaluation("detection", f"coco:{path}", predictions=results)


def test_options_of_predictions_are_refused_with_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--family says whose answers --predictions are"):
        run_evaluation("grounding", "scenes:grounding?n=1", model="tiny:perception", family="qwen3_vl")
    with pytest.raises(ValueError, match="unknown model family 'bert'"):
        run_evaluation("grounding", "scenes:grounding?n=1", predictions=tmp_path / "x", family="bert")
    with pytest.raises(ValueError, match=r"--normalise .* goes with eval ocr"):
        run_evaluation("grounding", "scenes:grounding?n=1", predictions=tmp_path / "x", normalise="none")
    with pytest.raises(ValueError, match="unknown value of --normalise 'nfd'; did you mean 'nfc'"):
        run_evaluation("ocr", "scenes:ocr?n=1", predictions=tmp_path / "x", normalise="nfd")
