"""RefCOCO's pickles: sentences with their boxes, and files that would run code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastrl.data import DataError, load_data
from fastrl.data.plain_pickle import read_plain_pickle

REFS = [
    {
        "ref_id": 0,
        "ann_id": 17,
        "image_id": 5,
        "category_id": 1,
        "split": "train",
        "file_name": "COCO_train2014_000000000005_0.jpg",  # as released: with the number of the annotation
        "sent_ids": [0, 1],
        "sentences": [
            {"sent_id": 0, "sent": "the lady in blue", "raw": "The lady in blue.", "tokens": ["the", "lady"]},
            {"sent_id": 1, "sent": "left lady", "raw": "left lady", "tokens": ["left", "lady"]},
        ],
    },
    {"ref_id": 1, "ann_id": 18, "image_id": 5, "split": "testA", "sentences": [{"sent_id": 2, "sent": "dog"}]},
]
INSTANCES = {
    "images": [{"id": 5, "file_name": "COCO_train2014_000000000005.jpg", "width": 60, "height": 50}],
    "annotations": [{"id": 17, "image_id": 5, "bbox": [1, 2, 29, 38]}, {"id": 18, "image_id": 5, "bbox": [0, 0, 9, 9]}],
    "categories": [{"id": 1, "name": "person"}],
}


def write(folder: Path, refs: Any = REFS, protocol: int = 0, **instances: Any) -> str:
    Image.new("RGB", (60, 50)).save(folder / "COCO_train2014_000000000005.jpg")
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol))
    (folder / "instances.json").write_text(json.dumps({**INSTANCES, **instances}))
    return f"refcoco:{folder}/refs(unc).p"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_record_for_each_sentence(protocol: int, tmp_path: Path) -> None:
    data = load_data(write(tmp_path, protocol=protocol))
    assert [record.id for record in data] == ["0", "1", "2"]
    assert [record.target["expression"] for record in data] == ["the lady in blue", "left lady", "dog"]
    assert [record.target["box"] for record in data] == [(1, 2, 30, 40), (1, 2, 30, 40), (0, 0, 9, 9)]
    assert data[0].messages[0]["content"][-1]["text"] == "Output the bounding box of the lady in blue in the image."
    assert data[0].images == (tmp_path / "COCO_train2014_000000000005.jpg",)
    assert data[1].columns["ref_id"] == 0


def test_texts_of_python_2(tmp_path: Path) -> None:
    """As the released files have them: byte strings of protocol 0."""
    write(tmp_path)
    lines = b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xc3\\xa9'\np3\nsS'ref_id'\np4\nI0\nsa."
    (tmp_path / "old.p").write_bytes(lines)
    assert read_plain_pickle(tmp_path / "old.p") == [{"sent": "café", "ref_id": 0}]


def test_splits(tmp_path: Path) -> None:
    spec = write(tmp_path)
    assert [record.id for record in load_data(f"{spec}?split=testA")] == ["2"]
    with pytest.raises(
        DataError, match=r"refs\(unc\)\.p: no split 'test'; did you mean 'testA'\? allowed: train, testA"
    ):
        load_data(f"{spec}?split=test")
    (tmp_path / "other").mkdir()
    (tmp_path / "instances.json").rename(tmp_path / "other/i.json")
    assert len(load_data(f"{spec}?instances={tmp_path}/other/i.json&images={tmp_path}&prompt=perpo")) == 3
    with pytest.raises(DataError, match=r"instances\.json: no such file"):
        load_data(spec)


class Bomb:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.trace,)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "it ran"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        spec = write(tmp_path, [*REFS, Bomb(trace)], protocol)
        with pytest.raises(DataError, match=r"refs\(unc\)\.p: it names .*only plain data is read") as error:
            load_data(spec)
        assert error.value.problems[0].kind == "unsafe pickle"
    pickle.loads((tmp_path / "refs(unc).p").read_bytes())
    assert trace.exists()


def repeated(times: int, deep: int) -> list[Any]:
    """A list that holds one list ``times`` times, and so on: times^deep entries in a few bytes."""
    value: list[Any] = []
    for _ in range(deep):
        value = [value] * times
    return value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", r"it names os\.system"),
        (b"c__builtin__\neval\n(S'1'\ntR.", r"it names __builtin__\.eval"),
        (b"(S'true'\nios\nsystem\n.", r"it names os\.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", r"it names os\.system"),
        (b"]r\xff\xff\xff\x7f.", "instruction 2 fills memory cell 2147483647"),  # would claim 32 GiB
        (b"(lp999999999\n.", "fills memory cell 999999999"),
        (b"P1\n.", "an object outside the file"),
        (b"\x80\x02\x82\x01.", "cannot be read as a pickle"),  # an extension code
        (b"S'print'\n)R.", "cannot be read as a pickle"),  # a text is no function
        (b"})" + b"\x85" * 200000 + b"Ns.", "instruction 3 makes a tuple"),  # its hash would overflow the stack
        (b"})" + b"2\x86" * 60 + b"Ns.", "instruction 4 makes a tuple"),  # its hash would visit 2^60 tuples
        (pickle.dumps(repeated(2, 40)), "nested more than 32 deep"),
        (pickle.dumps(repeated(50, 8)), "its lists hold the same lists too often"),
        (b"\x8b\x10\x00\x00\x00" + b"\x7f" * 16 + b".", "it holds an integer of 127 bits"),
        (b"\x80\x04\x8f.", "it holds a set"),
        (b"}(S'__class__'\nI1\nsb.", "cannot be read as a pickle"),
        (b"(lp0\n", "cannot be read as a pickle"),
        (b"", "cannot be read as a pickle"),
        (b"not a pickle", "cannot be read as a pickle"),
        (b"S'\\xff'\n.", "cannot be read as a pickle"),  # no UTF-8
    ],
)
def test_hostile_and_damaged_files(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.p").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_plain_pickle(tmp_path / "r.p")


@pytest.mark.parametrize(
    ("refs", "message"),
    [
        ({"a": 1}, "expected a list of references"),
        ([1], "expected a list of references"),
        ([{**REFS[0], "ann_id": 99}], r"refs\(unc\)\.p:reference 0: ann_id 99 is not among the instances' annotations"),
        ([{**REFS[0], "ann_id": [1]}], r"ann_id \[1\] is not among"),
        ([{**REFS[0], "image_id": 99}], "image_id 99 is not among the instances' images"),
        ([{**REFS[0], "sentences": "x"}], "sentences must be a list"),
        (
            [{**REFS[0], "sentences": [{"sent_id": 0}]}],
            r"reference 0, sentence 0: expression must be a string, got None",
        ),
        ([REFS[0], REFS[0]], "id '0' is already the id of"),
    ],
)
def test_bad_references(refs: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_data(write(tmp_path, refs))


def test_bad_instances(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"instances\.json: no list 'images'"):
        load_data(write(tmp_path, images=None))
    with pytest.raises(DataError, match=r"bbox .* lies outside"):
        load_data(write(tmp_path, annotations=[{**a, "bbox": [50, 0, 30, 9]} for a in INSTANCES["annotations"]]))
    with pytest.raises(DataError, match=r"(?s)2 problems.*annotation 17 is of image 6, not of 5"):
        load_data(write(tmp_path, annotations=[{**a, "image_id": 6} for a in INSTANCES["annotations"]]))


def test_numbers_as_pandas_writes_them(tmp_path: Path) -> None:
    sentences = [{"sent_id": 3.0, "sent": "dog"}, {"sent_id": None, "sent": "the dog"}, {"sent_id": 4, "sent": " "}]
    ref = {**REFS[1], "ann_id": 18.0, "image_id": 5.0, "sentences": sentences}
    data = load_data(write(tmp_path, [ref]), skip_bad=True)
    assert [record.id for record in data] == ["3", "1"]
    assert [record.target["box"] for record in data] == [(0, 0, 9, 9)] * 2
    assert data.reasons == {"empty expression": 1}
