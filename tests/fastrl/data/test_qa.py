"""NExT-QA and POPE on their real files, with and without pictures, and every kind of bad row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastrl.answers import format_answer
from fastrl.data import DataError, load_data

HEAD = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
ROW = "v1,30,640,480,what happens,{answer},{qid},TN,one,two,three,four,five\n"


def test_next_qa_s_rows_with_letters(data_dir: Path) -> None:
    rows = load_data(f"nextqa:{data_dir}/video/nextqa/val_sample.csv")
    assert len(rows) == 186
    first = rows[0]
    assert first.id == "5833145209_5"
    assert first.images == ()
    assert first.target["choices"][0] == "drink water"
    assert first.target["type"] == "CW"
    (part,) = first.messages[0]["content"]
    assert "\nA. drink water\nB. look down\n" in part["text"]
    assert format_answer("qa", first.target) == "A"
    assert {r.target["type"][0] for r in rows} == {"C", "T", "D"}
    assert len({r.target["video"] for r in rows}) == 20


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_pope_s_rows(split: str, data_dir: Path) -> None:
    rows = load_data(f"pope:{data_dir}/text/pope_coco_{split}.jsonl")
    assert len(rows) == 180
    assert sum(r.target["answer"] == "yes" for r in rows) == 90
    assert format_answer("qa", rows[0].target) == rows[0].target["answer"]
    assert rows[0].messages[0]["content"][0]["text"].endswith("? Answer yes or no.")


def test_pope_with_its_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg")
    file = tmp_path / "p.jsonl"
    file.write_text('{"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "no"}\n')
    (row,) = load_data(f"pope:{file}?images={tmp_path}")
    assert row.images == (tmp_path / "a.jpg",)
    assert [part["type"] for part in row.messages[0]["content"]] == ["image", "text"]
    file.write_text('{"question_id": 1, "image": "b.jpg", "text": "Is there a dog?", "label": "no"}\n')
    with pytest.raises(DataError, match="image not found"):
        load_data(f"pope:{file}?images={tmp_path}")


@pytest.mark.parametrize("layout", ["v1", "0042/v1"])
def test_next_qa_with_folders_of_frames(layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "videos" / layout
    folder.mkdir(parents=True)
    for n in range(10):
        Image.new("RGB", (28, 28), (20 * n, 0, 0)).save(folder / f"{n}.png")
    file = tmp_path / "q.csv"
    file.write_text(HEAD + ROW.format(answer=4, qid=7))
    (row,) = load_data(f"nextqa:{file}?videos={tmp_path}/videos&frames=5&fps=2")
    assert [Path(str(image)).name for image in row.images] == ["0.png", "2.png", "4.png", "6.png", "8.png"]
    content = row.messages[0]["content"]
    assert [part.get("text", "image") for part in content[:4]] == ["Frame1 0s:", "image", "Frame2 1s:", "image"]
    assert content[-1]["text"].startswith("what happens\nA. one")
    (plain,) = load_data(f"nextqa:{file}?videos={tmp_path}/videos&frames=5")
    assert [part["type"] for part in plain.messages[0]["content"]] == ["image"] * 5 + ["text"]
    file.write_text(HEAD + ROW.format(answer=4, qid=7) + ROW.replace("v1", "v2").format(answer=1, qid=8))
    with pytest.raises(DataError, match=r"q\.csv:3: no video or folder of frames 'v2'"):
        load_data(f"nextqa:{file}?videos={tmp_path}/videos")
    assert len(load_data(f"nextqa:{file}?videos={tmp_path}/videos", skip_bad=True)) == 1


def test_next_qa_with_a_video_file(data_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "v1.mp4").symlink_to(data_dir / "video/files/mmtracking_demo.mp4")
    file = tmp_path / "q.csv"
    file.write_text(HEAD + ROW.format(answer=0, qid=1))
    (row,) = load_data(f"nextqa:{file}?videos={tmp_path}&frames=2")
    assert [image.size for image in row.images] == [(1920, 1080)] * 2  # type: ignore[union-attr]
    assert row.messages[0]["content"][0]["text"].startswith("Frame1 ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + ROW.format(answer=5, qid=1), r"q\.csv:2: answer must be the place of an option, 0 to 4; got '5'"),
        (HEAD + ROW.format(answer="x", qid=1), "answer must be the place of an option"),
        (HEAD + ROW.format(answer="", qid=1), "answer is empty"),
        (HEAD + "v1,1\n", "13 columns, got 2"),
        (HEAD + ROW.format(answer=1, qid=1) * 2, "id 'v1_1' is already the id"),
        ("video,question\n", "no column answer, qid, type"),
        ("", "no column video"),
        (HEAD, "holds no rows"),
        (HEAD.replace(",a1,a2,a3,a4", "") + "v,1,1,1,q,0,1,TN,one\n", "needs the options a0, a1, …; found 1"),
    ],
)
def test_bad_next_qa_rows(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "q.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        load_data(f"nextqa:{file}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label": "perhaps"}, "label must be yes or no, got 'perhaps'"),
        ({"label": None}, "label must be a string"),
        ({"text": ""}, "text is empty"),
        ({"question_id": [1]}, "question_id must be a non-empty string or an integer"),
    ],
)
def test_bad_pope_rows(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    row = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "no", **fields}
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        load_data(f"pope:{file}")


def test_unknown_options_name_the_nearest(data_dir: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'videos'"):
        load_data(f"nextqa:{data_dir}/video/nextqa/val_sample.csv?video=x")
    with pytest.raises(DataError, match="videos folder not found"):
        load_data(f"nextqa:{data_dir}/video/nextqa/val_sample.csv?videos=/none")


def test_numbers_as_pandas_writes_them(tmp_path: Path) -> None:
    (tmp_path / "n.csv").write_text(HEAD + ROW.format(answer="2.0", qid=1))
    assert load_data(f"nextqa:{tmp_path}/n.csv")[0].target["answer"] == 2
    (tmp_path / "n.csv").write_text(HEAD + ROW.format(answer="1.5", qid=1))
    with pytest.raises(DataError, match=r"answer must be the place of an option, 0 to 4; got '1\.5'"):
        load_data(f"nextqa:{tmp_path}/n.csv")
    row = {"question_id": 3.0, "image": "a.jpg", "text": "Is there a dog?", "label": "No."}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    (record,) = load_data(f"pope:{tmp_path}/p.jsonl")
    assert (record.id, record.target["answer"]) == ("3", "no")
