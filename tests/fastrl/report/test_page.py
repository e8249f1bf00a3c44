"""The report of a run: one self-contained page, safe for any model output."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrl.recipe import load_recipe
from fastrl.report.curves import families
from fastrl.report.page import headline, measured, write_report
from fastrl.report.text import closed, shown
from fastrl.trainer import train

HOSTILE = '</td><script>alert("x")</script><img src=http://example.com/a.png>'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    changes = {
        "out": str(out),
        "optim.steps": 2,
        "data.spec": "scenes:grounding?n=8&seed=3",
        "data.prompts_per_step": 2,
        "rollout.group_size": 2,
        "log.tensorboard": False,
        "log.samples_every": 1,
        "checkpoint.final": False,
    }
    train(load_recipe("perception-r1-grounding-tiny", changes), show=False)
    return out


def test_page_holds_curves_samples_pictures_and_the_recipe(run: Path, tmp_path: Path) -> None:
    page = write_report(run, tmp_path / "sub" / "page.html").read_text(encoding="utf-8")
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    charts = families(rows)
    assert {"spread of rewards", "loss", "answer length (tokens)", "update skipped (1: yes)"} <= set(charts)
    assert sorted(key for keys in charts.values() for key in keys) == sorted({*rows[0], *rows[1]} - {"step"})
    assert page.count('src="data:image/png;base64,') == len(charts) + len(samples)  # each sample is drawn
    assert "No pictures" not in page
    assert "perception-r1-grounding-tiny" in page
    assert headline(rows) in page
    assert "About the loss: with one update per batch" in page
    assert all(html.escape(sample["truth"]) in page for sample in samples)


@pytest.mark.gate
def test_evaluations_have_a_chart_of_each_metric_and_the_best_is_named(run: Path, tmp_path: Path) -> None:
    metrics = (run / "metrics.jsonl").read_text()
    rows = [
        {
            "step": 0,
            "eval/AP": None,
            "eval/n": 4,
            "eval/a/f1": 0.1,
            "eval/sampled/a/f1": 0.2,
            "best": False,
            "time/eval": 90,
        },
        {
            "step": 2,
            "eval/AP": 0.5,
            "eval/n": 4,
            "eval/a/f1": 0.3,
            "eval/sampled/a/f1": 0.2,
            "best": True,
            "time/eval": 90,
        },
        {
            "step": 4,
            "eval/AP": 0.4,
            "eval/n": 4,
            "eval/a/f1": 0.2,
            "eval/sampled/a/f1": 0.2,
            "best": False,
            "time/eval": 0,
        },
    ]
    assert measured(rows) == {"AP": ["eval/AP"], "a/f1": ["eval/a/f1", "eval/sampled/a/f1"]}
    folder = strange_run(tmp_path / "run", [metrics.strip()], [])
    lines = [
        *map(json.dumps, rows),
        "garbage",
        '{"step": "x", "eval/AP": 1}',
        '{"step": 1' + "0" * 400 + ', "best": true}',
    ]
    (folder / "eval.jsonl").write_text("\n".join(lines) + "\n")
    page = write_report(folder).read_text("utf-8")
    plain = write_report(strange_run(tmp_path / "plain", [metrics.strip()], [])).read_text("utf-8")
    assert "3 evaluations, 3.0 minutes" in page
    assert "Best after step 2" in page
    assert "Left out: 3 of the lines of eval.jsonl" in page
    assert page.count("data:image/png") == plain.count("data:image/png") + 2
    assert "Evaluation" not in plain


def test_nothing_is_loaded_from_elsewhere_and_model_text_stays_text(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    sample = {"step": 1, "id": "gone", "task": "grounding", "question": HOSTILE, "answer": HOSTILE, "reward": None}
    sample |= {"rewards": {HOSTILE: 0.5, "none": None}, "views": [[9, 9, 9, 9]], "frame": "resized"}
    (copy / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (copy / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("scenes:grounding", "refexp:/gone"))
    page = write_report(copy).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "No pictures: " in page
    addresses = re.findall(r"<[^>]*(?:src|href)\s*=\s*[\"']?([^\"'\s>]*)", page)
    assert addresses
    assert all(address.startswith("data:") for address in addresses)


@pytest.mark.parametrize(("content", "message"), [(None, "it has no metrics.jsonl"), ("", "has no row yet")])
def test_a_folder_without_a_run_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        write_report(tmp_path)


def strange_run(folder: Path, rows: list[str], samples: list[str], recipe: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "samples.jsonl").write_text("\n".join(samples) + "\n")
    (folder / "recipe.yaml").write_bytes(recipe.encode("utf-8", "surrogatepass"))
    return folder


STRANGE_ROWS = [
    '{"step": 1, "reward/mean": 0.5, "time/step": 1}',
    '{"reward/mean": 0.5}',
    '{"step": null, "loss": 1}',
    '{"step": "2", "loss": "1"}',
    '{"step": 2, "reward/mean": "high", "time/step": "long", "loss": [1], "nan": NaN, "huge": 1e999}',
    '{"step": 3, "reward/mean": null, "a$b_{$": 1, "\\ud800": 2, "\\u202ekey": 3, "big": 1' + "0" * 400 + "}",
    "[1]",
    "garbage",
    "[" * 100_000,
]
STRANGE_SAMPLES = [
    '{"answer": "\\ud800 \\udc00\\u0000\\u001b[31m", "question": "\\ud83d", "task": "grounding", "views": [[1]]}',
    '{"step": 1, "answer": null, "reward": "good", "rewards": [1], "views": 3, "task": "grounding", "id": 7}',
    '{"step": {}, "answer": {"a": 1}, "rewards": {"x": "y", "z": 0.5, "w": true}, "reward": NaN}',
    "{}",
    "nonsense",
]


@pytest.mark.parametrize("recipe", ["", "{broken: [", "a: \udc80", "model: {path: tiny:perception}"])
def test_whatever_the_logs_hold_makes_a_page(tmp_path: Path, recipe: str) -> None:
    page = write_report(strange_run(tmp_path / "run", STRANGE_ROWS, STRANGE_SAMPLES, recipe)).read_text("utf-8")
    assert "Left out: 3 of the rows, which have no step." in page
    assert "Left out: 3 of the lines of metrics.jsonl" in page
    assert "Left out: 1 of the lines of samples.jsonl" in page
    assert page.count("<tr>") == 1 + 4
    assert not [c for c in page if c not in "\t\n" and unicodedata.category(c) in ("Cc", "Cs")]
    assert page.endswith("</html>\n")


def test_rows_that_all_have_no_step_are_shown_in_their_order(tmp_path: Path) -> None:
    page = write_report(strange_run(tmp_path / "run", ['{"loss": 1}', '{"loss": 2}'], [])).read_text("utf-8")
    assert "No row has a step: they are shown in their order." in page
    assert 'alt="loss"' in page


def test_a_long_answer_is_cut_with_its_length(tmp_path: Path) -> None:
    sample = json.dumps({"step": 1, "answer": "x" * 10_000_000, "question": "why", "views": [[9] * 4], "task": "ocr"})
    page = write_report(strange_run(tmp_path / "run", STRANGE_ROWS[:1], [sample])).read_text("utf-8")
    assert "x" * 2000 + "… (10,000,000 characters)</bdi>" in page
    assert len(page) < 200_000


MARKS = "".join(("\u202a\u202b\u202c\u202d\u202e", "\u2066\u2067\u2068\u2069"))


@given(st.text(alphabet=st.sampled_from([*MARKS, "a", "<", "א"]), max_size=30))
def test_directional_marks_end_where_their_text_ends(text: str) -> None:
    """All tags are closed in order, and none is closed that was opened outside."""
    made = closed(text)
    begun: list[str] = []
    for c in made:
        if c in "\u2066\u2067\u2068":
            begun.append("\u2069")
        elif c in "\u202a\u202b\u202d\u202e":
            begun.append("\u202c")
        elif c == "\u2069":
            assert c in begun
            del begun[len(begun) - 1 - begun[::-1].index(c) :]
        elif c == "\u202c":
            assert begun[-1] == c
            begun.pop()
    assert begun == []
    assert [c for c in made if c not in MARKS] == [c for c in text if c not in MARKS]
    assert shown(text).startswith("<bdi>")
    assert closed(made) == made
