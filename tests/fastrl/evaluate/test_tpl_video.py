"""Temporal perplexity of a model trained on clips: near 0 if one frame determines the text, higher if order matters."""

from __future__ import annotations

from statistics import fmean

import pytest

from fastrl.data import load_data
from fastrl.evaluate.tpl import TemporalPerplexity, temporal_perplexity
from fastrl.models import Policy
from fastrl.models.open import open_policy


@pytest.fixture(scope="module")
def policy() -> Policy:
    return open_policy("tiny:video", device="cpu")


def measure(policy: Policy, task: str, **options: int | str) -> list[TemporalPerplexity]:
    rows = load_data(f"scenes:{task}?n=16&seed=4242&size=84&difficulty=2")
    return temporal_perplexity(policy, rows, **options)  # type: ignore[arg-type]


def test_a_text_that_one_frame_explains_has_none(policy: Policy) -> None:
    """Every frame shows which shapes there are, though not all of them equally well."""
    found = measure(policy, "shown", curve=1)
    assert abs(fmean(result.tpl for result in measure(policy, "shown", single="best"))) < 0.1
    assert fmean(result.tpl for result in found) < 0.2
    assert fmean(len(result.explaining(0.2)) for result in found) > 4.5  # of six frames


@pytest.mark.parametrize("single", ["random", "best"])
def test_a_text_that_needs_the_order_has_some(policy: Policy, single: str) -> None:
    """Each shape's position by frame, and its actions over time: no single frame determines the answer."""
    told = measure(policy, "shown", single=single)
    found = measure(policy, "utr", single=single)
    assert fmean(result.tpl for result in found) > 0.2
    assert fmean(result.tpl for result in found) > fmean(result.tpl for result in told) + 0.2
    assert sum(result.tpl > 0 for result in found) >= 15
    assert all(not result.explaining() for result in found if result.tpl > 0.1)
