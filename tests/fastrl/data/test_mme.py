"""MME as a folder, as it was released, and as rows; two questions about each picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastrl.data import DataError, load_data

ROW = {
    "question_id": "color/7.png",
    "image": "7.png",
    "question": "Is it red? Please answer yes or no.",
    "answer": "Yes",
}
PAIR = ({**ROW, "category": "color"}, {**ROW, "category": "color", "question": "Is it blue?", "answer": "No"})


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """Both forms of folders: pictures beside the texts, and in a folder of their own."""
    home = tmp_path / "MME"
    for folder in ("color", "artwork/images", "artwork/questions_answers_YN"):
        (home / folder).mkdir(parents=True)
    Image.new("RGB", (30, 20)).save(home / "color/7.jpg")
    Image.new("RGB", (30, 20)).save(home / "artwork/images/1.png")
    (home / "color/7.txt").write_text("Is it red?\tYes\nIs it blue?\tNo\n")
    (home / "artwork/questions_answers_YN/1.txt").write_text("Is it old?\tNo\nIs it new?\tYes\n")
    return home


def write(folder: Path, *rows: dict[str, Any]) -> str:
    Image.new("RGB", (30, 20)).save(folder / "7.png")
    (folder / "mme.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"mme:{folder}/mme.jsonl"


def test_the_released_folder(released: Path) -> None:
    data = load_data(f"mme:{released}")
    assert [record.id for record in data] == ["artwork/1/1", "artwork/1/2", "color/7/1", "color/7/2"]
    assert [record.target["answer"] for record in data] == ["no", "yes", "yes", "no"]
    assert [record.target["groups"]["mme"] for record in data] == ["artwork/1"] * 2 + ["color/7"] * 2
    assert [record.target["type"] for record in data] == ["artwork", "artwork", "color", "color"]
    assert {Path(str(record.images[0])) for record in data} == {
        released / "artwork/images/1.png",
        released / "color/7.jpg",
    }
    assert data[2].messages[0]["content"][-1]["text"] == "Is it red?"


def test_rows(tmp_path: Path) -> None:
    data = load_data(write(tmp_path, *PAIR))
    assert [record.id for record in data] == ["color/7.png/1", "color/7.png/2"]
    assert [len(record.images) for record in data] == [1, 1]
    (tmp_path / "7.png").unlink()
    assert [record.images for record in load_data(f"mme:{tmp_path}/mme.jsonl?images=none")] == [(), ()]


@pytest.mark.parametrize(
    ("rows", "query", "message"),
    [
        (PAIR[:1], "", r"mme\.jsonl:color/7\.png: 1 readable questions about a picture that has two in MME"),
        ((*PAIR, PAIR[0]), "", "3 readable questions about a picture"),
        (({**PAIR[0], "answer": "maybe"},), "", r"mme\.jsonl:1: answer must be Yes or No, got 'maybe'"),
        (({**PAIR[0], "category": None},), "", "category must be a string"),
        (({**PAIR[0], "question_id": None},), "", "question_id must be a string or an integer"),
        (({**PAIR[0], "image": "8.png"},), "", "image not found"),
        (PAIR, "?limit=3", "limit must be even, got 3"),
        (PAIR, "?seed=3", "unknown option 'seed'"),
    ],
)
def test_bad_rows(rows: tuple[dict[str, Any], ...], query: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_data(write(tmp_path, *rows) + query)


def test_a_picture_with_one_bad_question_is_skipped_as_a_whole(tmp_path: Path) -> None:
    """Else its other question would count as a pair by itself in accuracy+."""
    other = [{**row, "question_id": "8.png"} for row in PAIR]
    data = load_data(write(tmp_path, *PAIR, other[0], {**other[1], "answer": "maybe"}), skip_bad=True)
    assert [record.id for record in data] == ["color/7.png/1", "color/7.png/2"]
    assert data.reasons == {"wrong answer": 1, "unpaired question": 1}


def test_bad_folders(released: Path) -> None:
    (released / "color/7.txt").write_text("Is it red?\n")
    with pytest.raises(DataError, match=r"color/7\.txt:1: expected question<TAB>answer"):
        load_data(f"mme:{released}")
    with pytest.raises(DataError, match="images is for row files"):
        load_data(f"mme:{released}?images={released}")
    with pytest.raises(DataError, match=r"no CATEGORY/NAME\.txt"):
        load_data(f"mme:{released / 'artwork/images'}")


def test_odd_forms_of_the_same_values(tmp_path: Path) -> None:
    rows = [{**PAIR[0], "question_id": 7, "answer": "yes."}, {**PAIR[1], "question_id": 7.0, "answer": " NO "}]
    data = load_data(write(tmp_path, *rows))
    assert [record.id for record in data] == ["color/7/1", "color/7/2"]
    assert [record.target["answer"] for record in data] == ["yes", "no"]
    with pytest.raises(DataError, match="question_id must be a string or an integer, got nan"):
        load_data(write(tmp_path, {**PAIR[0], "question_id": float("nan")}))
    broken = [*PAIR, {**PAIR[0], "question_id": "8", "image": None}, {**PAIR[1], "question_id": "8"}]
    data = load_data(write(tmp_path, *broken), skip_bad=True)
    assert len(data) == 2
    assert sum(data.reasons.values()) == 2
