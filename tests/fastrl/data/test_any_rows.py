"""Rows in the layouts of other trainers: every layout and every file format gives the same records."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastrl.data import DataError, Dataset, load_data, tables
from fastrl.data.identity import compare, identify
from fastrl.data.pictures import Picture, open_picture, picture_size
from fastrl.data.records import Record, question
from fastrl.data.stream import RecordStream

ASK = "Output the bounding box of the cat in the image."
BOX = [10, 20, 200, 150]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("any")
    rng = np.random.default_rng(1)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 255, (160, 240, 3), dtype=np.uint8)).save(folder / name)
    return folder


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def layouts(ask: str, truth: Any, picture: Any = "a.png") -> dict[str, dict[str, Any]]:
    """One row with this question, truth (a JSON value) and picture in every layout."""
    text = truth if isinstance(truth, str) else json.dumps(truth)
    asked = [{"role": "user", "content": f"<image>{ask}"}]
    printed = [{"from": "human", "value": f"<image>\n{ask}"}, {"from": "gpt", "value": text}]
    return {
        "EasyR1": {"images": [picture], "problem": f"<image>{ask}", "answer": text},
        "verl": {
            "data_source": "mine",
            "prompt": asked,
            "images": [picture],
            "ability": "vision",
            "reward_model": {"style": "rule", "ground_truth": text},
            "extra_info": {"index": 0},
        },
        "ms-swift": {"messages": [*asked, {"role": "assistant", "content": text}], "images": [picture]},
        "ms-swift, GRPO": {"messages": asked, "images": [picture], "solution": text},
        "TRL": {"prompt": [{"role": "user", "content": ask}], "image": picture, "solution": text},
        "TRL, text": {"prompt": ask, "images": [picture], "solution": f"<answer>{text}</answer>"},
        "VLM-R1": {
            "image": picture,
            "conversations": [printed[0], {**printed[1], "value": f"<answer> {text} </answer>"}],
        },
        "LLaVA": {"image": picture, "conversations": printed},
        "PR1": {"image": picture, "problem": ask, "solution": f"<think>so</think>\n<answer>{text}</answer>"},
    }


TRUTHS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "grounding": (ASK, BOX, {"box": (10, 20, 200, 150), "expression": "the cat"}),
    "counting": (
        "How many cats are there in the image?",
        3,
        {"label": "cats", "count": 3, "points": None, "boxes": None},
    ),
    "detection": (
        "Find cats and dogs.",
        [{"bbox_2d": BOX, "label": "cat"}, {"bbox_2d": [0, 0, 9, 9], "label": "dog"}],
        {
            "boxes": [BOX, [0, 0, 9, 9]],
            "labels": ["cat", "dog"],
            "crowd": [False, False],
            "categories": ["cat", "dog"],
        },
    ),
    "ocr": ("OCR this image.", "a [1, 2] line", {"text": "a [1, 2] line"}),
    "caption": ("Describe it.", "A cat sits.", {"references": ["A cat sits."]}),
    "qa": ("Is there a cat?", "Yes", {"answer": "yes"}),
}
TOLD = ("ocr", "caption")  # tasks that cannot be determined from a text


def plain(record: Record) -> tuple[Any, ...]:
    return record.id, record.task, record.messages, record.target


@pytest.mark.parametrize("task", TRUTHS)
@pytest.mark.parametrize("layout", layouts("", 0))
def test_every_layout_loads_to_the_same_record(folder: Path, layout: str, task: str) -> None:
    ask, truth, target = TRUTHS[task]
    file = write(folder, layouts(ask, truth)[layout])
    spec = f"rows:{file}" + (f"?task={task}" if task in TOLD else "")
    data = load_data(spec)
    want = Record("0", task, (folder / "a.png",), question(task if task != "qa" else "ocr", prompt=ask), target)
    assert plain(data[0]) == plain(want)
    assert data[0].images == want.images
    assert layout.split(",")[0].replace("PR1", "Perception-R1") in data.summary
    assert f"{task} 1" in data.summary
    assert data.skipped == 0


# ---- files


def embedded(folder: Path) -> dict[str, Any]:
    return {"bytes": (folder / "a.png").read_bytes(), "path": "a.png"}


def parquet(folder: Path, rows: list[dict[str, Any]], name: str = "t.parquet", group: int = 2) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), folder / name, row_group_size=group)
    return folder / name


def arrow(folder: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / "t.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return folder / "t.arrow"


def saved(folder: Path, rows: list[dict[str, Any]]) -> Path:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(rows)
    for column, feature in (("images", datasets.Sequence(datasets.Image())), ("image", datasets.Image())):
        if column in data.column_names:
            data = data.cast_column(column, feature)
    data.save_to_disk(folder / "saved", num_shards=2 if len(rows) > 1 else 1)
    return folder / "saved"


@pytest.mark.parametrize("make", [parquet, arrow, saved])
@pytest.mark.parametrize("layout", layouts("", 0))
def test_tables_hold_the_same_records_pictures_and_all(
    folder: Path, tmp_path: Path, make: Callable[..., Path], layout: str
) -> None:
    pytest.importorskip("pyarrow")
    rows = [layouts(ASK, BOX, embedded(folder))[layout] for _ in range(3)]
    data = load_data(f"rows:{make(tmp_path, rows)}")
    listed = load_data(f"rows:{write(folder, *[layouts(ASK, BOX)[layout]] * 3)}")
    assert [plain(r) for r in data] == [plain(r) for r in listed]
    picture = data[2].images[0]
    assert isinstance(picture, Picture)
    assert callable(picture.data)  # no part of it is kept in memory
    assert (np.asarray(open_picture(picture)) == np.asarray(open_picture(folder / "a.png"))).all()


def test_row_adapters_read_tables_too(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    image = embedded(folder)
    specs: dict[str, dict[str, Any]] = {
        "refexp": {"image": image, "expression": "the cat", "bbox": BOX},
        "pixmo": {"image": image, "label": "cat", "count": 1, "points": {"x": [1.5], "y": [2.0]}},
        "ocr": {"image": image, "text": "hello"},
        "captions": {"image": image, "references": ["a cat"]},
        "lists": {"images": [image], "prompt": "Read.", "answers": ["a", "b"], "rewards": [1.0, 0.0]},
    }
    for adapter, row in specs.items():
        data = load_data(f"{adapter}:{parquet(tmp_path, [row])}")
        assert open_picture(data[0].images[0]).size == (240, 160)
        lists = {"images": ["a.png"]} if "images" in row else {"image": "a.png"}
        assert plain(data[0]) == plain(load_data(f"{adapter}:{write(folder, {**row, **lists})}")[0])
        if adapter in ("refexp", "pixmo", "ocr"):  # the general adapter reads their rows, too
            assert plain(load_data(f"rows:{tmp_path / 't.parquet'}")[0]) == plain(data[0])


def test_columns_that_are_null_in_a_table_are_not_there(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rows = [
        {"image": "a.png", "expression": None, "normal_caption": "the cat", "bbox": None, "solution": BOX, "id": None},
        {"image": "a.png", "expression": "it", "normal_caption": None, "bbox": None, "solution": None, "id": "x"},
    ]
    data = load_data(f"refexp:{parquet(tmp_path, rows)}?images={folder}")
    assert plain(data[0])[0] == "0"
    assert data[0].target == {"box": (10, 20, 200, 150), "expression": "the cat"}
    assert data.reasons == {"no such object": 1}


def test_splits_of_a_folder_are_chosen(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    row = layouts(ASK, BOX, embedded(folder))["EasyR1"]
    parts = {"train": [row] * 3, "val": [row]}
    saved_dict = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    saved_dict.save_to_disk(tmp_path / "dict")
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    parquet(hub, parts["train"][:2], "train-00000-of-00002.parquet")
    parquet(hub, parts["train"][:1], "train-00001-of-00002.parquet")
    parquet(hub, parts["val"], "val-00000-of-00001.parquet")
    for path in (tmp_path / "dict", tmp_path / "hub"):
        with pytest.raises(DataError, match="holds the splits train, val: choose with split="):
            load_data(f"rows:{path}")
        with pytest.raises(DataError, match="no split 'vall'; did you mean 'val'"):
            load_data(f"rows:{path}?split=vall")
        assert [r.id for r in load_data(f"rows:{path}?split=train")] == ["0", "1", "2"]
        assert len(load_data(f"rows:{path}?split=val")) == 1


def test_a_shuffled_or_limited_table_is_in_the_order_of_a_shuffled_file(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rows = [{"id": f"r{i}", **layouts(ASK, BOX)["EasyR1"]} for i in range(9)]
    table, file = parquet(folder, rows, "many.parquet"), write(folder, *rows)
    for options in ("limit=4", "seed=3", "seed=3&limit=4"):
        want = [record.id for record in load_data(f"rows:{file}?{options}")]
        assert [record.id for record in load_data(f"rows:{table}?{options}")] == want


def test_a_damaged_table_or_cell_is_named(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"no\.parquet: cannot be read as a table"):
        load_data(f"rows:{tmp_path / 'no.parquet'}")
    rows = [layouts(ASK, BOX, embedded(folder))["EasyR1"] for _ in range(2)]
    rows[1]["images"] = [{"bytes": b"no picture", "path": None}]
    with pytest.raises(DataError, match=r"t\.parquet:row 2: image cannot be read: .*row 2, images\[0\]"):
        load_data(f"rows:{parquet(tmp_path, rows)}")


# ---- features of single layouts


def swift(content: str, answer: str | None, **objects: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": content}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    return {"messages": turns, "images": ["a.png"], "objects": objects}


@pytest.mark.parametrize(
    ("row", "task", "prompt", "target"),
    [
        (
            swift("<image>Find <ref-object>.", "<bbox>", ref=["the cat"], bbox=[BOX]),
            "grounding",
            "Find the cat.",
            {"box": (10, 20, 200, 150), "expression": "the cat"},
        ),
        (
            swift("<image>Find <ref-object>.", None, ref=["the cat"], bbox=[[0, 0.5, 0.5, 1]], bbox_type="norm1"),
            "grounding",
            "Find the cat.",
            {"box": (0, 80, 120, 160), "expression": "the cat"},
        ),
        (
            swift("<image>Find <ref-object>", "<bbox><bbox>", ref=["cat"], bbox=[BOX, [0, 0, 9, 9]]),
            "detection",
            "Find cat",
            {"boxes": [BOX, [0, 0, 9, 9]], "labels": ["cat", "cat"], "crowd": [False] * 2, "categories": ["cat"]},
        ),
        (
            swift("<image>Find all.", "<ref-object><bbox><ref-object><bbox>", ref=["b", "a"], bbox=[BOX, [0, 0, 9, 9]]),
            "detection",
            "Find all.",
            {"boxes": [BOX, [0, 0, 9, 9]], "labels": ["b", "a"], "crowd": [False] * 2, "categories": ["a", "b"]},
        ),
        (
            swift("<image>What is in <bbox>?", "a cat", ref=[], bbox=[BOX]),
            "caption",
            f"What is in {BOX}?",
            {"references": ["a cat"]},
        ),
    ],
)
def test_swift_objects_fill_the_prompt_and_are_the_truth(
    folder: Path, row: dict[str, Any], task: str, prompt: str, target: dict[str, Any]
) -> None:
    spec = f"rows:{write(folder, row)}" + ("?task=caption" if task == "caption" else "")
    record = load_data(spec)[0]
    assert (record.task, record.target) == (task, target)
    assert record.messages == question("ocr", prompt=prompt)


def test_pictures_stand_where_the_text_has_them(folder: Path) -> None:
    row = {"images": ["a.png", "b.png"], "problem": "First <image> then <image>: same?", "answer": "no"}
    record = load_data(f"rows:{write(folder, row)}")[0]
    kinds = [part.get("text", part["type"]) for part in record.messages[0]["content"]]
    assert kinds == ["First ", "image", " then ", "image", ": same?"]
    with pytest.raises(DataError, match="2 images, but the prompt has 1 <image> places"):
        load_data(f"rows:{write(folder, {**row, 'problem': 'Only <image>'})}")
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "same?"}]
    row = {"image": "a.png", "prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": parts}]}
    record = load_data(f"rows:{write(folder, {**row, 'solution': 'no'})}")[0]
    assert [m["role"] for m in record.messages] == ["system", "user"]
    assert record.messages[1] == question("ocr", prompt="same?")[0]


def test_dialogues_keep_their_earlier_turns(folder: Path) -> None:
    printed = ["<image>\nWhat is it?", "A cat.", "Where?", "[10, 20, 200, 150]"]
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(printed)]
    record = load_data(f"rows:{write(folder, {'image': 'a.png', 'conversations': turns})}")[0]
    assert [m["role"] for m in record.messages] == ["user", "assistant", "user"]
    assert record.target["box"] == (10, 20, 200, 150)


@pytest.mark.parametrize(
    ("change", "query", "message"),
    [
        ({"answer": "some words"}, "", r"fits no task: give task=grounding \| "),
        ({"answer": "[1, 2, 3"}, "task=grounding", "must be four numbers"),
        ({"answer": "[0.1, 0.2, 0.5, 0.9]"}, "", "within 0 to 1 on a picture of 240x160"),
        ({"answer": "many"}, "task=counting", "must be a whole number"),
        ({"answer": ...}, "", "no answer: it is the truth"),
        ({"problem": ""}, "", "problem is empty"),
        ({"images": ["gone.png"]}, "", "image not found"),
        ({"images": [7]}, "", r"images\[0\] must be a file's name"),
        ({"images": []}, "", "one or more files"),
        ({"answer": '[{"bbox": [1, 2, 3, 4]}, {"bbox": [1, 2, 3, 4]}]'}, "", "item 0 has no label"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(folder: Path, change: dict[str, Any], query: str, message: str) -> None:
    good = layouts(ASK, BOX)["EasyR1"]
    bad = {key: value for key, value in {**good, **change}.items() if value is not ...}
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{message}"):
        load_data(f"rows:{write(folder, good, bad)}?{query}")


@pytest.mark.parametrize("layout", ["EasyR1", "verl", "TRL", "PR1"])
def test_a_null_truth_is_left_out_and_counted(folder: Path, layout: str) -> None:
    good, null = layouts(ASK, BOX)[layout], layouts(ASK, BOX)[layout]
    if layout == "verl":
        null["reward_model"] = {"ground_truth": None}
    else:
        null["answer" if layout == "EasyR1" else "solution"] = None
    data = load_data(f"rows:{write(folder, good, null)}")
    assert (len(data), data.reasons) == (1, {"no truth": 1})


def test_frames_and_prompts_are_chosen(folder: Path) -> None:
    file = write(folder, layouts("Where is the cat?", [0.25, 0.5, 0.5, 1])["EasyR1"])
    record = load_data(f"rows:{file}?frame=unit")[0]
    assert record.target["box"] == (60, 80, 120, 160)
    row = {**layouts("Where?", BOX)["EasyR1"], "expression": "the cat"}
    data = load_data(f"rows:{write(folder, row)}?prompt=paper")
    assert data[0].messages == question("grounding", "cat")


def test_unknown_columns_name_what_is_known(folder: Path) -> None:
    with pytest.raises(DataError, match=r"columns picture, words: not a known layout \(verl: prompt, reward_model; "):
        load_data(f"rows:{write(folder, {'picture': 'a.png', 'words': 'x'})}")


def test_a_rows_own_columns_stay_with_its_record(folder: Path) -> None:
    data: Dataset = load_data(f"rows:{write(folder, {**layouts(ASK, BOX)['EasyR1'], 'level': 3})}")
    assert data[0].columns["level"] == 3
    assert "images" not in data[0].columns
    assert replace(data[0], columns={}) == data[0]


@pytest.mark.parametrize("look", ["stat", "bytes"])
def test_a_resume_compares_pictures_in_tables_too(folder: Path, tmp_path: Path, look: Any) -> None:
    pytest.importorskip("pyarrow")
    rows = [layouts(ASK, BOX, embedded(folder))["EasyR1"] for _ in range(3)]
    spec = f"rows:{parquet(tmp_path, rows)}"
    before = identify(load_data(spec), look)
    assert not compare(before, identify(load_data(spec), look))
    rows[1]["images"] = [{"bytes": (folder / "b.png").read_bytes(), "path": None}]
    parquet(tmp_path, rows)
    changed = compare(before, identify(load_data(spec), look)).changed["pictures"]
    assert changed == (["1"] if look == "bytes" else ["0", "1", "2"])  # one time for all rows of a file
    assert compare(before, identify(load_data(f"{spec}?orient=exif"), look)).changed["pictures"] == ["0", "1", "2"]


def test_a_bounded_shuffle_reads_each_row_group_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(tables, "CACHE_BYTES", 1)  # of one row group at a time
    rows = [layouts(ASK, BOX, embedded(folder))["EasyR1"] for _ in range(24)]
    data = load_data(f"rows:{parquet(tmp_path, rows, group=4)}")
    groups: list[int] = []
    real = tables._Parquet.value

    def value(self: Any, column: str, place: int) -> Any:
        if not groups or groups[-1] != place // 4:
            groups.append(place // 4)
        return real(self, column, place)

    monkeypatch.setattr(tables._Parquet, "value", value)
    stream = RecordStream(data, seed=3, buffer=4)
    for record in stream.take(48):
        assert picture_size(record.images[0]) == (240, 160)
    assert sorted(groups[:6]) == list(range(6))
    assert len(groups) <= 12  # two epochs of six groups


def test_tables_say_which_extra_they_need(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").touch()
    with pytest.raises(DataError, match=r"needs pyarrow: pip install 'fastrl\[data\]'"):
        load_data(f"rows:{tmp_path / 't.parquet'}")


def test_a_file_is_read_line_by_line(folder: Path) -> None:
    """Only the rows within ``limit`` are read; later ones may be invalid."""
    name = next(path.name for path in folder.iterdir() if path.suffix == ".png")
    good = json.dumps({"images": [name], "problem": "How many?", "answer": 2}).encode() + b"\r\n"
    file = folder / "long.jsonl"
    file.write_bytes(b"\xef\xbb\xbf\n" + good * 2000 + b"\xff" * 100_000)
    data = load_data(f"rows:{file}?limit=70")
    assert [record.id for record in data] == [str(number) for number in range(1, 71)]
    assert data[69].source == f"{file}:71"
    for query in ("", "?seed=1", "?limit=2001"):
        with pytest.raises(DataError, match="cannot be read as UTF-8 text"):
            load_data(f"rows:{file}{query}")
