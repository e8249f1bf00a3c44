"""The shipped small models are those that were measured, and score what is written of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tiny import ASSUMED, FEW, LEAST, MEASURES, RESULTS, main, scores_of, table, tolerances
from fastrl.models.open import resolve_model
from fastrl.toy.teach.stages import SHIPPED, digest

MADE: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
PAGE = Path(__file__).resolve().parents[2] / "docs" / "tiny.md"


def test_every_shipped_model_was_measured() -> None:
    assert set(MADE["models"]) == set(SHIPPED) == set(MEASURES)
    assert MADE["scenes"] >= 128


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_weights_are_those_that_were_measured(name: str) -> None:
    assert digest(resolve_model(f"tiny:{name}")) == MADE["models"][name]["sha256"]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_stated_tolerance_follows_from_the_variants(name: str) -> None:
    found = MADE["models"][name]
    assert found["tolerance"] == tolerances(found["scores"], found["variants"])


def test_the_page_shows_the_results() -> None:
    assert table(MADE["models"]) in PAGE.read_text(encoding="utf-8")


def test_a_tolerance_is_never_below_the_least_and_covers_what_was_seen() -> None:
    shipped, others = {"a": 0.5, "b": 0.5}, {"seed 1": {"a": 0.51, "b": 0.4}, "2 threads": {"a": 0.5, "b": 0.55}}
    assert tolerances(shipped, others) == {"a": LEAST, "b": 0.2}
    assert tolerances(shipped, {}) == {"a": ASSUMED, "b": ASSUMED}  # nothing was seen


@pytest.mark.gate
@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_model_scores_what_is_written(name: str) -> None:
    written, allowed = MADE["models"][name]["few"], MADE["models"][name]["tolerance"]
    found = scores_of(name, resolve_model(f"tiny:{name}"), FEW)
    assert set(found) == set(written)
    turned = 3 / FEW  # three answers in which another processor's rounding turns a token
    assert {key: found[key] for key in found if abs(found[key] - written[key]) > max(allowed[key], turned)} == {}


@pytest.mark.gate
def test_the_command_measures_variants_beside_the_shipped_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.tiny.FEW", 2)
    other = ("--variant", "video", "itself", str(resolve_model("tiny:video")))
    assert main(["--only", "video", "--scenes", "2", "--json", str(tmp_path / "made.json"), *other]) == 0
    made = json.loads((tmp_path / "made.json").read_text())["models"]["video"]
    assert made["variants"] == {"itself": made["scores"]}
    assert set(made["tolerance"].values()) == {LEAST}
    assert table({"video": made}) in capsys.readouterr().out
