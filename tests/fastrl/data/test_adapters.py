"""Every adapter on real files: the number of records, their questions, and the position of their truth."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastrl.answers import View, format_answer, matches_format, parse_boxes, parse_points, to_original
from fastrl.data import DataError, Dataset, Record, load_data
from fastrl.data.pictures import open_picture, picture_size
from fastrl.data.refexp import bare_expression

REAL = {
    "coco:coco/instances.json": ("detection", 62, {}),
    "coco:coco/instances.json?task=counting": ("counting", 261, {"crowd": 11}),
    "refexp:refexp/refcocos/refcocos.jsonl": ("grounding", 6, {"no such object": 1}),
    "refexp:refexp/spare/expressions.jsonl": ("grounding", 200, {}),
    "pixmo:counting/counts.jsonl": ("counting", 261, {}),
    "ocr:ocr/lines_uw3/lines.jsonl": ("ocr", 150, {}),
    "ocr:ocr/words_scene/words.jsonl": ("ocr", 5, {}),
    "ocr:ocr/pages": ("ocr", 2, {}),
}


def real(data_dir: Path, spec: str, **options: bool) -> Dataset:
    adapter, _, path = spec.partition(":")
    return load_data(f"{adapter}:{data_dir}/{path}", **options)


def prompt(record: Record) -> str:
    return record.messages[0]["content"][-1]["text"]


@pytest.mark.parametrize("spec", REAL)
def test_real_files_load_whole_and_clean(data_dir: Path, spec: str) -> None:
    task, count, reasons = REAL[spec]
    data = real(data_dir, spec)
    assert len(data) == count
    assert data.reasons == reasons
    assert data.skipped == sum(reasons.values())
    assert len({record.id for record in data}) == count
    for record in data:
        assert record.task == task
        assert isinstance(record.images[0], Path)
        assert record.images[0].is_file()
        assert [part["type"] for part in record.messages[0]["content"]] == ["image", "text"]
        assert record.source


@pytest.mark.parametrize("spec", REAL)
@pytest.mark.parametrize("style", ["qwen2_5", "qwen2"])
def test_truth_written_as_an_answer_reads_back(data_dir: Path, spec: str, style: str) -> None:
    """Truth → answer text of each model family → truth, within half a unit of the text's frame, for every record."""
    for record in real(data_dir, spec):
        image = record.images[0]
        assert isinstance(image, Path)
        with Image.open(image) as opened:
            width, height = opened.size
        view = View(width, height, width + 13, max(28, height - 7))
        text = format_answer(record.task, record.target, style, view)
        assert matches_format(record.task, text, style)
        if record.task == "ocr":
            continue
        frame = "resized" if style == "qwen2_5" else "thousand"
        side = view.size(frame)
        if record.target.get("boxes", 0) is None:
            truth = [tuple(p) for p in record.target["points"]]
            read = [to_original(item.point, frame, view) for item in parse_points(text)]
        else:
            boxes = record.target.get("boxes") or [b for b in [record.target.get("box")] if b]
            crowd = record.target.get("crowd", [False] * len(boxes))
            truth = [tuple(b) for b, is_crowd in zip(boxes, crowd, strict=True) if not is_crowd]
            read = [to_original(item.box, frame, view) for item in parse_boxes(text)]
        assert len(read) == len(truth)
        for got, want in zip(read, truth, strict=True):
            for i, (a, b) in enumerate(zip(got, want, strict=True)):
                assert abs(a - b) <= 0.5 * (width, height)[i % 2] / side[i % 2] + 1e-6


def test_coco_detection_keeps_the_files_truth(data_dir: Path) -> None:
    source = json.loads((data_dir / "coco/instances.json").read_text())
    names = {c["id"]: c["name"] for c in source["categories"]}
    records = {record.id: record for record in real(data_dir, "coco:coco/instances.json")}
    assert set(records) == {str(image["id"]) for image in source["images"]}
    for image in source["images"]:
        target = records[str(image["id"])].target
        annotations = [a for a in source["annotations"] if a["image_id"] == image["id"]]
        assert target["labels"] == [names[a["category_id"]] for a in annotations]
        assert target["crowd"] == [bool(a["iscrowd"]) for a in annotations]
        for box, a in zip(target["boxes"], annotations, strict=True):
            x, y, w, h = a["bbox"]
            assert box == pytest.approx([x, y, x + w, y + h], abs=1e-6)
    assert sum(sum(r.target["crowd"]) for r in records.values()) == 11
    assert records["58636"].target["boxes"] == []  # for an image without instances the answer is "none"
    assert format_answer("detection", records["58636"].target, "qwen2_5", View.unresized(8, 8)) == "[]"
    assert prompt(records["790"]).startswith("Please output bbox coordinates and names of person, bicycle, car,")


def test_coco_options(data_dir: Path) -> None:
    few = real(data_dir, "coco:coco/instances.json?categories=dog,traffic%20light&empty=drop")
    assert {label for record in few for label in record.target["labels"]} <= {"dog", "traffic light"}
    assert few[0].target["categories"] == ["traffic light", "dog"]  # in the order of the file
    assert len(few) + few.reasons["no instances"] == 62
    counted = real(data_dir, "coco:coco/instances.json?task=counting&min_count=2&max_count=10")
    assert all(2 <= record.target["count"] <= 10 for record in counted)
    assert counted[0].id == "790/person"
    assert prompt(counted[0]) == "Output all the bounding boxes of the person"


def test_limit_and_seed(data_dir: Path) -> None:
    whole = real(data_dir, "ocr:ocr/lines_uw3/lines.jsonl")
    first = real(data_dir, "ocr:ocr/lines_uw3/lines.jsonl?limit=5")
    assert [r.id for r in first] == ["0", "1", "2", "3", "4"]
    shuffled = [r.id for r in real(data_dir, "ocr:ocr/lines_uw3/lines.jsonl?seed=3")]
    assert shuffled != [r.id for r in whole]
    assert sorted(shuffled) == sorted(r.id for r in whole)
    assert shuffled[:7] == [r.id for r in real(data_dir, "ocr:ocr/lines_uw3/lines.jsonl?seed=3&limit=7")]


def test_counts_agree_between_the_two_adapters(data_dir: Path) -> None:
    derived = {
        (Path(str(r.images[0])).stem.lstrip("0"), r.target["label"]): r
        for r in real(data_dir, "pixmo:counting/counts.jsonl")
    }
    for record in real(data_dir, "coco:coco/instances.json?task=counting"):
        image, _, label = record.id.partition("/")
        twin = derived[(image, label)]
        assert twin.target["count"] == record.target["count"] == len(twin.target["points"])


def test_referring_expressions_of_the_vlm_r1_layout(data_dir: Path) -> None:
    data = real(data_dir, "refexp:refexp/refcocos/refcocos.jsonl")
    assert [record.id for record in data] == ["0", "1", "3", "4", "5", "6"]  # line numbers from 0; line 2 is null
    assert data.left_out[0].where.endswith("refcocos.jsonl:3")
    assert data[0].target["expression"] == "the chair close to the fruit and not next to the refrigerator"
    asked = "Output the bounding box of the chair close to the fruit and not next to the refrigerator in the image."
    assert prompt(data[0]) == asked
    own = real(data_dir, "refexp:refexp/refcocos/refcocos.jsonl?prompt=row")
    assert prompt(own[0]).startswith(
        "Please provide the bounding box coordinate of the region this sentence describes:"
    )


def test_normalised_boxes_agree_with_pixel_boxes(data_dir: Path, tmp_path: Path) -> None:
    pixel = real(data_dir, "refexp:refexp/refcocos/refcocos.jsonl")
    rows = [json.loads(line) for line in (data_dir / "refexp/refcocos/refcocos.jsonl").read_text().splitlines()]
    for row in rows:
        del row["solution"]
    file = tmp_path / "normalised.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    scaled = load_data(f"refexp:{file}?images={data_dir}")
    for record, twin in zip(scaled, pixel, strict=True):
        assert record.id == twin.id
        assert record.target["box"] == pytest.approx(twin.target["box"], abs=0.7)  # 0-1000 of at most 640 pixels


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("Please provide the bounding box coordinate of the region this sentence describes: the cat.", "the cat"),
        ("<image>\nOutput the bounding box of the red cup in the image.", "the red cup"),
        ("the red cup.", "the red cup"),
    ],
)
def test_the_bare_expression_is_found_in_a_question(text: str, expression: str) -> None:
    assert bare_expression(text) == expression


def test_pages_carry_their_transcripts(data_dir: Path) -> None:
    pages = real(data_dir, "ocr:ocr/pages")
    assert [page.id for page in pages] == ["phototest", "unlv_8071_093_3B"]
    assert pages[0].target["text"].startswith("This is a lot of 12 point text")
    assert prompt(pages[0]) == "OCR this image."


def test_scenes_load_by_name() -> None:
    data = load_data("scenes:grounding?n=3&seed=5")
    assert len(data) == 3
    assert data.skipped == 0
    assert data[1].task == "grounding"


COCO_CAPTIONS: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "a.png"}],
    "annotations": [{"image_id": 1, "caption": "A cat."}],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"annotations": [{"image_id": 1, "caption": "A cat."}, {"caption": "x"}]},
            "annotations number 1: needs image_id",
        ),
        (
            {"annotations": [{"image_id": 1, "caption": 5}, COCO_CAPTIONS["annotations"][0]]},
            "needs image_id and caption",
        ),
        ({"annotations": ["x", COCO_CAPTIONS["annotations"][0]]}, "got 'x'"),
        ({"images": [{"id": 1}]}, "images number 0: needs id and file_name"),
        ({"images": None}, "a list of images"),
        ({"annotations": {}}, "an object with images and annotations"),
    ],
)
def test_a_malformed_entry_of_caption_json_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({**COCO_CAPTIONS, **change}))
    with pytest.raises(DataError, match=message):
        load_data(f"captions:{file}?images=none")
    file.write_text(json.dumps(COCO_CAPTIONS))
    assert load_data(f"captions:{file}?images=none")[0].target == {"references": ["A cat."]}
    instances = {"annotations": [{"image_id": 1, "category_id": 7}], "categories": [{"id": 3, "name": "cat"}]}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    with pytest.raises(DataError, match="category_id 7 is no category"):
        load_data(f"captions:{file}?images=none&instances={tmp_path / 'instances.json'}")


def test_captions_in_the_columns_of_detailcaps(tmp_path: Path) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    file = io.BytesIO()
    Image.new("RGB", (30, 20)).save(file, "png")
    row = {"source": "coco", "image": "train2014/a.jpg", "binary": file.getvalue(), "GT_Caption_GPT4O": "A cat."}
    row |= {"GT_Caption_GPT4V": "A grey cat.", "GT_Caption_Gemini15Pro": "A cat sits."}
    pq.write_table(pa.Table.from_pylist([row, {**row, "GT_Caption_GPT4V": None}]), tmp_path / "d.parquet")
    data = load_data(f"captions:{tmp_path}/d.parquet")
    assert [len(record.target["references"]) for record in data] == [3, 2]
    assert data[0].target["references"] == ["A cat.", "A grey cat.", "A cat sits."]
    assert picture_size(data[0].images[0]) == (30, 20)
    assert "binary" not in data[0].columns


def test_detailcaps_with_pictures_in_base64(tmp_path: Path) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    file = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(file, "png")
    said = base64.b64encode(file.getvalue()).decode()
    rows = [{"binary": text, "GT_Caption_GPT4O": "A cat."} for text in (said, f"data:image/png;base64,{said}")]
    rows.append({**rows[0], "binary": "\n".join(said[i : i + 76] for i in range(0, len(said), 76))})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("d.parquet", "d.jsonl"):
        data = load_data(f"captions:{tmp_path}/{name}")
        assert [picture_size(record.images[0]) for record in data] == [(30, 20)] * 3
        assert [open_picture(record.images[0]).getpixel((3, 3)) for record in data] == [(255, 0, 0)] * 3
    (tmp_path / "d.jsonl").write_text(json.dumps({**rows[0], "binary": "A" * 80_024}))
    with pytest.raises(DataError) as error:
        load_data(f"captions:{tmp_path}/d.jsonl")
    assert "binary is neither a file's name nor a picture in base64, but a text of 80,024 characters" in str(
        error.value
    )
    assert len(str(error.value)) < 500


def test_captions_say_which_columns_they_want(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"caption": "A cat."}))
    with pytest.raises(
        DataError, match="no references, captions, human_captions or GT_Caption_GPT4O, GT_Caption_GPT4V"
    ):
        load_data(f"captions:{tmp_path}/c.jsonl?images=none")
    empty = {"GT_Caption_GPT4O": None, "GT_Caption_GPT4V": " ", "GT_Caption_Gemini15Pro": float("nan")}
    rows = [empty, {**empty, "GT_Caption_GPT4V": "A cat."}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_data(f"captions:{tmp_path}/c.jsonl?images=none")
    assert [record.target["references"] for record in data] == [["A cat."]]
    assert data.reasons == {"no references": 1}
