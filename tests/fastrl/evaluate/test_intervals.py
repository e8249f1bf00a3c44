"""The paired bootstrap: against closed forms, and what it refuses."""

from __future__ import annotations

import math
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.evaluate.intervals import (
    Interval,
    crossed_interval,
    paired_interval,
    relative_interval,
    spearman_interval,
)

Matrix = list[list[float]]


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
        ([], [], {}, r"at least one, got \[0\] and \[0\]"),
        ([1.0], [1.0, 2.0], {}, r"got \[1\] and \[2\]"),
        ([0.0, 0.0], [1.0, math.nan], {}, "record 1 has no finite difference"),
        ([0.0], [1.0], {"level": 1.0}, "a level in"),
        ([0.0], [1.0], {"draws": 0}, "at least one draw"),
    ],
)
def test_it_says_what_it_needs(before: list[float], after: list[float], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_interval(before, after, **options)


def over_both(change: np.ndarray, **options: int) -> Interval:
    """The interval of differences [S, N]."""
    return crossed_interval(np.zeros_like(change).tolist(), change.tolist(), **options)


def by_hand(change: np.ndarray, draws: int) -> np.ndarray:
    """Means of the drawn submatrices, one by one, with draws of its own."""
    random, (seeds, records) = np.random.default_rng(99), change.shape
    each = ((random.integers(seeds, size=seeds), random.integers(records, size=records)) for _ in range(draws))
    return np.array([change[np.ix_(*drawn)].mean() for drawn in each])


def test_over_seeds_and_records_it_is_the_bootstrap_of_submatrices() -> None:
    random = np.random.default_rng(5)
    change = 0.2 * random.normal(size=(5, 1)) + 0.5 * random.normal(size=(1, 60)) + 0.1 * random.normal(size=(5, 60))
    found = over_both(change, draws=20_000)
    low, high = np.quantile(by_hand(change, 20_000), [0.025, 0.975])
    assert found.change == pytest.approx(change.mean())
    assert (found.low, found.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_over_many_seeds_it_is_the_normal_interval_of_the_exact_variance() -> None:
    random, seeds, records = np.random.default_rng(6), 40, 300
    change = 0.3 * random.normal(size=(seeds, 1)) + random.normal(size=(1, records)) + random.normal(size=(40, 300))
    of_seeds = (np.eye(seeds) - 1 / seeds) / seeds**2 + 1 / seeds**2  # E[w wᵀ] of the drawn parts
    of_records = (np.eye(records) - 1 / records) / records**2 + 1 / records**2
    variance = float(np.trace(of_seeds @ change @ of_records @ change.T)) - change.mean() ** 2
    found, half = over_both(change), 1.96 * math.sqrt(variance)
    assert found.low == pytest.approx(change.mean() - half, abs=0.06 * half)
    assert found.high == pytest.approx(change.mean() + half, abs=0.06 * half)


def test_seeds_that_differ_as_wholes_give_the_quantiles_of_all_their_draws() -> None:
    values = np.array([0.0, 0.3, 1.0])
    every = values[np.stack(np.meshgrid(*[np.arange(3)] * 3), -1).reshape(-1, 3)].mean(1)  # 27 draws, equally likely
    found = over_both(np.repeat(values[:, None], 8, 1), draws=50_000)
    assert found.change == pytest.approx(values.mean())
    assert (found.low, found.high) == (pytest.approx(every.min()), pytest.approx(every.max()))  # 1/27 each: over 2.5 %
    inner = crossed_interval([[0.0]] * 3, values[:, None].tolist(), level=0.8, draws=50_000)
    assert inner[1:] == pytest.approx(np.quantile(np.repeat(every, 1000), [0.1, 0.9]))


@pytest.mark.parametrize("seeds", [3, 5])
def test_it_covers_the_truth_of_all_seeds_more_often_than_records_alone(seeds: int) -> None:
    random, runs, both, records = np.random.default_rng(seeds), 200, 0, 0
    for run in range(runs):
        change = 0.1 * random.normal(size=(seeds, 1)) + 0.3 * random.normal(size=(1, 100))
        change += 0.3 * random.normal(size=(seeds, 100))
        wide = over_both(change, draws=300, seed=run)
        narrow = paired_interval([0.0] * 100, change.mean(0).tolist(), draws=300, seed=run)
        both, records = both + (wide.low <= 0 <= wide.high), records + (narrow.low <= 0 <= narrow.high)
    assert 0.78 <= both / runs <= 0.98  # few seeds: fewer than 95 % where the spread of seeds is most of it
    assert records < both - 0.08 * runs


SIZES = st.tuples(st.integers(1, 5), st.integers(1, 12))
MATRICES = SIZES.flatmap(
    lambda size: st.lists(
        st.lists(st.floats(-1, 1, width=32), min_size=size[1], max_size=size[1]), min_size=size[0], max_size=size[0]
    )
)


@settings(max_examples=60, deadline=None)
@given(MATRICES, st.floats(-2, 2, width=32), st.floats(0.125, 4, width=32))
def test_intervals_over_both_move_and_stretch_with_the_scores(rows: Matrix, shift: float, scale: float) -> None:
    change = np.asarray(rows)
    found = over_both(change, draws=200)
    smallest, largest = change.min(), change.max()
    assert smallest - 1e-12 <= found.low <= found.high <= largest + 1e-12
    moved = over_both(scale * change + shift, draws=200)
    assert moved == pytest.approx([scale * value + shift for value in found], abs=1e-9)
    turned = over_both(-change, draws=200)
    assert turned == pytest.approx((-found.change, -found.high, -found.low), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=12), st.integers(1, 5))
def test_seeds_that_agree_are_one_seed(row: list[float], seeds: int) -> None:
    one = paired_interval([0.0] * len(row), row, draws=200)
    assert over_both(np.asarray([row] * seeds), draws=200) == pytest.approx(one, abs=1e-12)


def test_intervals_over_both_are_the_same_in_blocks_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    change = np.random.default_rng(1).normal(size=(3, 50))
    whole = over_both(change, draws=1000)
    monkeypatch.setattr("fastrl.evaluate.intervals._BLOCK", 50 * 7)
    assert over_both(change, draws=1000) == pytest.approx(whole)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([], [], "at least one"),
        ([[1.0], [1.0, 2.0]], [[1.0], [1.0, 2.0]], r"the same records, at least one, got \[1, 2\] and \[1, 2\]"),
        ([[1.0]], [[1.0], [1.0]], "the same seeds, got 1 and 2"),
        ([[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, math.inf]], "record 1 has no finite difference"),
    ],
)
def test_intervals_over_both_say_what_they_need(before: Matrix, after: Matrix, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crossed_interval(before, after)


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


def test_a_relative_change_is_a_part_of_what_there_was() -> None:
    """Both lose a quarter: no difference, though one loses twice as much."""
    before, after = [0.8, 0.4, 0.8], [0.6, 0.3, 0.6]
    half = [value / 2 for value in before], [value / 2 for value in after]
    assert relative_interval((before, after), half) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
    assert relative_interval((before, after), (before, before)) == pytest.approx((-0.25, -0.25, -0.25))
    rng = np.random.default_rng(1)
    a, b, c, d = rng.uniform(0.5, 1.0, (4, 64)).tolist()
    found = relative_interval((a, b), (c, d))
    assert found.change == pytest.approx(fmean(b) / fmean(a) - fmean(d) / fmean(c))
    assert found.low < found.change < found.high


@pytest.mark.parametrize(
    ("first", "message"),
    [(([], []), "need the same records"), (([1.0], [1.0, 2.0]), "the same records"), (([0.0], [1.0]), "before is 0")],
)
def test_a_relative_change_of_nothing_is_an_error(first: tuple[list[float], list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        relative_interval(first, (first[0], first[1]))
