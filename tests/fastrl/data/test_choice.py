"""Multiple-choice benchmarks in the layouts in which they are published."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastrl.data import DataError, Record, load_data
from fastrl.data.pictures import picture_size

MMBENCH = {"index": "7", "question": "Which?", "hint": "Look.", "A": "cat", "B": "dog", "C": "", "D": "", "answer": "B"}
SEED = {"question_id": 5, "question": "How many?", "answer": "C", "data_id": "a", "data_type": "image"}
SEED |= {"question_type_id": 2, **{f"choice_{letter}": letter.upper() * 2 for letter in "abcd"}}
AI2D = {"question": "What?", "options": ["2", "1", "0"], "answer": "1", "image": "a.png"}
MVBENCH = {"video": "v1.mp4", "question": "What happens?", "candidates": ["one", "2", "three"], "answer": "2"}
VIDEO_MME = {"videoID": "v1", "question_id": "001-1", "question": "Who?", "options": ["A. Ann.", "B. Bob.", "C. C."]}
VIDEO_MME |= {"answer": "C", "task_type": "OCR Problems", "duration": "short"}


def png(size: tuple[int, int] = (30, 20)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "png")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").write_bytes(png())
    (tmp_path / "a.png").write_bytes(png())
    for n in range(10):
        (tmp_path / "videos/v1").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"videos/v1/{n}.png").write_bytes(png())
    return tmp_path


def write(folder: Path, value: Any, name: str = "q.json") -> str:
    (folder / name).write_text(json.dumps(value))
    return f"choice:{folder}/{name}"


def tsv(folder: Path, *rows: dict[str, str], name: str = "mmbench.tsv") -> str:
    lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    (folder / name).write_text("\n".join(lines) + "\n")
    return f"choice:{folder}/{name}"


def text(record: Record) -> str:
    return record.messages[0]["content"][-1]["text"]


def test_mmbench_with_pictures_in_its_cells(folder: Path) -> None:
    picture = base64.b64encode(png((41, 31)) + bytes(200_000)).decode()  # longer than csv's usual limit
    first = {**MMBENCH, "category": "identity", "image": picture}
    second = {**first, "index": "1000007", "answer": "A", "image": "7"}  # shows the picture of row 7
    data = load_data(tsv(folder, first, second))
    assert [record.id for record in data] == ["7", "1000007"]
    assert [record.target["answer"] for record in data] == [1, 0]
    assert [picture_size(record.images[0]) for record in data] == [(41, 31)] * 2
    assert data[0].target["choices"] == ["cat", "dog"]
    assert data[0].target["type"] == "identity"
    assert text(data[0]) == "Look.\nWhich?\nA. cat\nB. dog\nAnswer with the letter of the right option."
    assert data.summary.startswith("note: ")
    assert "read as MMBench rows" in data.summary
    bare = load_data(tsv(folder, first) + "?images=none")
    assert bare[0].images == ()


def test_circular_asks_each_rotation(folder: Path) -> None:
    row = {**MMBENCH, "C": "cow", "image": base64.b64encode(png()).decode()}
    data = load_data(tsv(folder, row) + "?circular=yes")
    assert [record.id for record in data] == ["7/0", "7/1", "7/2"]
    assert all(record.target["choices"][record.target["answer"]] == "dog" for record in data)
    assert len({tuple(record.target["choices"]) for record in data}) == 3
    assert {record.target["groups"]["circular"] for record in data} == {"7"}
    assert "A. dog\nB. cow\nC. cat" in text(data[1])


def test_seed_bench_with_names_of_types(folder: Path) -> None:
    video = {**SEED, "question_id": 6, "data_type": "video"}
    spec = write(folder, {"questions": [SEED, video], "question_type": {"Instance Identity": 2}})
    data = load_data(f"{spec}?images={folder}")
    assert data.reasons == {"video": 1}
    assert data[0].id == "5"
    assert data[0].target["type"] == "Instance Identity"
    assert data[0].target["choices"] == ["AA", "BB", "CC", "DD"]
    assert data[0].target["answer"] == 2
    assert data[0].images == (folder / "a",)
    assert load_data(spec)[0].images == ()


def test_ai2d_s_answer_is_a_place(folder: Path) -> None:
    (record,) = load_data(f"{write(folder, [AI2D])}?images={folder}")
    assert record.target["answer"] == 1  # not the option "1", which is the second too, nor the text of the third
    assert record.target["choices"] == ["2", "1", "0"]
    (other,) = load_data(write(folder, [{**AI2D, "answer": 2}]))
    assert other.target["answer"] == 2


def test_mvbench_s_answer_is_a_text_and_its_file_the_type(folder: Path) -> None:
    bound = {**MVBENCH, "start": 1.0, "end": 2.0}
    spec = write(folder, [MVBENCH, bound], "action_sequence.json")
    data = load_data(spec)
    assert [record.target["answer"] for record in data] == [1, 1]
    assert data[0].target["type"] == "action_sequence"
    assert data[1].target["span"] == (1.0, 2.0)
    shown = load_data(f"{spec}?videos={folder}/videos&frames=2&fps=2")
    assert [[Path(str(i)).stem for i in record.images] for record in shown] == [["2", "7"], ["2", "3"]]
    labels = [part["text"] for part in shown[1].messages[0]["content"] if part["type"] == "text"]
    assert labels[:2] == ["Frame1 1s:", "Frame2 1.5s:"]


def test_a_part_outside_its_video_is_named(folder: Path) -> None:
    data = load_data(f"{write(folder, [{**MVBENCH, 'start': 8, 'end': 9}])}?videos={folder}/videos&fps=2")
    with pytest.raises(DataError, match=r"v1: has no frame between 8 and 9 s \(5\.00 s\)"):
        _ = data[0]
    data = load_data(f"{write(folder, [{**MVBENCH, 'start': 1, 'end': 2}])}?videos={folder}/videos")
    with pytest.raises(DataError, match="needs fps="):
        _ = data[0]


def test_a_videos_name_is_that_of_something_inside_the_folder(folder: Path) -> None:
    for name in ("../videos/v1", str(folder / "videos/v1"), ".", "./", "x" * 300):
        with pytest.raises(DataError, match="no video or folder of frames"):
            load_data(f"{write(folder, [{**MVBENCH, 'video': name}])}?videos={folder}/videos")


def test_tempcompass_in_both_forms(folder: Path) -> None:
    asked = {"question": "What moves?\nA. a dog\nB. a cat", "answer": "B. a cat"}
    yes = {"question": "Does it move?", "answer": "yes"}
    match = {"question": "Which fits?\nCaption A: It rises.\nCaption B: It falls.", "answer": "Caption A: It rises."}
    data = load_data(write(folder, {"v1": {"action": [asked, yes], "direction": [match]}}))
    assert [r.target["answer"] for r in data] == [1, "yes", 0]
    assert [r.target.get("choices") for r in data] == [["a dog", "a cat"], None, ["It rises.", "It falls."]]
    assert [r.target["type"] for r in data] == ["action", "action", "direction"]
    assert {r.target["video"] for r in data} == {"v1"}
    assert text(data[1]) == "Does it move? Answer yes or no."
    rows = [{**asked, "video_id": "v1", "dim": "action"}]
    assert load_data(write(folder, rows))[0].target == data[0].target
    (shown,) = load_data(f"{write(folder, rows)}?videos={folder}/videos&frames=3")
    assert len(shown.images) == 3


def test_video_mme_s_options_lose_their_letters(folder: Path) -> None:
    (record,) = load_data(write(folder, [VIDEO_MME]))
    assert record.id == "001-1"
    assert record.target["choices"] == ["Ann.", "Bob.", "C."]
    assert record.target["answer"] == 2
    assert record.target["type"] == "OCR Problems"
    (by,) = load_data(f"{write(folder, [VIDEO_MME])}?type=duration")
    assert by.target["type"] == "short"


def test_pictures_inside_a_table(folder: Path) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    row = {**SEED, "image": [{"bytes": png(), "path": None}]}
    pq.write_table(pa.Table.from_pylist([row]), folder / "seed.parquet")
    (record,) = load_data(f"choice:{folder}/seed.parquet")
    assert picture_size(record.images[0]) == (30, 20)
    assert record.target["type"] == "2"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**AI2D, "answer": "3"}, r"q\.json:row 1: the answer is option 3 \(from 0\), but there are 3"),
        ({**AI2D, "answer": "dog"}, "answer must be the letter of an option, got 'dog'"),
        ({**AI2D, "options": ["a"], "answer": 0}, "a question has 2 to 26 options; found 1"),
        ({**AI2D, "options": "a"}, "options must be a list of texts"),
        ({**AI2D, "question": ""}, "question is empty"),
        ({**MVBENCH, "answer": "four"}, "the answer 'four' is not one of the candidates"),
        ({**MVBENCH, "start": 3, "end": 2}, "start and end must be seconds"),
        ({**VIDEO_MME, "answer": None}, "answer must be the letter"),
        ({**SEED, "answer": "E"}, r"the answer is option 4 \(from 0\), but there are 4"),
        ({"video_id": "v", "dim": "x", "question": "Why?", "answer": "so"}, "is answered yes or no, got 'so'"),
        ({"video_id": "v", "dim": "x", "question": "Why?\nA. a\nB. b", "answer": "C. c"}, "not one of the options"),
        ({**SEED, "choice_b": ["b"]}, r"choice_b must be a text or a number, got \['b'\]"),
        ({"question": "Why?", "answer": "so"}, "columns 'question, answer': not a known benchmark"),
        ("text", "a row must be a JSON object"),
    ],
)
def test_bad_rows(row: Any, message: str, folder: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_data(write(folder, [row]))


def test_an_empty_option_before_another_is_a_bad_row(folder: Path) -> None:
    """Its letters would name other options: the answer C would be what stands under D."""
    row = {**MMBENCH, "answer": "C", "C": "", "D": "four"}
    with pytest.raises(DataError, match="option C is empty, but one after it is not"):
        load_data(tsv(folder, row))


def test_a_json_file_may_hold_a_row_a_line(folder: Path) -> None:
    (folder / "lines.json").write_text("".join(json.dumps({**AI2D, "id": n}) + "\n" for n in range(2)))
    assert [record.id for record in load_data(f"choice:{folder}/lines.json")] == ["0", "1"]


def test_a_template_for_videos_is_checked_before_their_frames_are_read(folder: Path) -> None:
    rows = [
        {"video_id": "v1", "dim": "d", "question": "Which?\nA. x\nB. y", "answer": "A. x"},
        {"video_id": "v1", "dim": "d", "question": "Is it?", "answer": "yes"},
    ]
    spec = write(folder, rows) + f"?videos={folder}/videos&prompt={{question}} {{options}}"
    with pytest.raises(DataError, match=r"row 2: prompt needs \{options\}"):
        load_data(spec)
    data = load_data(spec, skip_bad=True)
    assert (len(data), data.skipped) == (1, 1)
    assert text(data[0]) == "Which? A. x\nB. y"
    assert len(data[0].images) == 8


def test_bad_files_and_options(folder: Path) -> None:
    with pytest.raises(DataError, match=r"mmbench\.tsv:2: image is no base64"):
        load_data(tsv(folder, {**MMBENCH, "image": "%" * 80}))
    spec = tsv(folder, {**MMBENCH, "image": ""})
    (folder / "mmbench.tsv").write_text((folder / "mmbench.tsv").read_text() + "1\t2\n")
    with pytest.raises(DataError, match="9 columns, got 2"):
        load_data(spec)
    (folder / "twice.tsv").write_text("index\tquestion\tA\tA\tB\tanswer\n1\tq\ta\ta\tb\tA\n")
    with pytest.raises(DataError, match=r"twice\.tsv: column 'A' comes twice"):
        load_data(f"choice:{folder}/twice.tsv")
    with pytest.raises(DataError, match=r"expected \{video: \{aspect"):
        load_data(write(folder, {"v": 3}))
    with pytest.raises(DataError, match="questions must be a list"):
        load_data(write(folder, {"questions": 3}))
    with pytest.raises(DataError, match="videos is for questions about videos; AI2D asks about pictures"):
        load_data(f"{write(folder, [AI2D])}?videos={folder}")
    with pytest.raises(DataError, match="images is for questions about pictures; MVBench asks about videos"):
        load_data(f"{write(folder, [MVBENCH])}?images={folder}")
    with pytest.raises(DataError, match="no column 'kind', which type= names"):
        load_data(f"{write(folder, [AI2D])}?type=kind")
    with pytest.raises(DataError, match="image not found"):
        load_data(f"{write(folder, [{**AI2D, 'image': 'b.png'}])}?images={folder}")
    with pytest.raises(DataError, match="did you mean 'circular'"):
        load_data(f"{write(folder, [AI2D])}?circulr=yes")


def test_of_equal_candidates_the_last_is_right(folder: Path) -> None:
    """As MVBench's own code has it, which walks through the candidates and keeps the last that is the answer."""
    (record,) = load_data(write(folder, [{**MVBENCH, "candidates": ["a", "b", "a"], "answer": "a"}]))
    assert (record.target["answer"], record.target["choices"]) == (2, ["a", "b", "a"])
    (other,) = load_data(write(folder, [{**MVBENCH, "candidates": ["a", "b", "a"], "answer": "b"}]))
    assert other.target["answer"] == 1
    asked = {"video_id": "v", "dim": "x", "question": "Why?\nA. a\nB. a", "answer": "a"}
    with pytest.raises(DataError, match="the answer 'a' is not one option but 2 equal ones"):
        load_data(write(folder, [asked]))
    (lettered,) = load_data(write(folder, [{**asked, "answer": "B. a"}]))
    assert lettered.target["answer"] == 1


@pytest.mark.parametrize("answer", ["B", "b", "B.", "(B)", "b)", " B: "])
def test_letters_as_they_are_written(answer: str, folder: Path) -> None:
    (record,) = load_data(write(folder, [{**VIDEO_MME, "answer": answer}]))
    assert record.target["answer"] == 1


def test_what_pandas_makes_of_numbers_and_gaps(folder: Path) -> None:
    nan = float("nan")
    row = {**MMBENCH, "index": 7.0, "C": nan, "D": None, "hint": nan, "category": nan, "l2": nan}
    (record,) = load_data(write(folder, [row]))
    assert record.id == "7"
    assert record.target["choices"] == ["cat", "dog"]
    assert "type" not in record.target
    assert text(record).startswith("Which?\n")
    assert load_data(write(folder, [{**row, "index": nan}, {**row, "index": None}])).records[1].id == "1"
    (record,) = load_data(write(folder, [{**AI2D, "answer": 1.0, "options": [3.0, 1.5, None, nan], "id": 2.0}]))
    assert (record.id, record.target["answer"], record.target["choices"]) == ("2", 1, ["3", "1.5"])
    (record,) = load_data(write(folder, [{**MVBENCH, "candidates": [1.0, 2.0], "answer": 2, "start": 1, "end": 2}]))
    assert (record.target["answer"], record.target["choices"]) == (1, ["1", "2"])
    (record,) = load_data(write(folder, [{"video_id": 1052, "dim": "x", "question": "Is it?", "answer": "No."}]))
    assert (record.target["video"], record.target["answer"]) == ("1052", "no")
    for answer in (None, nan, ""):
        with pytest.raises(DataError, match=r"the answer \(none\) is not one of the candidates"):
            load_data(write(folder, [{**MVBENCH, "candidates": ["None", "nan"], "answer": answer}]))
    for odd in (True, 1.5, [1]):
        with pytest.raises(DataError, match="index must be a non-empty string or an integer"):
            load_data(write(folder, [{**row, "index": odd}]))


def test_a_missing_picture_is_no_question_without_one(folder: Path) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [{**SEED, "question_id": n, "image": image} for n, image in enumerate(([png()], None, []))]
    pq.write_table(pa.Table.from_pylist(rows), folder / "seed.parquet")
    data = load_data(f"choice:{folder}/seed.parquet", skip_bad=True)
    assert ([record.id for record in data], data.reasons) == (["0"], {"missing image": 2})
    assert len(load_data(f"choice:{folder}/seed.parquet?images=none")) == 3
    assert len(load_data(f"choice:{folder}/seed.parquet?pictures=stated")) == 3
    with pytest.raises(DataError, match=r"no image \(images=none reads the questions alone\)"):
        load_data(tsv(folder, {**MMBENCH, "image": ""}))


def test_pictures_in_base64_inside_a_table(folder: Path) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    row = {**MMBENCH, "image": base64.b64encode(png((41, 31))).decode()}
    pq.write_table(pa.Table.from_pylist([row]), folder / "mmbench.parquet")
    (record,) = load_data(f"choice:{folder}/mmbench.parquet")
    assert picture_size(record.images[0]) == (41, 31)
