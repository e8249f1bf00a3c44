"""``docs/studies.md`` shows what the stored results of studies hold, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest

from fastrl.studies import STUDIES
from tests.helpers.pages import CHANGE, signed

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
RESULTS = sorted((ROOT / "benchmarks" / "results" / "studies").glob("*.json"))
STORED = [path for path in RESULTS if "-" not in path.stem]  # NAME-FAMILY.json: with another small model
_CELL = re.compile(r"\| *(−?\d+\.\d{3}(?: ± \d+\.\d{3})?) *(?=\|)")
_NUMBER = re.compile(r"(?<![\d.,])[+−]?\d+\.\d{3}(?!\d)")
_ROW = re.compile(r"^\| \[`(\w+)`\]\(#\w+\) \|(.*)\|$", re.MULTILINE)


def stored(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def section(name: str) -> str:
    """The page's section about a study."""
    return PAGE.split(f"\n### {name}\n")[1].split("\n### ")[0]


def row(name: str) -> list[str]:
    """The cells of a study's row behind its name: commit, form, seeds, arms, records, CPU seconds, sentence."""
    return [cell.strip() for cell in dict(_ROW.findall(PAGE))[name].split("|")]


def unsigned(value: float) -> str:
    """A number as the page writes means."""
    return f"{value:.3f}".replace("-", "−")


def test_every_study_has_a_row_and_a_section() -> None:
    for name in STUDIES:
        assert f"| [`{name}`](#{name}) |" in PAGE, name
        assert section(name).strip()


def test_stored_results_belong_to_studies() -> None:
    assert {path.stem for path in STORED} == set(STUDIES)
    for path in RESULTS:
        found, (name, *family) = stored(path), path.stem.split("-")
        assert found["study"] == name
        assert found["settings"].get("family") == (family[0] if family else None)
        assert not found["quick"] or found["seeds"] == 1
        assert re.fullmatch(r"[0-9a-f]{7}(, [0-9a-f]{7})*", found["commit"])  # several: it was continued on another
        assert "out" not in found  # a place on somebody's disk


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_the_row_of_a_study_says_what_was_stored(path: Path) -> None:
    found = stored(path)
    form, seconds = "quick" if found["quick"] else "full", f"{found['process_cpu_seconds']:,.0f}"
    sizes = [str(found["seeds"]), str(len(found["arms"])), str(found["records"])]
    assert row(path.stem)[:6] == [f"`{found['commit']}`", form, *sizes, seconds]


def test_the_page_says_how_many_studies_ran_in_full() -> None:
    forms = [row(name)[1] for name in STUDIES]
    assert set(forms) <= {"quick", "full"}
    full, quick = forms.count("full"), forms.count("quick")
    text = " ".join(PAGE.split())
    assert f"Of the {len(STUDIES)} studies, {full} ran in full" in text
    assert (f" and {quick} in their quick form" in text) is (quick > 0)
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert (f"All {len(STUDIES)} ran in full" in readme) is (quick == 0)


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_every_number_of_a_section_is_stored(path: Path) -> None:
    found, text = stored(path), section(path.stem)
    measured = [*found["changes"].values(), *found["findings"].values()]
    known = {tuple(signed(c[k]) for k in ("change" if "change" in c else "value", "low", "high")) for c in measured}
    shown = set(CHANGE.findall(text))
    assert shown
    assert shown <= known, shown - known
    rows = [row for arm in found["arms"].values() for row in arm.values()]
    means = {unsigned(row["mean"]) for row in rows}
    spreads = {stdev(row["seeds"]) for row in rows if len(row["seeds"]) > 1}
    with_spread = {f"{unsigned(row['mean'])} ± {stdev(row['seeds']):.3f}" for row in rows if len(row["seeds"]) > 1}
    assert set(_CELL.findall(text)) <= means | with_spread
    changes = {number for each in known for number in each}
    of_seeds = {unsigned(value) for row in rows for value in row["seeds"]}
    numbers = means | changes | of_seeds | {unsigned(value) for value in spreads}
    assert set(_NUMBER.findall(text)) <= numbers, set(_NUMBER.findall(text)) - numbers
