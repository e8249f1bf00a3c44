"""Templates as the questions of records: their words, their errors, and where the pictures stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from fastrl.data import DataError, Record, load_data, parse_spec, with_options
from fastrl.data.identity import identify
from fastrl.data.prompts import NAMED, template_of

ROW = {"image": "a.png", "expression": "the cat", "bbox": [1, 2, 30, 40], "place": "left", "number": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (60, 50)).save(tmp_path / "a.png")
    return tmp_path


def load(folder: Path, prompt: str, *rows: dict[str, Any], adapter: str = "refexp", **options: Any) -> list[Record]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or (ROW,)))
    return list(load_data(f"{adapter}:{folder}/rows.jsonl?prompt={quote(prompt)}", **options))


def texts(record: Record) -> list[str]:
    return [part.get("text", "image") for part in record.messages[-1]["content"]]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("Where is {expression}?", "Where is the cat?"),
        ("{prompt} Think first.", "Output the bounding box of the cat in the image. Think first."),
        ("{{x}} {place}/{number} & {expression}={expression}", "{x} left/3 & the cat=the cat"),
        ("perpo", "Please provide the bounding box coordinate of the region this sentence describes: the cat"),
        ("paper", "Output the bounding box of the cat in the image."),
    ],
)
def test_a_template_asks_with_the_records_words(folder: Path, prompt: str, words: str) -> None:
    (record,) = load(folder, prompt)
    assert texts(record) == ["image", words]
    assert record.target == {"box": (1, 2, 30, 40), "expression": "the cat"}


def test_nothing_in_a_template_is_evaluated(folder: Path) -> None:
    for name in ("expression.__class__", "expression!r", "expression:>9", "0", "prompt[0]"):
        with pytest.raises(DataError, match=f"prompt needs {{{name}".replace("[", r"\[")):
            load(folder, f"Where is {{{name}}}?")
    (record,) = load(folder, "Where is {expression}?", {**ROW, "expression": "{place} of {prompt}"})
    assert texts(record)[-1] == "Where is {place} of {prompt}?"


def test_an_unknown_word_names_file_key_and_what_is_allowed(folder: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: prompt needs \{expresion\}; did you mean 'expression'\?") as e:
        load(folder, "Where is {expresion}?")
    assert "allowed: expression, place, number, prompt" in str(e.value)
    lacking = {key: value for key, value in ROW.items() if key != "place"}
    with pytest.raises(DataError, match=r"rows\.jsonl:2: prompt needs \{place\}"):
        load(folder, "Is it {place}?", ROW, lacking)
    assert len(load(folder, "Is it {place}?", ROW, lacking, skip_bad=True)) == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("perpoo", "prompt=perpoo: no prompt of that name; did you mean 'perpo'"),
        ("Where is {expression?", r"'\{' at 9 is no place for a word"),
        ("Where is expression}?", r"'\}' at 19 is no place"),
        ("Where is {}?", r"'\{\}' at 9"),
        (" ", "no prompt of that name"),
    ],
)
def test_a_template_that_says_nothing(folder: Path, prompt: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(folder, prompt)


def test_a_place_for_pictures_is_refused(folder: Path) -> None:
    """It would stand in the prompt as a text, after the pictures."""
    with pytest.raises(DataError, match="pictures stand before the text; leave <image> out"):
        load(folder, "<image> Where is {expression}?")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: \{place\} says <image>"):
        load(folder, "{place} it", {**ROW, "place": "<image> left"})


def test_a_prompt_of_another_task(folder: Path) -> None:
    row = {"image": "a.png", "label": "cat", "count": 0, "points": None}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .* asks for grounding; this is a record for counting"):
        load(folder, "perpo", row, adapter="pixmo")
    (record,) = load(folder, "How many {label}?", row, adapter="pixmo")
    assert texts(record) == ["image", "How many cat?"]


def test_each_adapter_with_questions_takes_one(folder: Path) -> None:
    (record,) = load(folder, "Read {id}.", {"image": "a.png", "text": "x", "id": "p7"}, adapter="ocr")
    assert texts(record) == ["image", "Read p7."]
    asked = {"question_id": 4, "image": "a.png", "text": "Is there a dog?", "label": "no"}
    (record,) = load(folder, "{question} Say yes or no.", asked, adapter="pope")
    assert texts(record) == ["Is there a dog? Say yes or no."]
    given = {"image": "a.png", "references": ["a"], "prompt": "Own?"}
    assert texts(load(folder, "{prompt} Describe.", given, adapter="captions")[0]) == ["image", "Own? Describe."]
    layout = {"images": ["a.png"], "problem": "Look: <image> where?", "answer": [1, 2, 3, 4]}
    assert texts(load(folder, "Q: {prompt}", layout, adapter="rows")[0]) == ["image", "Q: Look: where?"]
    with pytest.raises(DataError, match=r"\{problem\} says <image>.*\{prompt\} has it left out"):
        load(folder, "Q: {problem}", layout, adapter="rows")
    with pytest.raises(DataError, match="unknown option 'prompt' of lists"):
        load(folder, "Where is it?", ROW, adapter="lists")


def test_multiple_choice_with_its_options(folder: Path) -> None:
    text = "video,question,answer,qid,type,a0,a1\nv,what,1,7,TN,one,two\n"
    (folder / "q.csv").write_text(text)
    (record,) = load_data(f"nextqa:{folder}/q.csv?prompt={quote('{question}?{options}[{type}]')}")
    assert texts(record) == ["what?A. one\nB. two[TN]"]


def test_categories_of_coco(folder: Path) -> None:
    data = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 5, "name": "dog"}],
        "annotations": [],
    }
    (folder / "c.json").write_text(json.dumps(data))
    (record,) = load_data(f"coco:{folder}/c.json?prompt=Find {{categories}}.")
    assert texts(record) == ["image", "Find cat, dog."]


def test_records_made_on_demand() -> None:
    data = load_data("scenes:grounding?n=3&prompt=Where is the {expression}?")
    plain = load_data("scenes:grounding?n=3")
    assert [texts(r)[-1] for r in data] == [f"Where is the {r.target['expression']}?" for r in plain]
    assert len(data[:2]) == 2
    assert identify(data).digests["target"] == identify(plain).digests["target"]
    clip = load_data("scenes:trajectory?n=1&frames=2&prompt={prompt} Now.")[0]
    before = load_data("scenes:trajectory?n=1&frames=2")[0]
    assert texts(clip)[:-1] == texts(before)[:-1]
    assert texts(clip)[-1] == f"{texts(before)[-1]} Now."
    with pytest.raises(DataError, match=r"scenes:grounding\?n=3.*prompt needs \{place\}"):
        load_data("scenes:grounding?n=3&prompt=Is it {place}?")


def test_a_template_survives_the_spec() -> None:
    spec = with_options("refexp:a.jsonl?prompt=Is {expression} 100%25 in? A%26B", limit=3)
    assert parse_spec(spec)[2] == {"prompt": "Is {expression} 100% in? A&B", "limit": "3"}


@pytest.mark.parametrize("name", NAMED)
def test_named_prompts_are_templates(name: str) -> None:
    template = template_of(name, "refexp", "x")
    assert template is not None
    assert template.names
