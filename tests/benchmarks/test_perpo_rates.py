"""The learning rates of PerPO's demo are those of the recorded grid, which its page shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import perpo_rates
from benchmarks.perpo_rates import GRID, HELD_OUT, RESULTS, chosen, grid, main, merged, table
from fastrl.toy.demos.perpo import METHODS, RATES

MADE: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
PAGE = Path(__file__).resolve().parents[2] / "docs" / "perpo.md"


def rows(*scores: tuple[str, float, float]) -> list[dict[str, Any]]:
    return [{"kind": kind, "rate": rate, "sampled": sampled} for kind, rate, sampled in scores]


@pytest.mark.parametrize("family", RATES)
def test_every_kind_has_the_best_rate_of_the_same_grid(family: str) -> None:
    found = MADE[family]
    assert [(row["kind"], row["rate"]) for row in found["grid"]] == [(kind, rate) for kind in METHODS for rate in GRID]
    assert found["held_out"] == HELD_OUT
    assert RATES[family] == found["chosen"] == chosen(found["grid"])
    assert min(GRID) < min(RATES[family].values()) <= max(RATES[family].values()) < max(GRID)  # none at an end


@pytest.mark.parametrize("family", RATES)
def test_the_page_shows_the_grid(family: str) -> None:
    assert table(MADE[family]["grid"]) in PAGE.read_text(encoding="utf-8")


def test_the_highest_is_chosen_and_of_equal_ones_the_lowest_rate() -> None:
    found = rows(("dpo", 1e-4, 0.3), ("dpo", 5e-5, 0.3), ("dpo", 2e-4, 0.2), ("sft", 1e-4, 0.3), ("sft", 2e-4, 0.4))
    assert chosen(found) == {"dpo": 5e-5, "sft": 2e-4}


def test_the_table_marks_what_was_chosen() -> None:
    assert table(rows(("perpo", 1e-4, 0.3), ("perpo", 5e-5, 0.25))).splitlines() == [
        "| learning rate | 5e-05 | 0.0001 |",
        "|---|--:|--:|",
        "| PerPO | 0.250 | **0.300** |",
    ]


def test_more_rates_join_those_of_before() -> None:
    before, new = rows(("perpo", 1e-4, 0.3), ("sft", 1e-4, 0.2)), rows(("sft", 1e-4, 0.25), ("perpo", 5e-5, 0.1))
    assert merged(before, new) == rows(("perpo", 5e-5, 0.1), ("perpo", 1e-4, 0.3), ("sft", 1e-4, 0.25))


@pytest.mark.gate
def test_a_grid_trains_every_kind_at_every_rate(tmp_path: Path) -> None:
    found = grid("qwen2_5_vl", tmp_path, rates=(1e-4, 2e-4), prompts=24, steps=1, n=4)
    assert [(row["kind"], row["rate"]) for row in found] == [(k, rate) for k in METHODS for rate in (1e-4, 2e-4)]
    assert all(0 <= row["sampled"] <= 1 for row in found)
    assert len({row["sampled"] for row in found}) > 1


def test_the_command_keeps_other_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = rows(("perpo", 5e-5, 0.25), ("perpo", 1e-4, 0.3))
    monkeypatch.setattr(perpo_rates, "grid", lambda family, out, rates: [r for r in tried if r["rate"] in rates])
    file = tmp_path / "made.json"
    file.write_text('{"llava": 1}')
    command = ["--out", str(tmp_path / "runs"), "--json", str(file)]
    assert main([*command, "--rates", "1e-4"]) == main([*command, "--rates", "5e-5"]) == 0
    made = json.loads(file.read_text())
    assert made["llava"] == 1
    assert made["qwen2_5_vl"]["chosen"] == {"perpo": 1e-4}
    assert [{**row, "commit": made["qwen2_5_vl"]["commit"]} for row in tried] == made["qwen2_5_vl"]["grid"]
