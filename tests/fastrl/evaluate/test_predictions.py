"""Prediction files: alignment and frames, COCO results, and every kind of error with its location."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastrl.answers import View, from_original
from fastrl.data import DataError
from fastrl.data.records import Record
from fastrl.evaluate import PredictionError, evaluate, load_predictions
from fastrl.evaluate.predictions import row_of


def records(*names: str, task: str = "grounding", **target: Any) -> list[Record]:
    target = target or {"box": (64.0, 48.0, 320.0, 240.0), "expression": "x"}
    return [Record(name, task, (), (), target, views=(View(640, 480, 640, 480),)) for name in names]


def write(folder: Path, *lines: str, name: str = "p.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_answers_are_aligned_with_the_records_whatever_the_order(tmp_path: Path) -> None:
    path = write(tmp_path, '{"id": 2, "answer": "two"}', "", '{"id": "1", "answer": "one", "more": []}', "")
    got = load_predictions(path, records("1", "2"))
    assert got.answers == ["one", "two"]
    assert [r.id for r in got.records] == ["1", "2"]
    listed = write(tmp_path, '[{"id": 2, "answer": "two"}, {"id": 1, "answer": "one"}]', name="p.json")
    assert load_predictions(listed, records("1", "2")).answers == ["one", "two"]


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        ("thousand", "[100, 100, 500, 500]"),
        ("original", "[64, 48, 320, 240]"),
        ("resized", "[64, 48, 320, 240]"),
        ("unit", "[0.1, 0.1, 0.5, 0.5]"),
        ("auto", "[0.1, 0.1, 0.5, 0.5]"),
        ("auto", "<|box_start|>(100,100),(500,500)<|box_end|>"),
        ("auto", "[64, 48, 320, 240]"),
    ],
)
def test_frame_says_what_the_coordinates_mean(tmp_path: Path, frame: str, text: str) -> None:
    path = write(tmp_path, json.dumps({"id": "a", "answer": text}))
    assert evaluate("grounding", *load_predictions(path, records("a"), frame=frame))["mean_iou"] == pytest.approx(1.0)


def test_every_problem_is_named_with_file_and_line(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '{"id": "a", "answer": "x"}',
        "{broken",
        '{"id": "a", "answer": "again"}',
        '{"id": "z", "answer": "x"}',
        '{"id": "b"}',
        '{"answer": "x"}',
        '["a", "x"]',
        '{"id": true, "answer": "x"}',
        "[" * 100_000,
    )
    with pytest.raises(PredictionError) as caught:
        load_predictions(path, records("a", "b", "c"))
    message = str(caught.value)
    assert isinstance(caught.value, DataError)
    for place, what in [
        (2, "unreadable JSON"),
        (3, f"id 'a' is already answered at {path}:1"),
        (4, "id 'z' is not in the data"),
        (5, "'answer' must be the model's text, got None"),
        (6, "'id' must be a string or an integer, got None"),
        (7, "a row must be a JSON object"),
        (8, "'id' must be a string or an integer, got True"),
        (9, "unreadable JSON"),
    ]:
        assert f"{path}:{place}: {what}" in message
    assert f"{path}: no answer for 2 of 3 records: b, c" in message
    assert "skip" not in message


def test_long_lists_of_problems_are_cut_and_kept(tmp_path: Path) -> None:
    path = write(tmp_path, *["{"] * 50)
    with pytest.raises(PredictionError, match="51 problems in the predictions:\n50 rows: unreadable JSON") as caught:
        load_predictions(path, records("a"))
    assert len(caught.value.problems) == 51


def test_unreadable_files_and_frames(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_predictions(tmp_path / "none.jsonl", records("a"))
    binary = tmp_path / "b.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        load_predictions(binary, records("a"))
    with pytest.raises(ValueError, match="unknown coordinate frame 'pixels'"):
        load_predictions(binary, records("a"), frame="pixels")
    with pytest.raises(ValueError, match="two records have the id 'a'"):
        load_predictions(binary, records("a", "a"))


BOX = {"boxes": [[10.0, 20.0, 30.0, 60.0]], "labels": ["dog"], "crowd": [False]}


def test_coco_results_are_original_pixels_whatever_the_frame(tmp_path: Path) -> None:
    rows = records("7", "8", task="detection", **BOX, categories=["dog", "cat"])
    result = {"image_id": 7, "category_id": 18, "bbox": [10, 20, 20, 40], "score": 0.3}
    path = write(tmp_path, json.dumps([result]), name="r.json")
    got = load_predictions(path, rows, frame="thousand")
    assert [r.frame for r in got.records] == ["original"] * 2
    assert got.answers[1] == "[]"
    scores = evaluate("detection", *got)
    assert scores["AP"] == pytest.approx(0.5, abs=0.01)  # an image without an entry has no detections
    assert scores["unparsable"] == 0


def test_category_ids_come_from_the_data_then_the_caller_then_coco(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps([{"image_id": 7, "category_id": 5, "bbox": [10, 20, 20, 40]}]), name="r.json")
    own = records("7", task="detection", **BOX, categories=["cat", "dog"], category_ids=[4, 5])
    assert evaluate("detection", *load_predictions(path, own))["AP"] == pytest.approx(1.0)
    coco = records("7", task="detection", **BOX, categories=["cat", "dog"])
    assert evaluate("detection", *load_predictions(path, coco))["AP"] == 0.0  # category 5 of COCO is airplane
    assert evaluate("detection", *load_predictions(path, coco, categories={5: "dog"}))["AP"] == pytest.approx(1.0)
    other = records("7", task="detection", **{**BOX, "labels": ["blob"]}, categories=["blob"])
    with pytest.raises(ValueError, match="category 'blob' is not one of COCO's 80"):
        load_predictions(path, other)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image_id": 9, "category_id": 18, "bbox": [1, 2, 3, 4]}, "image_id 9 is not in the data"),
        ({"image_id": 7, "category_id": 12, "bbox": [1, 2, 3, 4]}, "category_id 12 is not a category"),
        ({"image_id": 7, "category_id": [18], "bbox": [1, 2, 3, 4]}, "category_id .18. is not a category"),
        ({"image_id": 7, "category_id": 18, "bbox": [1, 2, 3]}, "'bbox' must be four finite numbers"),
        ({"image_id": 7, "category_id": 18, "bbox": [1, 2, 3, float("nan")]}, "'bbox' must be four finite numbers"),
        ({"image_id": 7, "category_id": 18, "bbox": [1, 2, 3, 4], "score": "high"}, "'score' must be a finite number"),
        ("text", "expected an object with image_id"),
        ({"image_id": True, "category_id": 18, "bbox": [1, 2, 3, 4]}, "image_id must be an integer or a string"),
        ({"image_id": 7, "category_id": True, "bbox": [1, 2, 3, 4]}, "category_id True is not a category"),
        ({"image_id": 7, "category_id": 18, "bbox": [1, 2, -3, 4]}, "'bbox' must be x, y, width, height"),
        ({"score": 1.0, "image_id": 7, "category_id": 18, "bbox": [1, 2, 3, 4]}, "has the same content as entry 1"),
    ],
)
def test_wrong_coco_entries_are_named(tmp_path: Path, entry: Any, message: str) -> None:
    good = {"image_id": 7, "category_id": 18, "bbox": [1, 2, 3, 4], "score": 1.0}
    path = write(tmp_path, json.dumps([good, entry]), name="r.json")
    with pytest.raises(PredictionError, match=f"entry 2: {message}"):
        load_predictions(path, records("7", task="detection", **BOX, categories=["dog"]))


def test_an_empty_list_of_results_finds_nothing(tmp_path: Path) -> None:
    data = records("7", "9", task="detection", **BOX, categories=["dog"])
    found = evaluate("detection", *load_predictions(write(tmp_path, "[]", name="r.json"), data))
    assert (found["n"], found["AP"], found["unparsable"]) == (2, 0.0, 0)


def test_coco_results_answer_detection_only(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps([{"image_id": 7, "category_id": 18, "bbox": [1, 2, 3, 4]}]), name="r.json")
    with pytest.raises(PredictionError, match="'7' is a grounding record"):
        load_predictions(path, records("7"))
    broken = write(tmp_path, '[{"image_id": 7', name="broken.json")
    with pytest.raises(PredictionError, match="unreadable JSON"):
        load_predictions(broken, records("7"))


def pictured(*names: str) -> list[Record]:
    """Records as an adapter makes them: a picture of 640 x 480 without a view."""
    return [replace(r, views=(), images=(Image.new("RGB", (640, 480)),)) for r in records(*names)]


def test_resized_pixels_are_those_of_the_processors_resize(tmp_path: Path) -> None:
    (record,) = pictured("a")
    for pixels in ((56 * 56, 1 << 24), (56 * 56, 100_000)):
        view = View.qwen(640, 480, min_pixels=pixels[0], max_pixels=pixels[1])
        box = from_original(record.target["box"], "resized", view)
        path = write(tmp_path, json.dumps({"id": "a", "answer": json.dumps([{"bbox_2d": box}])}))
        got = evaluate("grounding", *load_predictions(path, [record], frame="resized", pixels=pixels))
        assert got["mean_iou"] == pytest.approx(1.0)
        other = evaluate("grounding", *load_predictions(path, [record], frame="original"))
        assert other["mean_iou"] < (0.999 if pixels[1] > 1e6 else 0.5)


@pytest.mark.parametrize("frame", ["resized", "thousand"])
def test_rows_of_a_run_say_at_which_size_the_picture_was_seen(tmp_path: Path, frame: str) -> None:
    (record,) = pictured("a")
    view = View.qwen(640, 480, max_pixels=70_000)
    seen = replace(record, views=(view,), frame=frame)
    box = from_original(record.target["box"], frame, view)
    row = row_of(seen, f"[{', '.join(map(str, box))}]")
    path = write(tmp_path, json.dumps(row))
    assert row["resized"] == [view.resized_width, view.resized_height]
    assert evaluate("grounding", *load_predictions(path, [record]))["mean_iou"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("qwen3_vl", '[{"bbox_2d": [100, 100, 500, 500]}]'),
        ("qwen2_vl", "<|object_ref_start|>x<|object_ref_end|><|box_start|>(100,100),(500,500)<|box_end|>"),
        ("internvl", "<ref>x</ref><box>[[100, 100, 500, 500]]</box>"),
        ("glm4v", "<|begin_of_box|>[[100,100,500,500]]<|end_of_box|>"),
        ("llava", "[0.10, 0.20, 0.50, 0.50]"),
        ("llava_next", "[0.10, 0.10, 0.50, 0.50]"),
        ("llava_onevision", "[0.10, 0.10, 0.50, 0.50]"),
        ("smolvlm", '[{"bbox_2d": [100, 100, 500, 500]}]'),
        ("gemma3", '[{"box_2d": [100, 100, 500, 500]}]'),
        ("qwen2_5_vl", '[{"bbox_2d": [64.4, 47.6, 322.0, 238.0]}]'),
    ],
)
def test_a_family_says_what_coordinates_mean(tmp_path: Path, family: str, text: str) -> None:
    """A 640 x 480 picture, and the same correct box in each family's format."""
    (record,) = pictured("a")
    path = write(tmp_path, json.dumps({"id": "a", "answer": text}))
    (seen,), answers = load_predictions(path, [record], family=family)
    assert evaluate("grounding", [seen], answers)["mean_iou"] == pytest.approx(1.0)
    again = write(tmp_path, json.dumps(row_of(seen, text)), name="again.jsonl")
    (twice,), _ = load_predictions(again, [record])
    assert (twice.frame, twice.style, twice.views) == (seen.frame, seen.style, seen.views)
    explicit = load_predictions(path, [record], family=family, frame="original")
    assert explicit.records[0].frame == "original"


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown model family 'qwen9'; known: qwen2_vl, qwen2_5_vl, qwen3_vl"):
        load_predictions(tmp_path / "none", records("a"), family="qwen9")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"style": "gpt"}, "'style' must be one of qwen2_5, qwen2"),
        ({"canvas": [0, 0, 0, 5]}, r"'canvas' must be \[left, top, right, bottom\] in pixels"),
        ({"canvas": "all"}, "'canvas' must be"),
        ({"frame": "pixels"}, "'frame' must be one of auto, resized"),
        ({"frame": 3}, "'frame' must be one of"),
        ({"resized": [10]}, r"'resized' must be \[width, height\] in pixels, got \[10\]"),
        ({"resized": [10, 0]}, "'resized' must be"),
        ({"resized": "10x10"}, "'resized' must be"),
    ],
)
def test_what_a_row_says_of_its_coordinates_is_checked(tmp_path: Path, extra: dict[str, Any], message: str) -> None:
    path = write(tmp_path, json.dumps({"id": "a", "answer": "x", **extra}))
    with pytest.raises(PredictionError, match=rf"p\.jsonl:1: {message}"):
        load_predictions(path, records("a"))


def test_answers_to_records_that_are_left_out_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path, '{"id": "a", "answer": "x"}', '{"id": "b", "answer": "y"}')
    assert load_predictions(path, records("a"), known={"a", "b"}).answers == ["x"]
    with pytest.raises(PredictionError, match="id 'b' is not in the data"):
        load_predictions(path, records("a"))
    rows = [{"image_id": n, "category_id": 18, "bbox": [1, 2, 3, 4]} for n in (7, 8)]
    coco = write(tmp_path, json.dumps(rows), name="r.json")
    some = records("7", task="detection", **BOX, categories=["dog"])
    assert len(json.loads(load_predictions(coco, some, known={"7", "8"}).answers[0])) == 1


@pytest.mark.parametrize("frame", ["thousand", "original", "unit"])
def test_what_was_said_of_a_file_goes_on_in_the_next(tmp_path: Path, frame: str) -> None:
    """eval --predictions --frame --out: its output needs no frame when it is read again."""
    (record,) = pictured("a")
    box = from_original(record.target["box"], frame, View.unresized(640, 480))
    path = write(tmp_path, json.dumps({"id": "a", "answer": str(list(box))}))
    (seen,), (answer,) = load_predictions(path, [record], frame=frame)
    again = write(tmp_path, json.dumps(row_of(seen, answer)), name="again.jsonl")
    assert evaluate("grounding", *load_predictions(again, [record]))["mean_iou"] == pytest.approx(1.0)


def test_auto_leaves_a_record_its_own_frame(tmp_path: Path) -> None:
    (record,) = records("a")
    path = write(tmp_path, json.dumps({"id": "a", "answer": "[100, 100, 500, 500]", "frame": "auto"}))
    (seen,), _ = load_predictions(path, [replace(record, frame="thousand")])
    assert seen.frame == "thousand"


def test_a_picture_that_the_processor_refuses_is_named(tmp_path: Path) -> None:
    record = replace(records("a")[0], views=(), images=(Image.new("RGB", (3000, 10)),))
    path = write(tmp_path, json.dumps({"id": "a", "answer": "[1, 2, 3, 4]"}))
    with pytest.raises(ValueError, match=r"a: .*aspect ratio"):
        load_predictions(path, [record], frame="resized")


def test_one_detection_written_in_two_ways_is_there_twice(tmp_path: Path) -> None:
    entry = {"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}
    again = {"score": 1.0, "bbox": [1.0, 2, 3.0, 4], "category_id": 1, "image_id": 7, "id": 9}
    data = records("7", task="detection", boxes=[], labels=[], categories=["cat"], category_ids=[1])
    file = write(tmp_path, json.dumps([entry, again]), name="r.json")
    with pytest.raises(PredictionError, match="entry 2: has the same content as entry 1"):
        load_predictions(file, data)
    other = {**again, "score": 0.5}
    assert len(load_predictions(write(tmp_path, json.dumps([entry, other]), name="r.json"), data).answers) == 1
