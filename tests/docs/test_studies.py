"""``docs/studies.md`` shows what the stored results of studies hold, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastrl.studies import STUDIES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
STORED = sorted((ROOT / "benchmarks" / "results" / "studies").glob("*.json"))
_CHANGE = re.compile(r"([+−]\d+\.\d{3}) \[([+−]\d+\.\d{3}), ([+−]\d+\.\d{3})\]")
_CELL = re.compile(r"\| *(−?\d+\.\d{3}) *(?=\|)")


def stored(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def section(name: str) -> str:
    """The page's section about a study."""
    return PAGE.split(f"\n### {name}\n")[1].split("\n### ")[0]


def signed(value: float) -> str:
    """A number as the page writes changes."""
    return f"{value:+.3f}".replace("-", "−")


def test_every_study_has_a_row_and_a_section() -> None:
    for name in STUDIES:
        assert f"| [`{name}`](#{name}) |" in PAGE, name
        assert section(name).strip()


def test_stored_results_belong_to_studies() -> None:
    assert {path.stem for path in STORED} <= set(STUDIES)
    assert len(STORED) >= 1
    for path in STORED:
        found = stored(path)
        assert (found["study"], found["quick"]) == (path.stem, True)
        assert re.fullmatch(r"[0-9a-f]{7}", found["commit"])
        assert "out" not in found  # a place on somebody's disk


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_the_row_of_a_study_says_what_was_stored(path: Path) -> None:
    found = stored(path)
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| [`{path.stem}`]"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    seconds = f"{found['process_cpu_seconds']:.0f}"
    assert cells[1:5] == [f"`{found['commit']}`", str(len(found["arms"])), str(found["records"]), seconds]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_every_number_of_a_section_is_stored(path: Path) -> None:
    found, text = stored(path), section(path.stem)
    measured = [*found["changes"].values(), *found["findings"].values()]
    known = {tuple(signed(c[k]) for k in ("change" if "change" in c else "value", "low", "high")) for c in measured}
    shown = set(_CHANGE.findall(text))
    assert shown
    assert shown <= known, shown - known
    means = {f"{row['mean']:.3f}".replace("-", "−") for arm in found["arms"].values() for row in arm.values()}
    assert set(_CELL.findall(text)) <= means
