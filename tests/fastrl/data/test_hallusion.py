"""HallusionBench: its pictures, its groups, and every kind of bad row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastrl.data import DataError, load_data
from fastrl.data.pictures import picture_size

ROW = {
    "category": "VD",
    "subcategory": "illusion",
    "visual_input": "1",
    "set_id": "0",
    "figure_id": "1",
    "sample_note": "circle",
    "question_id": "2",
    "question": "Is it round?",
    "gt_answer_details": "Yes.",
    "gt_answer": "1",
    "filename": "./hallusion_bench/VD/illusion/0_1.png",
}
BARE = {**ROW, "category": "VS", "visual_input": "0", "figure_id": "0", "gt_answer": "0", "filename": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures/VD/illusion").mkdir(parents=True)
    Image.new("RGB", (30, 20)).save(tmp_path / "pictures/VD/illusion/0_1.png")
    return tmp_path


def write(folder: Path, *rows: dict[str, Any]) -> str:
    (folder / "HallusionBench.json").write_text(json.dumps(rows))
    return f"hallusion:{folder}/HallusionBench.json"


def test_questions_with_and_without_a_picture(folder: Path) -> None:
    data = load_data(f"{write(folder, ROW, BARE)}?images={folder}/pictures")
    assert [record.id for record in data] == ["VD_illusion_0_1_2", "VS_illusion_0_0_2"]
    assert [record.images for record in data] == [(folder / "pictures/VD/illusion/0_1.png",), ()]
    assert [record.target["answer"] for record in data] == ["yes", "no"]
    assert data[0].target["groups"] == {"pair": "VD_illusion_0_2", "figure": "VD_illusion_0_1"}
    assert data[1].target["groups"] == {"pair": "VS_illusion_0_2"}  # no figure: none to count
    assert [record.target.get("unsure_is_right") for record in data] == [None, True]
    assert data[0].messages[0]["content"][-1]["text"] == "Is it round? Answer yes or no."
    assert load_data(write(folder, ROW))[0].images == ()


def test_pictures_inside_a_table(folder: Path) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    data = (folder / "pictures/VD/illusion/0_1.png").read_bytes()
    pq.write_table(pa.Table.from_pylist([{**ROW, "image": {"bytes": data, "path": None}}]), folder / "h.parquet")
    (record,) = load_data(f"hallusion:{folder}/h.parquet")
    assert picture_size(record.images[0]) == (30, 20)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gt_answer": "2"}, r"HallusionBench\.json:row 1: gt_answer must be 1 \(yes\) or 0 \(no\), got 2"),
        ({"gt_answer": None}, "gt_answer must be a whole number"),
        ({"category": "VX"}, "category must be one of VD, VS, got 'VX'"),
        ({"subcategory": "../secret"}, "subcategory must be the name of a folder"),
        ({"figure_id": "x"}, "figure_id must be a whole number from 0, got 'x'"),
        ({"question": " "}, "question is empty"),
        ({"set_id": "9"}, r"image not found: .*VD/illusion/9_1\.png"),
    ],
)
def test_bad_rows(fields: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_data(f"{write(folder, {**ROW, **fields})}?images={folder}/pictures")


def test_the_same_question_twice_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="id 'VD_illusion_0_1_2' is already the id"):
        load_data(write(folder, ROW, ROW))


def test_a_table_that_lacks_a_picture_asks_no_question_about_it(folder: Path) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    data = (folder / "pictures/VD/illusion/0_1.png").read_bytes()
    rows = [{**ROW, "image": data}, {**ROW, "figure_id": "2", "image": None}, {**BARE, "image": None}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "h.parquet")
    with pytest.raises(DataError, match=r"image is empty, but the question is about VD/illusion/0_2\.png"):
        load_data(f"hallusion:{folder}/h.parquet")
    found = load_data(f"hallusion:{folder}/h.parquet", skip_bad=True)
    assert [len(record.images) for record in found] == [1, 0]
    assert [record.target["group_sizes"] for record in found] == [{"pair": 2, "figure": 1}, {"pair": 1}]
    assert len(load_data(f"hallusion:{folder}/h.parquet?pictures=stated")) == 3


def test_numbers_as_pandas_writes_them(folder: Path) -> None:
    numbers = {"visual_input": 1, "set_id": 0.0, "figure_id": 1.0, "question_id": "2.0", "gt_answer": 1.0}
    (record,) = load_data(write(folder, {**ROW, **numbers}))
    (usual,) = load_data(write(folder, ROW))
    assert (record.id, record.target) == (usual.id, usual.target)
