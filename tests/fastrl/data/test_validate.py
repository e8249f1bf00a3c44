"""Bad rows of every kind, in every adapter: reported before training, all at once, with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastrl.data import DataError, load_data, parse_spec
from fastrl.data.pictures import open_picture
from fastrl.rewards import reward_for

GOOD: dict[str, dict[str, Any]] = {
    "refexp": {"image": "a.png", "expression": "the cat", "bbox": [1, 2, 30, 20]},
    "pixmo": {"image": "a.png", "label": "cat", "count": 2, "points": {"x": [1, 2], "y": [3, 4]}},
    "ocr": {"image": "a.png", "text": "hello"},
}
BAD = [
    # adapter, changes of the valid row (None: the field is removed), kind of problem
    *((adapter, {"image": None}, "missing field") for adapter in GOOD),
    *((adapter, {"image": "gone.png"}, "missing image") for adapter in GOOD),
    *((adapter, {"image": "https://example.org/a.png"}, "missing image") for adapter in GOOD),
    *((adapter, {"image": "a\0.png"}, "missing image") for adapter in GOOD),
    *((adapter, {"image": "a" * 5000}, "missing image") for adapter in GOOD),  # a name that no file can have
    *((adapter, {"image": 7}, "wrong type") for adapter in GOOD),
    *((adapter, {"image": "broken.png"}, "bad image") for adapter in GOOD),
    *((adapter, {"image": "thin.png"}, "bad image") for adapter in GOOD),
    *((adapter, {"id": [1]}, "wrong type") for adapter in GOOD),
    *((adapter, {"width": 41, "height": 30}, "wrong size") for adapter in GOOD),
    ("refexp", {"expression": " "}, "empty expression"),
    ("refexp", {"expression": None}, "missing field"),
    ("refexp", {"expression": ["cat"]}, "wrong type"),
    ("refexp", {"bbox": None}, "missing field"),
    ("refexp", {"bbox": [1, 2, 3]}, "wrong type"),
    ("refexp", {"bbox": "1,2,3,4"}, "wrong type"),
    ("refexp", {"bbox": [1, 2, "3", 4]}, "not a number"),
    ("refexp", {"bbox": [1, 2, True, 4]}, "not a number"),
    ("refexp", {"bbox": [1, 2, float("nan"), 4]}, "not a number"),
    ("refexp", {"bbox": [1, 2, float("inf"), 4]}, "not a number"),
    ("refexp", {"bbox": [1, 2, 10**400, 4]}, "not a number"),
    ("refexp", {"bbox": [30, 2, 1, 20]}, "inverted box"),
    ("refexp", {"bbox": [1, 2, 1, 20]}, "box without area"),
    ("refexp", {"bbox": [1, 2, 43, 20]}, "box outside"),
    ("refexp", {"bbox": [-5, 2, 10, 20]}, "box outside"),
    ("refexp", {"bbox": [40.2, 2, 40.8, 20]}, "box outside"),  # within the tolerance, but entirely outside
    ("pixmo", {"label": ""}, "empty label"),
    ("pixmo", {"count": "two"}, "wrong type"),
    ("pixmo", {"count": True}, "wrong type"),
    ("pixmo", {"count": 2.5}, "wrong type"),
    ("pixmo", {"count": float("inf")}, "wrong type"),
    ("pixmo", {"count": -1}, "wrong type"),
    ("pixmo", {"count": 3}, "count and points differ"),
    ("pixmo", {"points": {"x": [1, 2], "y": [3]}}, "wrong type"),
    ("pixmo", {"points": {"x": [1, None], "y": [3, 4]}}, "not a number"),
    ("pixmo", {"points": {"x": [1, float("nan")], "y": [3, 4]}}, "not a number"),
    ("pixmo", {"points": {"x": [1, 99], "y": [3, 4]}}, "point outside"),
    ("pixmo", {"points": "many"}, "wrong type"),
    ("pixmo", {"image": "wide.png", "points": {"x": [0.2, 0.4], "y": [0.3, 1]}}, "points in 0 to 1"),
    ("refexp", {"image": "wide.png", "bbox": [0.1, 0.2, 0.5, 0.75]}, "box in 0 to 1"),
    ("refexp", {"image": "wide.png", "solution": "<answer>[0, 0, 1, 1]</answer>", "bbox": None}, "box in 0 to 1"),
    ("refexp", {"bbox": "[1, 2, 30"}, "wrong type"),
    ("refexp", {"bbox": "[" * 10**5}, "wrong type"),
    ("ocr", {"text": "  "}, "empty text"),
    ("ocr", {"text": 5}, "wrong type"),
    ("ocr", {"text": None}, "missing field"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    Image.new("RGB", (40, 30)).save(folder / "a.png")
    Image.new("RGB", (2010, 10)).save(folder / "thin.png")
    Image.new("RGB", (640, 480)).save(folder / "wide.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    return folder


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


@pytest.mark.parametrize(("adapter", "change", "kind"), BAD)
def test_a_bad_row_is_reported_with_file_and_line_and_can_be_skipped(
    folder: Path, adapter: str, change: dict[str, Any], kind: str
) -> None:
    good = GOOD[adapter]
    bad = {k: v for k, v in {**good, **change}.items() if v is not None}
    file = write(folder, good, "", bad, good)  # the blank line counts as a line, but is not a row
    with pytest.raises(DataError) as error:
        load_data(f"{adapter}:{file}")
    assert {problem.kind for problem in error.value.problems} == {kind}
    assert all(problem.where == f"{file}:3" for problem in error.value.problems)
    assert f"{file}:3: " in str(error.value)
    data = load_data(f"{adapter}:{file}", skip_bad=True)
    assert [record.id for record in data] == ["0", "3"]
    assert (data.skipped, set(data.reasons)) == (1, {kind})
    assert data.summary.startswith("skipped 1 of 3 rows: ")
    assert f"{kind} 1" in data.summary
    assert load_data(f"{adapter}:{write(folder, good)}").summary == ""


@pytest.mark.parametrize(
    "row", ["{", "[1]", '"x"', "{'a': 1}", "[" * 10**5, '{"a":' * 10**5, '{"text": "\\ud800"}', '{"\\uDFFF": 1}']
)
@pytest.mark.parametrize("adapter", GOOD)
def test_an_unreadable_line_does_not_hide_the_others(folder: Path, adapter: str, row: str) -> None:
    file = write(folder, row, GOOD[adapter], row)
    with pytest.raises(DataError) as error:
        load_data(f"{adapter}:{file}")
    assert [problem.where for problem in error.value.problems] == [f"{file}:1", f"{file}:3"]
    assert [record.id for record in load_data(f"{adapter}:{file}", skip_bad=True)] == ["1"]


def test_image_token_mismatch_fails_at_data_load_with_the_offending_row(folder: Path) -> None:
    """An image that the processor would refuse or resize differently is reported before training."""
    rows = [GOOD["refexp"], {**GOOD["refexp"], "image": "thin.png", "bbox": [1, 2, 3, 4]}]
    file = write(
        folder, *rows, {**GOOD["refexp"], "image": "broken.png"}, {**GOOD["refexp"], "width": 80, "height": 60}
    )
    with pytest.raises(DataError) as error:
        load_data(f"refexp:{file}")
    assert [problem.where for problem in error.value.problems] == [f"{file}:{line}" for line in (2, 3, 4)]
    assert "differ by a factor of at most 200" in str(error.value)
    assert "row says 80x60 pixels" in str(error.value)


def test_all_problems_of_a_row_and_of_a_file_come_together_and_the_same_words_once(folder: Path) -> None:
    bad = {"image": "gone.png", "label": "", "count": None}
    file = write(folder, *[bad] * 30, *({**GOOD["ocr"], "image": f"{i}.png", "count": 1} for i in range(25)))
    with pytest.raises(DataError) as error:
        load_data(f"pixmo:{file}")
    assert len(error.value.problems) == 90 + 2 * 25
    lines = str(error.value).split("\n")
    assert lines[0].startswith("140 problems")
    assert lines[1] == f"30 rows: label is empty (first: {file}:1)"
    assert "… and 21 more: missing image" in lines  # gone.png and 25 others, of which five are listed
    assert f"25 rows: no label (first: {file}:31)" in lines  # independent of the picture
    assert len(lines) == 1 + 1 + 1 + 6 + 1


def test_nothing_left_is_an_error_even_when_skipping(folder: Path) -> None:
    file = write(folder, {**GOOD["ocr"], "text": ""})
    with pytest.raises(DataError, match="text is empty"):
        load_data(f"ocr:{file}", skip_bad=True)
    with pytest.raises(DataError, match="no rows"):
        load_data(f"ocr:{write(folder, '')}")


def test_ids_are_the_rows_own_and_unique(folder: Path) -> None:
    rows = [{**GOOD["ocr"], "id": "x"}, {**GOOD["ocr"], "id": 7}, {**GOOD["ocr"], "id": "x"}, GOOD["ocr"]]
    file = write(folder, *rows)
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: id 'x' is already the id of {file}:1"):
        load_data(f"ocr:{file}")
    data = load_data(f"ocr:{file}", skip_bad=True)
    assert [record.id for record in data] == ["x", "7", "3"]


def test_other_spellings_of_good_rows(folder: Path) -> None:
    points = [{"x": 1, "y": 3}, {"x": 2.5, "y": 40.2 - 10}]
    file = write(folder, {**GOOD["pixmo"], "points": points}, {**GOOD["pixmo"], "points": None})
    data = load_data(f"pixmo:{file}")
    assert data[0].target["points"] == [(1, 3), (2.5, 30)]  # 0.2 pixels outside is rounding, and clipped
    assert data[1].target["points"] is None
    listed = folder / "list.json"
    listed.write_text(json.dumps([GOOD["refexp"], {**GOOD["refexp"], "bbox": None}]))
    assert [r.id for r in load_data(f"refexp:{listed}")] == ["0"]
    wide = write(folder, {**GOOD["refexp"], "bbox": [1, 2, 30, 20]})
    assert load_data(f"refexp:{wide}?box=xywh")[0].target["box"] == (1, 2, 31, 22)
    marked = folder / "marked.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD["ocr"]).encode() + b"\r\n")
    assert load_data(f"ocr:{marked}")[0].target["text"] == "hello"
    separators = write(folder, json.dumps({**GOOD["ocr"], "text": "a\u2028b"}, ensure_ascii=False))
    assert load_data(f"ocr:{separators}")[0].target["text"] == "a\u2028b"  # a line break for Python, but not in JSONL


def test_images_option_and_default_folder(folder: Path, tmp_path: Path) -> None:
    deep = tmp_path / "x" / "y"
    deep.mkdir(parents=True)
    file = write(deep, GOOD["ocr"])
    assert len(load_data(f"ocr:{file}?images={folder}")) == 1
    with pytest.raises(DataError, match="image not found"):
        load_data(f"ocr:{file}")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert load_data(f"ocr:{file}")[0].images == (tmp_path / "a.png",)  # in a parent folder
    with pytest.raises(DataError, match="images folder not found"):
        load_data(f"ocr:{file}?images={tmp_path}/none")


TRUTHS: list[tuple[str, str, Any, Any]] = [
    # adapter, column, its value as a list or a number, the expected target
    ("refexp", "bbox", [1, 2, 30, 20], {"box": (1, 2, 30, 20)}),
    ("refexp", "solution", [1, 2, 30, 20], {"box": (1, 2, 30, 20)}),
    ("refexp", "normalized_solution", [250, 500, 750, 1000], {"box": (10, 15, 30, 30)}),
    ("pixmo", "count", 2, {"count": 2}),
    ("pixmo", "points", [[1, 3], [2, 4]], {"points": [(1, 3), (2, 4)]}),
    ("pixmo", "points", {"x": [1, 2], "y": [3, 4]}, {"points": [(1, 3), (2, 4)]}),
    ("pixmo", "points", [{"x": 1, "y": 3}, {"x": 2, "y": 4}], {"points": [(1, 3), (2, 4)]}),
]


@pytest.mark.parametrize(("adapter", "column", "value", "want"), TRUTHS)
@pytest.mark.parametrize("form", ["{}", " {} ", "<answer>{}</answer>", " <Answer>\n{}\n</ANSWER>\n"])
def test_json_text_means_the_same_in_every_truth_column(
    folder: Path, adapter: str, column: str, value: Any, want: dict[str, Any], form: str
) -> None:
    row = {k: v for k, v in GOOD[adapter].items() if k != "bbox"}
    file = write(folder, {**row, column: value}, {**row, column: form.format(json.dumps(value))})
    plain, text = load_data(f"{adapter}:{file}")
    assert plain.target == text.target
    assert {key: plain.target[key] for key in want} == want


def test_counts_and_points_as_pixmo_writes_them(folder: Path) -> None:
    rows = [{**GOOD["pixmo"], "count": count} for count in (2, 2.0, "2", "2.0")]
    unknown = [None, [], {"x": [], "y": []}, "null", "[]"]
    rows += [{**GOOD["pixmo"], "points": points} for points in unknown]
    rows += [{**GOOD["pixmo"], "count": 0, "points": []}]
    data = load_data(f"pixmo:{write(folder, *rows)}")
    assert [r.target["count"] for r in data] == [2] * 9 + [0]
    assert [r.target["points"] for r in data] == [[(1, 3), (2, 4)]] * 4 + [None] * 5 + [[]]


@pytest.mark.parametrize(("frame", "whole"), [("unit", 1), ("thousand", 1000)])
def test_frames_of_boxes_and_points_are_read_when_said(folder: Path, frame: str, whole: int) -> None:
    box = [0.25 * whole, 0.5 * whole, 0.5 * whole, whole]
    file = write(folder, {**GOOD["refexp"], "image": "wide.png", "bbox": box})
    assert load_data(f"refexp:{file}?frame={frame}")[0].target["box"] == pytest.approx((160, 240, 320, 480))
    points = [[0.25 * whole, 0.5 * whole], [whole, 0]]
    file = write(folder, {**GOOD["pixmo"], "image": "wide.png", "points": points})
    assert load_data(f"pixmo:{file}?frame={frame}")[0].target["points"] == [(160, 240), (640, 0)]
    file = write(folder, {**GOOD["refexp"], "image": "wide.png", "bbox": [0, 0, whole, 1.1 * whole]})
    with pytest.raises(DataError, match=f"outside 0 to {whole} of the image of 640x480"):
        load_data(f"refexp:{file}?frame={frame}")


@pytest.mark.parametrize(
    ("column", "text", "refused"),
    [
        ("problem", "Please provide the bounding box of the main object.", True),
        ("expression", "Locate the object", True),
        ("expression", "What is in the picture?", True),
        ("expression", "person", False),  # a data set with a single class asks the same question for every picture
        ("expression", "the red car", False),
    ],
)
def test_one_instruction_in_every_row_is_no_expression(folder: Path, column: str, text: str, refused: bool) -> None:
    row = {"image": "a.png", "bbox": [1, 2, 30, 20], column: text}
    file = write(folder, row, {**row, "bbox": [5, 5, 9, 9]}, row)
    if not refused:
        assert len(load_data(f"refexp:{file}")) == 3
        return
    with pytest.raises(DataError, match=r"the expression is .* in all 3 rows.*the columns expression, normal_caption"):
        load_data(f"refexp:{file}", skip_bad=True)
    file = write(folder, row, {**row, column: "the red car"})
    assert len(load_data(f"refexp:{file}")) == 2


# ---- options for reading pictures


def turned(folder: Path, orientation: int = 6) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 30)).save(folder / "turned.jpg", exif=exif)


def test_exif_is_named_where_sizes_disagree_warned_of_once_where_none_are_given_and_read_when_asked(
    folder: Path,
) -> None:
    turned(folder)
    row = {"image": "turned.jpg", "text": "hello"}
    stored, seen = {**row, "width": 40, "height": 30}, {**row, "width": 30, "height": 40}
    file = write(folder, stored)
    assert load_data(f"ocr:{file}").summary == ""
    with pytest.raises(DataError, match=r"turned\.jpg has 30x40 .*its EXIF tag .* orient=exif applies"):
        load_data(f"ocr:{file}?orient=exif")
    file = write(folder, seen)
    with pytest.raises(DataError, match=r"row says 30x40 pixels, .*turned\.jpg has 40x30 .*EXIF.*add orient=exif"):
        load_data(f"ocr:{file}")
    record = load_data(f"ocr:{file}?orient=exif")[0]
    assert open_picture(record.images[0]).size == (30, 40)
    file = write(folder, row, {**row, "text": "again"}, GOOD["ocr"])
    data = load_data(f"ocr:{file}")
    assert len(data.notes) == 1
    assert data.summary.count("EXIF") == 1
    assert "orient=exif" in data.summary
    assert load_data(f"ocr:{file}?orient=exif").notes == ()
    turned(folder, orientation=3)  # upside down: the size is the same
    assert load_data(f"ocr:{write(folder, row)}").notes


def test_an_over_large_picture_is_a_bad_row_that_names_limit_and_key(folder: Path) -> None:
    file = write(folder, GOOD["ocr"], {**GOOD["ocr"], "image": "wide.png"})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: image of 640x480.*300,000.*data\.max_image_pixels"):
        load_data(f"ocr:{file}?max_image_pixels=300000")
    assert len(load_data(f"ocr:{file}?max_image_pixels=307200")) == 2
    with pytest.raises(DataError, match="max_image_pixels must be an integer of at least 1"):
        load_data(f"ocr:{file}?max_image_pixels=0")
    data = load_data(f"ocr:{file}?max_image_pixels=300000", skip_bad=True)
    assert data.reasons == {"bad image": 1}


# ---- COCO


def instances(**change: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 5, "file_name": "a.png", "width": 40, "height": 30}, {"id": 6, "file_name": "a.png"}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {"id": 10, "image_id": 5, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0},
            {"id": 11, "image_id": 6, "category_id": 3, "bbox": [1, 2, 3, 4], **change},
        ],
    }


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"bbox": [1, 2, 0, 4]}, "box without area"),
        ({"bbox": [1, 2, -3, 4]}, "inverted box"),
        ({"bbox": [30, 2, 30, 4]}, "box outside"),
        ({"bbox": [1, 2, float("nan"), 4]}, "not a number"),
        ({"bbox": None}, "wrong type"),
        ({"category_id": 2}, "unknown category"),
        ({"category_id": [1]}, "unknown category"),
        ({"image_id": 9}, "unknown image"),
        ({"iscrowd": 2}, "wrong type"),
        ({"category_id": True}, "unknown category"),
        ({"image_id": True}, "unknown image"),
        ({"area": -4}, "wrong type"),
        ({"area": "12"}, "wrong type"),
        ({"id": 10}, "repeated annotation"),
        ({"id": [1]}, "wrong type"),
    ],
)
def test_a_bad_coco_annotation_is_named_and_skips_its_image(folder: Path, change: dict, kind: str) -> None:
    file = write(folder, instances(**change), name="instances.json")
    with pytest.raises(DataError, match=r"instances\.json:annotation .* \(number 1\)") as error:
        load_data(f"coco:{file}")
    assert [problem.kind for problem in error.value.problems] == [kind]
    data = load_data(f"coco:{file}", skip_bad=True)
    assert [record.id for record in data] == (["5", "6"] if kind == "unknown image" else ["5"])
    assert data.reasons == {kind: 1}


def test_coco_annotations_that_say_the_same_again_are_named(folder: Path) -> None:
    content = instances()
    content["annotations"].append({**content["annotations"][0], "id": 12})
    with pytest.raises(DataError, match=r"annotation 12 \(number 2\): same content as number 0"):
        load_data(f"coco:{write(folder, content, name='instances.json')}")


def test_a_supercategory_without_instances_is_left_out_and_counted(folder: Path) -> None:
    content = instances()
    content["categories"] = [
        {"id": 0, "name": "animals", "supercategory": "none"},  # as annotation tools export it
        {"id": 1, "name": "cat", "supercategory": "animals"},
        {"id": 3, "name": "dog", "supercategory": "dog"},
        {"id": 4, "name": "emu", "supercategory": "animals"},  # no instance, but not a crowd
    ]
    data = load_data(f"coco:{write(folder, content, name='instances.json')}")
    assert data[0].target["categories"] == ["cat", "dog", "emu"]
    assert data.reasons == {"supercategory": 1}
    content["annotations"][1]["category_id"] = 0
    data = load_data(f"coco:{write(folder, content, name='instances.json')}")
    assert data[0].target["categories"] == ["animals", "cat", "dog", "emu"]
    assert data.reasons == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "unreadable JSON"),
        ("[]", "no list 'images'"),
        ({"images": [], "annotations": []}, "no list 'categories'"),
        ({"images": [], "annotations": [], "categories": [{"id": 1}]}, "needs an id and a name"),
        ({"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}] * 2}, "twice"),
        ({"images": [], "annotations": [], "categories": []}, "holds no rows"),
        ({"images": [1], "annotations": [], "categories": []}, "must be an object"),
        ({"images": [{"file_name": "a.png"}], "annotations": [], "categories": []}, "no id"),
        ({"images": [{"id": 1, "file_name": "gone.png"}], "annotations": [], "categories": []}, "image not found"),
        ({"images": [{"id": 1, "file_name": "a.png"}] * 2, "annotations": [], "categories": []}, "already the id"),
    ],
)
def test_a_bad_coco_file_says_what_is_wrong(folder: Path, content: Any, message: str) -> None:
    file = write(folder, content, name="instances.json")
    with pytest.raises(DataError, match=message):
        load_data(f"coco:{file}")


def test_a_page_without_a_readable_transcript_is_reported(folder: Path, tmp_path: Path) -> None:
    for name in ("p1", "p2", "p3", "p4"):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{name}.png")
    (tmp_path / "p1.txt").write_text("page one\n")
    (tmp_path / "p2.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "p3.txt").write_text(" \n")
    with pytest.raises(DataError) as error:
        load_data(f"ocr:{tmp_path}")
    assert [problem.kind for problem in error.value.problems] == ["unreadable file", "empty text", "missing file"]
    assert [record.id for record in load_data(f"ocr:{tmp_path}", skip_bad=True)] == ["p1"]


# ---- the spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("refex:x.jsonl", "did you mean 'refexp'"),
        ("x", "adapter:path"),
        ("x.parquet?images=y", r"did you mean rows:x.parquet\?images=y\? It recognises"),
        ("ocr:", "no path"),
        ("ocr:?limit=3", "no path"),
        ("ocr:none.jsonl", "no such file"),
        ("refexp:.", "is a folder"),
        ("ocr:rows.jsonl?imags=x", "unknown option 'imags' of ocr; did you mean 'images'"),
        ("ocr:rows.jsonl?limit", "must be key=value"),
        ("ocr:rows.jsonl?limit=1&limit=2", "each key once"),
        ("ocr:rows.jsonl?limit=0", "limit must be an integer of at least 1, got '0'"),
        ("ocr:rows.jsonl?limit=many", "got 'many'"),
        ("refexp:rows.jsonl?box=yxyx", "box must be one of xyxy, xywh"),
        ("coco:instances.json?categories=cats", "did you mean 'cat'"),
        ("ocr:.?images=x", "for row files"),
    ],
)
def test_a_wrong_spec_gets_the_nearest_valid_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    write(folder, GOOD["ocr"])
    write(folder, instances(), name="instances.json")
    monkeypatch.chdir(folder)
    with pytest.raises(DataError, match=message):
        load_data(spec)


def test_spec_values_are_percent_decoded_and_plus_is_plus() -> None:
    assert parse_spec("ocr:a b/c?images=x%26y+z&limit=3") == ("ocr", "a b/c", {"images": "x&y+z", "limit": "3"})


def test_a_row_that_is_of_no_use_to_its_reader_is_a_bad_one(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    rows: list[dict[str, Any]] = [
        {"image": "a.png", "label": "cat", "count": 1, "points": points} for points in ([{"x": 1, "y": 2}], None)
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec, misfit = f"pixmo:{tmp_path / 'p.jsonl'}", reward_for("counting").misfit
    assert len(load_data(spec)) == 2
    with pytest.raises(DataError, match=r"p\.jsonl:2: .*has only a count"):
        load_data(spec, misfit=misfit)
    kept = load_data(spec, misfit=misfit, skip_bad=True)
    assert (len(kept), kept.skipped, kept.reasons) == (1, 1, {"no truth": 1})


def test_nulls_and_sizes_of_coco_files_as_tables_write_them(folder: Path) -> None:
    file = folder / "nulls.json"
    found = instances(iscrowd=None, area=None, id=None)
    found["images"][0] |= {"width": "40", "height": 30.0}
    file.write_text(json.dumps(found))
    assert [record.target["crowd"] for record in load_data(f"coco:{file}")] == [[False], [False]]
    for change, message in (
        ({"id": None}, "no id"),
        ({"width": "wide"}, r"width and height must be whole numbers of pixels, got \['wide', 30\]"),
    ):
        found = instances()
        found["images"][0] |= change
        file.write_text(json.dumps(found))
        with pytest.raises(DataError, match=message):
            load_data(f"coco:{file}")


def test_one_annotation_written_in_two_ways_is_repeated(folder: Path) -> None:
    found = instances()
    found["annotations"].append({**found["annotations"][0], "id": 99, "bbox": [1.0, 2.0, 3.0, 4.0], "iscrowd": None})
    (folder / "twice.json").write_text(json.dumps(found))
    with pytest.raises(DataError, match=r"annotation 99 .*same content as number 0"):
        load_data(f"coco:{folder / 'twice.json'}")
