"""README's table of demos shows what ``make verify`` wrote, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

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


def test_the_commit_and_what_is_said_of_claims_are_those_of_the_run() -> None:
    text = " ".join(README.split())
    assert f"commit `{STORED['commit']}` (`benchmarks/results/verify.json`)" in text
    assert not STORED["modified"]
    assert ("Every claim holds on every seed." in text) is (not STORED["broken"])
