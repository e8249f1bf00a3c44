"""Data from a user's own file, outside the package: through the library, a recipe and the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from fastrl.cli.main import app
from fastrl.data import DataError, Record, load_data
from fastrl.recipe import load_recipe
from fastrl.run.logs import read_rows
from fastrl.trainer import train
from tests.helpers.training import make_recipe

Folder = Callable[[str], Path]
CODE = """
from pathlib import Path
from fastrl.data import Record, question

def rows(path, images="", upper="no"):
    for number, line in enumerate(Path(path).read_text().splitlines()):
        name, text = line.split(",")
        text = text.upper() if upper == "yes" else text
        yield Record(str(number), "ocr", (Path(images) / name,), question("ocr"), {"text": text})

def broken(path):
    yield from rows(path)
    raise KeyError("lost")

def other(path):
    return [1]

def nothing(path):
    return None

def no_argument():
    return []

def leaves(path):
    raise SystemExit(3)

def moves(path):
    import os
    found = list(rows(path))
    os.chdir("..")
    return found

class Lazily:
    def __init__(self, path):
        self.made = list(rows(path))
    def __getitem__(self, i):
        return self.made[i]

def one_id(path, images=""):
    for record in rows(path, images):
        yield Record("same", record.task, record.images, record.messages, record.target)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_data.py").write_text(CODE)
    (tmp_path / "things.csv").write_text("a.png,one\na.png,two\n")
    Image.new("RGB", (56, 56), "red").save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_function_of_ones_own_is_an_adapter(folder: Path) -> None:
    data = load_data("my_data.py:rows:things.csv?images=.&upper=yes")
    assert [record.target["text"] for record in data] == ["ONE", "TWO"]
    assert load_data(f"{folder / 'my_data.py'}:rows:{folder / 'things.csv'}?images={folder}")[0].target["text"] == "one"
    assert data[0].source == "my_data.py:rows:record 0"
    assert [record.id for record in load_data("my_data.py:Lazily:things.csv")] == ["0", "1"]


def test_a_function_of_a_notebook_is_an_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cell(path: str) -> list[Record]:
        return [Record(path, "ocr", (), ({"role": "user", "content": "?"},), {"text": "one"})]

    monkeypatch.setattr(sys.modules["__main__"], "cell", cell, raising=False)
    assert [record.id for record in load_data("__main__:cell:x")] == ["x"]


def test_its_pictures_are_checked_like_any_others(folder: Path) -> None:
    with pytest.raises(DataError, match=r"2 rows: image not found: .*gone.*first: my_data\.py:rows:record 0"):
        load_data("my_data.py:rows:things.csv?images=gone")
    with pytest.raises(DataError, match="more than the limit of 100"):
        load_data("my_data.py:rows:things.csv?max_image_pixels=100")
    with pytest.raises(DataError, match="id 'same' is already the id of"):
        load_data("my_data.py:one_id:things.csv")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gone.py:rows:x", "no such file: gone.py"),
        ("my_data.py:rowz:x", "has no function 'rowz'; it has .*rows"),
        (
            "my_data.py:rows:things.csv?uper=yes",
            r"is called as rows\(path, \*\*query\): .* argument 'uper'",
        ),
        ("my_data.py:rows:gone.csv", r"FileNotFoundError"),
        ("my_data.py:broken:things.csv", r"my_data\.py:\d+: in broken: KeyError: 'lost'"),
        ("my_data.py:no_argument:things.csv", r"is called as no_argument\(path, \*\*query\): too many positional"),
        ("my_data.py:leaves:things.csv", r"my_data\.py:\d+: in leaves: SystemExit: 3"),
        ("my_data.py:moves:things.csv", "changes the working folder to"),
        ("my_data.py:other:things.csv", "must be a fastrl.data.Record, got 1"),
        ("my_data.py:nothing:things.csv", "must yield records, gave None"),
        ("no_such_package.mod:rows:x", "cannot be imported: ModuleNotFoundError"),
        ("bad.py:rows:x", r"bad\.py cannot be run: .*bad\.py:1.*NameError"),
    ],
)
def test_what_goes_wrong_in_it_names_file_and_function(folder: Path, spec: str, message: str) -> None:
    (folder / "bad.py").write_text("undefined\n")
    with pytest.raises(DataError, match=message):
        load_data(spec)


def test_a_recipe_names_it(tiny_folder: Folder, folder: Path) -> None:
    changes = {"data__adapter": "my_data.py:rows", "optim__steps": 1}
    recipe = make_recipe(tiny_folder("qwen2_5"), folder / "run", data__spec="things.csv?images=.", **changes)
    assert recipe.data_spec == "my_data.py:rows:things.csv?images=."
    train(recipe, show=False)
    assert len(read_rows(folder / "run/metrics.jsonl")) == 1
    named = load_recipe("perception-r1-ocr-2b", ["data.adapter=my_data.py:rows", "data.spec=ocr:things.csv"])
    assert named.data_spec == "my_data.py:rows:things.csv"  # the adapter's name in the spec is not used


# ---- fastrl data


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["data", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_command_shows_what_a_spec_holds(folder: Path) -> None:
    shown = json.loads(run("my_data.py:rows:things.csv", "--json").splitlines()[-1])
    assert set(shown) == {"n", "bad", "tasks", "records"}
    assert (shown["n"], shown["bad"], shown["tasks"]) == (2, 0, {"ocr": 2})
    assert [set(record) for record in shown["records"]] == [{"id", "task", "messages", "images", "target"}] * 2
    assert shown["records"][1]["target"] == {"text": "two"}
    assert shown["records"][0]["images"] == ["a.png"]


def test_the_command_counts_bad_rows_and_decodes_when_asked(folder: Path) -> None:
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:60])
    rows = [{"image": name, "text": "x"} for name in ("a.png", "cut.png", "gone.png", "a.png", "a.png", "a.png")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for arguments, n, bad in ((("--json",), 5, 1), (("--json", "--deep"), 4, 2)):
        shown = json.loads(run("ocr:rows.jsonl", *arguments))
        assert (shown["n"], shown["bad"], len(shown["records"])) == (n, bad, 3)
    text = run("ocr:rows.jsonl", "--deep", "--draw", "truth.png")
    assert text.startswith("4 records: ocr 4")
    assert "rows.jsonl:2: image cannot be read" in text
    assert "rows.jsonl:3: image not found" in text
    assert (folder / "truth.png").stat().st_size > 1000


def test_rows_for_another_adapter_are_told(folder: Path) -> None:
    rows = [{"image": "a.png", "label": "cat", "count": 1, "points": {"x": [1], "y": [2]}} for _ in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"30 rows: no expression .*\(first: rows\.jsonl:1\)") as error:
        load_data("refexp:rows.jsonl")
    hint = "is this pixmo:rows.jsonl? Then use a counting recipe (fastrl recipes)."
    assert str(error.value).endswith(hint)
    with pytest.raises(DataError, match="use a counting recipe"):  # no row is left
        load_data("refexp:rows.jsonl", skip_bad=True)
