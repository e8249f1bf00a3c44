"""The report of a run: one page that needs nothing else, whatever the model wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fastrl.recipe import load_recipe
from fastrl.report.page import families, headline, write_report
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
    assert {"reward", "loss", "seconds", "sampler against trainer", "completion length"} <= set(charts)
    assert sorted(key for keys in charts.values() for key in keys) == sorted({*rows[0], *rows[1]} - {"step"})
    assert page.count('src="data:image/png;base64,') == len(charts) + len(samples)  # each sample is drawn
    assert "No pictures" not in page
    assert "perception-r1-grounding-tiny" in page
    assert headline(rows) in page


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


@pytest.mark.parametrize(("content", "said"), [(None, "holds no metrics.jsonl"), ("", "has no row yet")])
def test_a_folder_without_a_run_is_refused(content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises((FileNotFoundError, ValueError), match=said):
        write_report(tmp_path)
