"""README's table of demos shows what ``make verify`` wrote, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from fastrl.recipe import load_recipe
from fastrl.studies import hacking
from fastrl.toy.demos import perpo, utr
from fastrl.toy.demos.families import DEFAULT, recipe_for
from tests.helpers.pages import CHANGE, signed

ROOT = Path(__file__).resolve().parents[2]
STORED: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "verify.json").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMOS = {  # as the table names them
    "grounding": ("perception-r1", "grounding"),
    "counting": ("perception-r1", "counting"),
    "detection": ("perception-r1", "detection"),
    "OCR": ("perception-r1", "ocr"),
    "PerPO": ("perpo", "grounding"),
    "RePer": ("reper", "caption"),
    "UTR": ("utr", "trajectory"),
}


def results_of(name: str) -> dict[str, Any]:
    """The stored results of a study; ``rates`` are those that it chose, by group of arms."""
    found = ROOT / "benchmarks" / "results" / "studies" / f"{name}.json"
    return json.loads(found.read_text(encoding="utf-8"))


def rows() -> list[tuple[str, str, str, list[tuple[str, ...]]]]:
    """Demo, measure, "from" and the changes of each row."""
    table = README.split("| demo | measure | from |")[1].split("\n\n")[0].splitlines()[2:]
    found, demo = [], ""
    for line in table:
        name, measure, before, changes = (cell.strip() for cell in line.strip("|").split("|"))
        demo = name or demo
        found.append((demo, measure, before, CHANGE.findall(changes)))
    return found


def test_every_row_is_one_comparison_of_the_stored_run() -> None:
    by_demo: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in STORED["results"]:
        by_demo.setdefault((result["method"], result["task"]), []).append(result["unseen"]["changes"])
    assert set(by_demo) == set(DEMOS.values())
    assert len(rows()) >= 20
    for demo, measure, before, changes in rows():
        seeds = by_demo[DEMOS[demo]]
        stored = {
            key: (
                f"{fmean(seed[key]['before'] for seed in seeds):.3f}",
                [tuple(signed(seed[key][end]) for end in ("change", "low", "high")) for seed in seeds],
            )
            for key in seeds[0]
        }
        assert (before, changes) in stored.values(), (demo, measure)


@pytest.mark.parametrize(("family", "study"), [(DEFAULT, "blind"), ("llava", "blind-llava")])
def test_each_kind_of_perpo_has_the_rate_that_its_study_chose_and_the_page_shows_the_grid(
    family: str, study: str
) -> None:
    found = results_of(study)
    assert found["rates"] == perpo.RATES[family]
    page = (ROOT / "docs" / "perpo.md").read_text(encoding="utf-8")
    rates = sorted({rate for tried in found["tried"].values() for rate, _ in tried})
    assert "| learning rate | " + " | ".join(f"{rate:g}" for rate in rates) + " |" in page
    for kind, title in perpo.METHODS.items():
        means = {rate: f"{mean:.3f}" for rate, mean in found["tried"][kind]}
        best = found["rates"][kind]
        assert rates[0] <= min(means) < best < max(means), "the best is inside its grid"
        cells = [f"**{means[rate]}**" if rate == best else means.get(rate, "–") for rate in rates]
        assert f"| {title} | " + " | ".join(cells) + " |" in page


def test_the_sets_of_utr_and_reper_have_the_rates_that_their_studies_chose() -> None:
    sets = {kind: results_of("hacking")["rates"][f"{title}, wide"] for kind, title in hacking.KINDS.items()}
    assert {DEFAULT: sets} == utr.RATES
    assert load_recipe(recipe_for("reper-caption", None)).optim.lr == results_of("gaze")["rates"]["RePer"]


def test_what_is_stored_was_measured_at_the_rates_that_demos_have_now() -> None:
    for demo, method in ((perpo, "perpo"), (utr, "utr")):
        found = [row["rates"] for row in STORED["results"] if row["method"] == method]
        assert found == [demo.RATES[DEFAULT]] * len(found)
        assert found


def test_the_commit_and_what_is_said_of_claims_are_those_of_the_run() -> None:
    text = " ".join(README.split())
    assert f"commit `{STORED['commit']}` (`benchmarks/results/verify.json`)" in text
    assert not STORED["modified"]
    assert ("Every claim holds on every seed." in text) is (not STORED["broken"])
