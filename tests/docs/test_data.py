"""Every row of the tables on pictures, rows, COCO files, prompts and benchmarks in ``docs/data.md`` is true: each has
an example that is loaded. How each mode and format is converted is tested in ``tests/fastrl/data/test_pictures.py``."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from fastrl.data import DataError, load_data
from fastrl.data.decodable import decoded
from fastrl.data.pictures import LARGE, open_picture

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BOX = [1, 2, 30, 40]
ROW = {"image": "a.png", "expression": "the cat", "bbox": BOX}
COUNT = {"image": "a.png", "label": "cat", "count": 2, "points": [[1, 2], [3, 4]]}
COCO = {
    "images": [{"id": 1, "file_name": "a.png"}, {"id": 7, "file_name": "a.png"}],
    "categories": [{"id": 1, "name": "cat"}, {"id": 5, "name": "dog"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 29, 38]}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    Image.new("RGB", (200, 100)).save(folder / "a.png")
    return folder


def rows_of(heading: str) -> list[str]:
    """First cells of the table that follows a line."""
    lines = PAGE[PAGE.index(heading) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|---"))
    found = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        found.append(line.split("|")[1].strip())
    return found


class Loads:
    """The loaded records, or the kinds of problems of bad rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def target(self, row: dict[str, Any], query: str = "", adapter: str = "refexp") -> Any:
        return self._load(f"{adapter}:{self._file(row)}{query}")[0].target

    def kinds(self, *rows: dict[str, Any], adapter: str = "refexp") -> set[str]:
        with pytest.raises(DataError) as error:
            self._load(f"{adapter}:{self._file(*rows)}")
        return {problem.kind for problem in error.value.problems}

    def asked(self, prompt: str, **columns: Any) -> str:
        (record,) = self._load(f"refexp:{self._file({**ROW, **columns})}?prompt={prompt}")
        return record.messages[0]["content"][-1]["text"]

    def prompt_kinds(self, prompt: str, row: dict[str, Any] = ROW, adapter: str = "refexp") -> set[str]:
        return self.refused(f"{adapter}:{self._file(row)}?prompt={prompt}")

    def refused(self, spec: str) -> set[str]:
        with pytest.raises(DataError) as error:
            self._load(spec)
        return {problem.kind for problem in error.value.problems}

    def left_out(self, *rows: dict[str, Any]) -> dict[str, int]:
        return self._load(f"refexp:{self._file(*rows)}").reasons

    def coco(self, change: Callable[[dict[str, Any]], object] = lambda d: None) -> Any:
        data = json.loads(json.dumps(COCO))
        change(data)
        (self.folder / "c.json").write_text(json.dumps(data))
        return self._load(f"coco:{self.folder / 'c.json'}")

    def coco_kinds(self, change: Callable[[dict[str, Any]], object]) -> set[str]:
        with pytest.raises(DataError) as error:
            self.coco(change)
        return {problem.kind for problem in error.value.problems}

    def _file(self, *rows: dict[str, Any]) -> Path:
        file = self.folder / "rows.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        return file

    def _load(self, spec: str) -> Any:
        return load_data(spec)


WANT = (1.0, 2.0, 30.0, 40.0)
ROWS: list[tuple[str, Callable[[Loads], bool]]] = [
    ("a list, object or number", lambda d: d.target(ROW)["box"] == WANT),
    (
        "the same as JSON text",
        lambda d: (
            d.target({**ROW, "bbox": str(BOX)})["box"] == WANT and d.kinds({**ROW, "bbox": "[1, 2"}) == {"wrong type"}
        ),
    ),
    (
        "a box as `{",
        lambda d: all(d.target({**ROW, "bbox": b})["box"] == WANT for b in ({"bbox_2d": BOX}, {"Box": BOX}, [BOX])),
    ),
    (
        "points as `{",
        lambda d: all(
            d.target({**COUNT, "points": p}, adapter="pixmo")["points"] == [(1, 2), (3, 4)]
            for p in ({"x": [1, 3], "y": [2, 4]}, [{"x": 1, "y": 2}, {"point_2d": [3, 4]}], [[1, 2], [3, 4]])
        ),
    ),
    (
        "the same in `<answer>",
        lambda d: all(
            d.target({**ROW, "bbox": text})["box"] == WANT
            for text in (f"<answer>{BOX}</answer>", f"<think>x</think><answer>{BOX}</answer>", f"```json\n{BOX}\n```")
        ),
    ),
    ("null beside another column", lambda d: d.target({**ROW, "bbox": None, "solution": BOX})["box"] == WANT),
    ("arrays (numpy)", lambda d: True),  # tests/fastrl/data/test_truth.py has them: JSON rows cannot hold such values
    (
        "`text` of OCR",
        lambda d: (
            d.target({"image": "a.png", "text": "[1]"}, adapter="ocr") == {"text": "[1]"}
            and d.kinds({"image": "a.png", "text": " "}, adapter="ocr") == {"empty text"}
        ),
    ),
    (
        "a box",
        lambda d: (
            d.target({**ROW, "bbox": [-1, 0, 201, 50]})["box"] == (0, 0, 200, 50)
            and [d.kinds({**ROW, "bbox": b}) for b in ([1, 2, 203, 9], [9, 2, 1, 9], [1, 2, 1, 9], [1, 2, True, 9])]
            == [{"box outside"}, {"inverted box"}, {"box without area"}, {"not a number"}]
        ),
    ),
    ("`?box=xywh`", lambda d: d.target({**ROW, "bbox": [1, 2, 29, 38]}, "?box=xywh")["box"] == WANT),
    (
        "`?frame=unit`",
        lambda d: (
            d.target({**ROW, "bbox": [0, 0, 0.5, 1]}, "?frame=unit")["box"]
            == d.target({**ROW, "bbox": [0, 0, 500, 1000]}, "?frame=thousand")["box"]
            == (0, 0, 100, 100)
        ),
    ),
    (
        "a box or all points within 0–1",
        lambda d: (
            d.kinds({**ROW, "bbox": [0, 0, 0.5, 1]}) == {"box in 0 to 1"}
            and d.kinds({**COUNT, "points": [[0.1, 0.2], [0.3, 1]]}, adapter="pixmo") == {"points in 0 to 1"}
        ),
    ),
    ("a null box", lambda d: d.left_out(ROW, {**ROW, "bbox": None}) == {"no such object": 1}),
    (
        "a count",
        lambda d: (
            all(d.target({**COUNT, "count": n}, adapter="pixmo")["count"] == 2 for n in (2, 2.0, "2"))
            and all(d.kinds({**COUNT, "count": n}, adapter="pixmo") == {"wrong type"} for n in (2.5, True, -1))
        ),
    ),
    (
        "points that are null or empty",
        lambda d: (
            all(d.target({**COUNT, "points": p}, adapter="pixmo")["points"] is None for p in (None, []))
            and d.kinds({**COUNT, "points": [[1, 2]]}, adapter="pixmo") == {"count and points differ"}
        ),
    ),
    (
        "an expression that is the same",
        lambda d: (
            d.kinds(*[{**ROW, "expression": "Please locate it."}] * 2) == {"one instruction in every row"}
            and d.left_out(*[{**ROW, "expression": "person"}] * 2) == {}
        ),
    ),
    ("an `id`", lambda d: d.kinds({**ROW, "id": "x"}, {**ROW, "id": "x"}) == {"duplicate id"}),
    ("`width` and `height`", lambda d: d.kinds({**ROW, "width": 9, "height": 9}) == {"wrong size"}),
]


def first(change: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    return lambda d: d["annotations"][0].update(change)


def again(change: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    return lambda d: d["annotations"].append({**d["annotations"][0], **change})


COCO_ROWS: list[tuple[str, Callable[[Loads], bool]]] = [
    (
        "missing or null",
        lambda d: len(d.coco()) == len(d.coco(first({"iscrowd": None, "area": None, "id": None}))) == 2,
    ),
    ("a crowd region", lambda d: d.coco(first({"iscrowd": 1}))[0].target["crowd"] == [True]),
    (
        "a category that is another's",
        lambda d: (
            d.coco(
                lambda c: (
                    c["categories"][0].update(supercategory="pet"),
                    c["categories"].append({"id": 9, "name": "pet"}),
                )
            ).reasons
            == {"supercategory": 1}
        ),
    ),
    (
        "an annotation without a known",
        lambda d: all(
            d.coco_kinds(first(change))
            for change in ({"image_id": 99}, {"category_id": 99}, {"area": -1}, {"iscrowd": 2})
        ),
    ),
    (
        "an `id` that comes twice",
        lambda d: (
            d.coco_kinds(again({"bbox": [5, 5, 9, 9]})) == d.coco_kinds(again({"id": 8})) == {"repeated annotation"}
        ),
    ),
    ("an image with one bad", lambda d: len(d.coco_kinds(again({"id": 8, "bbox": [1, 2, 0, 0]}))) == 1),
]


PROMPTS: list[tuple[str, Callable[[Loads], bool]]] = [
    (
        "`Where is the {expression}?`",
        lambda d: (
            d.asked("Where is the {expression}?") == "Where is the the cat?"
            and d.asked("In {place}: {prompt}", place="a box").startswith(
                "In a box: Output the bounding box of the cat"
            )
            and d.prompt_kinds("Where is {label}?") == {"unknown word"}
        ),
    ),
    ("`{prompt} Think first.`", lambda d: d.asked("{prompt} Think first.").endswith("in the image. Think first.")),
    (
        "`Count the {{ and }}.`",
        lambda d: (
            d.asked("Count the {{ and }}.") == "Count the { and }."
            and all(d.prompt_kinds(text) == {"bad option"} for text in ("a {", "a }", "a {}"))
        ),
    ),
    (
        "`perpo`",
        lambda d: (
            f"`{d.asked('perpo').removesuffix('the cat')}{{expression}}`" in PAGE
            and d.prompt_kinds("perpo", COUNT, adapter="pixmo") == {"prompt of another task"}
        ),
    ),
    (
        "`paper`, `row`",
        lambda d: (
            d.asked("row", problem="Where?") == "Where?"
            and d.asked("paper", problem="Where?").startswith("Output the bounding box")
            and d.prompt_kinds("papers") == {"bad option"}
        ),
    ),
]
REFERENCE = {"ref_id": 0, "ann_id": 1, "image_id": 1, "split": "val", "sentences": [{"sent_id": 4, "sent": "cat"}]}
CHOICE = {"question": "Which?", "options": ["a", "b"], "answer": "1", "image": "a.png"}
HALLUSION = {"category": "VD", "subcategory": "map", "visual_input": "1", "set_id": "0", "figure_id": "0"}
HALLUSION |= {"question_id": "0", "question": "Is it?", "gt_answer": "1"}
MME_ROW = {"question_id": "1", "image": "a.png", "question": "Is it?", "answer": "Yes", "category": "color"}


def pickled(d: Loads, value: Any) -> str:
    (d.folder / "refs.p").write_bytes(pickle.dumps(value))
    (d.folder / "instances.json").write_text(json.dumps(COCO))
    return f"refcoco:{d.folder}/refs.p?split=val"


BENCHMARKS: list[tuple[str, Callable[[Loads], bool]]] = [
    (
        "`refcoco:refs(unc).p`",
        lambda d: (
            d._load(pickled(d, [REFERENCE]))[0].target == {"box": WANT, "expression": "cat"}
            and d.refused(pickled(d, [{**REFERENCE, "split": Path}])) == {"unsafe pickle"}
        ),
    ),
    (
        "`choice:FILE`",
        lambda d: (
            d.target(CHOICE, f"?images={d.folder}", adapter="choice")["answer"] == 1
            and len(d._load(f"choice:{d._file(CHOICE)}?circular=yes")) == 2
            and d.target({**CHOICE, "kind": "x"}, "?type=kind", adapter="choice")["type"] == "x"
        ),
    ),
    (
        "`hallusion:HallusionBench.json`",
        lambda d: d.target(HALLUSION, adapter="hallusion")["groups"] == {"pair": "VD_map_0_0", "figure": "VD_map_0_0"},
    ),
    (
        "`mme:FOLDER`, `mme:FILE`",
        lambda d: (
            len(d._load(f"mme:{d._file(MME_ROW, MME_ROW)}")) == 2
            and d.kinds(MME_ROW, adapter="mme") == {"unpaired question"}
        ),
    ),
    (
        "`captions:FILE`",
        lambda d: (
            d.target({"GT_Caption_GPT4O": "A cat."}, "?images=none", adapter="captions")["references"] == ["A cat."]
        ),
    ),
    (
        "`nextqa:FILE`, `pope:FILE`",
        lambda d: d.target({"question_id": 1, "text": "Is it?", "label": "no"}, adapter="pope")["answer"] == "no",
    ),
]
GREY = np.array([[0, 32896], [65278, 65535]], dtype=np.uint16)  # 65535 / 255 = 257


class Shows:
    """What a picture of a row is read as, or the kind and the text of what is wrong with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loads = Loads(folder)

    def saved(self, image: Image.Image | np.ndarray, name: str = "x.png", **options: Any) -> str:
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        image.save(self.folder / name, **options)
        return name

    def pixels(self, name: str, query: str = "?frame=unit") -> np.ndarray:
        row = {"image": name, "expression": "a", "bbox": [0, 0, 1, 1]}
        (record,) = load_data(f"refexp:{self.loads._file(row)}{query}")
        return np.asarray(open_picture(record.images[0]))

    def first(self, name: str) -> list[int]:
        return self.pixels(name)[0, 0].tolist()

    def refused(self, name: str, *words: str, query: str = "?frame=unit", **row: Any) -> bool:
        file = self.loads._file({"image": name, "expression": "a", "bbox": [0, 0, 1, 1], **row})
        with pytest.raises(DataError) as error:
            load_data(f"refexp:{file}{query}")
        (problem,) = error.value.problems
        return problem.kind == ("wrong size" if row else "bad image") and all(w in str(problem) for w in (*words, name))

    def tiff(self, values: np.ndarray, **tags: Any) -> str:
        info = TiffImagePlugin.ImageFileDirectory_v2()
        for tag, value in tags.items():
            info[int(tag[1:])] = value
        return self.saved(values, "x.tif", tiffinfo=info)

    def turned(self, orientation: int) -> str:
        exif = Image.Exif()
        exif[0x0112] = orientation
        return self.saved(Image.new("RGB", (30, 20), "red"), exif=exif)

    def cut(self) -> str:
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        file = self.folder / self.saved(noise, "cut.jpg")
        file.write_bytes(file.read_bytes()[:-500])
        return file.name

    def broken(self) -> bool:
        """Read by its header, and found when it is decoded."""
        name = self.cut()
        row = {"image": name, "expression": "a", "bbox": [0, 0, 1, 1]}
        records = load_data(f"refexp:{self.loads._file(row)}?frame=unit")
        return len(records) == 1 and [p.kind for p in decoded(records).problems] == ["broken picture"]


PICTURES: list[tuple[str, Callable[[Shows], bool]]] = [
    (
        "JPEG, PNG",
        lambda d: (
            all(
                d.pixels(d.saved(Image.new("RGB", (4, 4), (8, 8, 8)).convert(mode), f"x.{kind}")).shape == (4, 4, 3)
                for mode, kind in (
                    *(("RGB", kind) for kind in ("jpg", "png", "webp", "bmp", "gif", "tif")),
                    *((mode, "tif") for mode in ("1", "L", "P", "CMYK")),
                )
            )
            and d.refused("rows.jsonl")
        ),
    ),
    (
        "16-bit grey PNG",
        lambda d: all(
            d.pixels(d.saved(GREY, n))[..., 0].tolist() == [[0, 128], [254, 255]] for n in ("x.png", "x.jp2")
        ),
    ),
    (
        "12- and 16-bit grey TIFF",
        lambda d: (
            d.pixels(d.tiff(GREY))[..., 0].tolist() == [[0, 128], [254, 255]]
            and d.pixels(d.tiff(GREY // 16, t281=4095))[..., 0].tolist() == [[0, 128], [254, 255]]
            and d.pixels(d.tiff(GREY, t262=0))[..., 0].tolist() == [[255, 127], [1, 0]]
        ),
    ),
    (
        "signed or 32-bit integers",
        lambda d: (
            d.pixels(d.tiff(GREY.astype(np.int32), t340=0, t341=65535))[..., 0].tolist() == [[0, 128], [254, 255]]
            and d.refused(d.tiff(GREY.astype(np.int32)))
        ),
    ),
    ("floating-point numbers", lambda d: d.refused(d.tiff(GREY.astype(np.float32)), "value of white is unknown")),
    (
        "transparency",
        lambda d: all(
            d.first(d.saved(image, "x.png", **options)) == [255, 255, 255]
            for image, options in (
                (Image.new("RGBA", (4, 4), (9, 9, 9, 0)), {}),
                (Image.new("LA", (4, 4), (9, 0)), {}),
                (Image.new("P", (4, 4), 0), {"transparency": 0}),
                (Image.new("L", (4, 4), 9), {"transparency": 9}),
            )
        ),
    ),
    (
        "animations",
        lambda d: (
            d.first(
                d.saved(
                    Image.new("RGB", (4, 4)), "x.gif", save_all=True, append_images=[Image.new("RGB", (4, 4), "white")]
                )
            )
            == [0, 0, 0]
        ),
    ),
    (
        "an EXIF",
        lambda d: (
            d.pixels(d.turned(6)).shape == (20, 30, 3)
            and d.pixels(d.turned(6), "?frame=unit&orient=exif").shape == (30, 20, 3)
            and d.refused(d.turned(6), "EXIF", width=20, height=30)
        ),
    ),
    (
        "more than 64,000,000",
        lambda d: (
            d.refused(d.saved(Image.new("1", (8001, 8000))), "data.max_image_pixels", "64,000,000")
            and d.refused(d.saved(Image.new("1", (9, 9))), query="?frame=unit&max_image_pixels=80")
        ),
    ),
    ("more than 16,000,000", lambda d: LARGE == 16_000_000),  # test_one_large_picture_is_open_at_a_time
    ("one side over 200", lambda d: d.refused(d.saved(Image.new("L", (2010, 10))), "200")),
    ("a file that breaks off", lambda d: d.broken()),
]


@pytest.mark.parametrize(("start", "holds"), PICTURES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_row_of_pictures_is_true(tmp_path: Path, start: str, holds: Callable[[Shows], bool]) -> None:
    assert holds(Shows(tmp_path)), start


@pytest.mark.parametrize(
    ("heading", "checks"),
    [
        ("## Pictures", PICTURES),
        ("## Rows", ROWS),
        ("COCO instance files:", COCO_ROWS),
        ("## Prompts", PROMPTS),
        ("## Benchmarks", BENCHMARKS),
    ],
)
def test_every_row_has_its_example(heading: str, checks: list[tuple[str, Any]]) -> None:
    cells = rows_of(heading)
    assert len(cells) == len(checks), [cell for cell in cells if not any(cell.startswith(s) for s, _ in checks)]
    for cell, (start, _) in zip(cells, checks, strict=True):
        assert cell.startswith(start), cell


@pytest.mark.parametrize(
    ("start", "holds"),
    [*ROWS, *COCO_ROWS, *PROMPTS, *BENCHMARKS],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_row_of_the_table_is_true(folder: Path, start: str, holds: Callable[[Loads], bool]) -> None:
    assert holds(Loads(folder)), start
