"""``eval --predictions`` of every protocol without picture files, where rows state the sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastrl.data import DataError
from fastrl.evaluate.run import run_evaluation

SIZE = {"width": 640, "height": 480}
IMAGE = {"id": "1", "image": "gone/a.png", **SIZE}
CLIP = {
    "id": "1",
    "fps": 2,
    "subjects": [{"id": 1, "name": "cat", "boxes": {"1": [64, 48, 320, 240], "2": [128, 96, 320, 240]}}],
    **SIZE,
}
TRACK = "Track1: cat<Id1>Frame1:[100,100,500,500];Frame2:[200,200,500,500];</Id1>"
COCO = {
    "images": [{"id": 1, "file_name": "gone/a.png", **SIZE}],
    "categories": [{"id": 7, "name": "cat"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 2, 30, 40], "caption": "A cat."}],
}
BOX = '[{"bbox_2d": [1, 2, 31, 42], "label": "cat"}]'
ASKED = {"images": ["gone/a.png"], **SIZE, "id": "1"}
CSV = "video,question,answer,qid,type,a0,a1\n1,why,1,7,C,x,y\n"

# task, adapter, file, answer, query, metric that is 1 for a correct answer
PROTOCOLS: list[tuple[str, str, Any, str, str, str]] = [
    ("grounding", "refexp", {**IMAGE, "expression": "cat", "bbox": [1, 2, 31, 42]}, BOX, "", "mean_iou"),
    ("grounding", "rows", {**ASKED, "problem": "Find it.", "answer": [1, 2, 31, 42]}, BOX, "", "mean_iou"),
    ("counting", "pixmo", {**IMAGE, "label": "cat", "count": 1}, BOX, "", "accuracy"),
    ("counting", "coco", COCO, BOX, "?task=counting", "accuracy"),
    ("detection", "coco", COCO, BOX, "", "AP"),
    ("detection", "coco", COCO, BOX, "?images=/nowhere", "AP"),
    ("ocr", "ocr", {**IMAGE, "text": "one two three four"}, "one two three four", "", "f1"),
    ("caption", "captions", {**IMAGE, "references": ["A cat."]}, "A cat.", "", "object_f1"),
    ("caption", "captions", COCO, "A cat.", "", "object_f1"),
    ("trajectory", "tracks", {**CLIP, "frames": ["gone/1.png", "gone/2.png"]}, TRACK, "", "mean_iou"),
    ("trajectory", "tracks", {**CLIP, "video": "gone.mp4", "video_frames": [0, 5]}, TRACK, "", "mean_iou"),
    ("qa", "pope", {"question_id": 1, "image": "a.jpg", "text": "A cat?", "label": "yes"}, "yes", "", "accuracy"),
    ("qa", "pope", {"question_id": 1, "image": "a", "text": "A cat?", "label": "yes"}, "yes", "?images=/x", "accuracy"),
    ("qa", "nextqa", CSV, "B", "?videos=/nowhere", "accuracy"),
    ("qa", "rows", {**ASKED, "problem": "A cat?", "answer": "Yes"}, "yes", "", "accuracy"),
]


@pytest.mark.parametrize(("task", "adapter", "data", "answer", "query", "metric"), PROTOCOLS)
def test_predictions_are_scored_without_a_picture(
    tmp_path: Path, task: str, adapter: str, data: Any, answer: str, query: str, metric: str
) -> None:
    file = tmp_path / ("data.json" if data is COCO else "data.jsonl")
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    name = {"nextqa": "1_7", "coco": "1/cat" if task == "counting" else "1"}.get(adapter, "1")
    (tmp_path / "answers.jsonl").write_text(json.dumps({"id": name, "answer": answer}))
    found = run_evaluation(task, f"{adapter}:{file}{query}", predictions=tmp_path / "answers.jsonl")
    assert found[metric] == pytest.approx(1.0)
    if adapter in ("refexp", "coco", "tracks", "ocr"):  # protocols that need the pictures raise an error
        with pytest.raises(DataError, match="not found"):
            run_evaluation(task, f"{adapter}:{file}{query}", model="tiny:perception")
