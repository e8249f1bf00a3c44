"""The paired bootstrap: against closed forms, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastrl.evaluate.intervals import paired_interval, spearman_interval


@pytest.mark.parametrize("n", [200, 1000])
def test_it_is_the_normal_interval_where_records_are_many(n: int) -> None:
    random = np.random.default_rng(n)
    before = random.normal(size=n)
    after = before + 0.1 + 0.5 * random.normal(size=n)  # records differ more than the models
    change = after - before
    half = 1.96 * change.std(ddof=1) / math.sqrt(n)
    found = paired_interval(before.tolist(), after.tolist())
    assert found.change == pytest.approx(change.mean())
    assert found.low == pytest.approx(change.mean() - half, abs=0.08 * half)
    assert found.high == pytest.approx(change.mean() + half, abs=0.08 * half)


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    random, held, runs = np.random.default_rng(0), 0, 300
    for run in range(runs):
        change = random.exponential(size=80) - 1.0  # skewed, of mean 0
        found = paired_interval([0.0] * 80, change.tolist(), draws=400, seed=run)
        held += found.low <= 0.0 <= found.high
    assert 0.90 <= held / runs <= 0.98


def test_pairs_matter_and_order_does_not() -> None:
    before, after = [0.0, 1.0, 0.0, 1.0], [0.1, 1.1, 0.1, 1.1]
    found = paired_interval(before, after)
    assert found.low == pytest.approx(found.high) == pytest.approx(0.1)  # every record gains the same
    broken = paired_interval(before, after[1:] + after[:1])
    assert broken.low < -0.5 < 0.5 < broken.high


def test_the_same_seed_gives_the_same_interval_in_blocks_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    before, after = random.normal(size=(2, 50)).tolist()
    whole = paired_interval(before, after, draws=1000)
    assert whole == paired_interval(before, after, draws=1000)
    monkeypatch.setattr("fastrl.evaluate.intervals._BLOCK", 50 * 7)
    assert paired_interval(before, after, draws=1000) == pytest.approx(whole)  # numpy draws the same stream


def test_one_record_has_no_width() -> None:
    assert paired_interval([0.25], [0.75]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("before", "after", "options", "message"),
    [
        ([], [], {}, "at least one, got 0 and 0"),
        ([1.0], [1.0, 2.0], {}, "got 1 and 2"),
        ([0.0, 0.0], [1.0, math.nan], {}, "record 1 has no finite difference"),
        ([0.0], [1.0], {"level": 1.0}, "a level in"),
        ([0.0], [1.0], {"draws": 0}, "at least one draw"),
    ],
)
def test_it_says_what_it_needs(before: list[float], after: list[float], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_interval(before, after, **options)


def test_rank_correlation_is_scipys_with_ties_and_its_interval_holds_it() -> None:
    from scipy.stats import spearmanr

    random = np.random.default_rng(3)
    first = random.integers(0, 6, size=300).astype(float)
    second = first + 3 * random.normal(size=300)
    found = spearman_interval(first.tolist(), second.tolist())
    assert found.change == pytest.approx(spearmanr(first, second).statistic, abs=1e-12)
    assert found.low < found.change < found.high
    fisher = 1.96 * 1.06 / math.sqrt(300 - 3)  # of atanh, with the rank correlation's factor
    assert math.atanh(found.high) - math.atanh(found.low) == pytest.approx(2 * fisher, rel=0.15)


def test_rank_correlation_of_orders_and_constants() -> None:
    values = [0.1, 0.5, 2.0, 9.0]
    assert spearman_interval(values, [v**3 for v in values]).change == pytest.approx(1.0)
    assert spearman_interval(values, [-v for v in values]).change == pytest.approx(-1.0)
    assert spearman_interval(values, [1.0] * 4) == (0.0, 0.0, 0.0)
    for first, second in (([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([], [])):
        with pytest.raises(ValueError, match="need the same two or more records"):
            spearman_interval(first, second)
    with pytest.raises(ValueError, match="level in"):
        spearman_interval(values, values, level=1.0)
