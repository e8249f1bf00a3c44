"""Intervals of a difference between two sets of scores of the same records, and of their correlation: the bootstrap.

Records differ far more from each other than two models do on one record. So records are drawn with replacement and the
difference of each stays with it (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 13:
percentile intervals). Where models were trained with several seeds, seeds are drawn with replacement as well,
independently of records (Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1, 2007).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

DRAWS, LEVEL = 10_000, 0.95
_BLOCK = 1 << 22  # drawn records that are held at once


class Interval(NamedTuple):
    """A mean difference and the interval that holds ``LEVEL`` of the bootstrap's means."""

    change: float
    low: float
    high: float


def paired_interval(
    before: Sequence[float], after: Sequence[float], *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """The mean of ``after − before`` over records, with its percentile interval.

    Args:
        before, after: scores [N] of the same records in the same order; several scores of one record (samples) are
            averaged first, as they are not independent.
        level: of the interval, in (0, 1).
        draws: bootstrap samples.
        seed: of the drawing; the same seed gives the same interval.

    Raises:
        ValueError: no record, different numbers of scores, a score that is not finite, or a level outside (0, 1).
    """
    return crossed_interval([before], [after], level=level, draws=draws, seed=seed)


def crossed_interval(
    before: Sequence[Sequence[float]],
    after: Sequence[Sequence[float]],
    *,
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """The mean of ``after − before`` over seeds and records, with its percentile interval over both.

    Each draw takes as many seeds and as many records as there are, with replacement and independently, and averages the
    differences where they cross. With one seed it is :func:`paired_interval`. Few seeds say little of their spread: the
    part of S seeds in the variance of the drawn means is (S − 1)/S of what it should be, and of 3 seeds one draw in 9
    takes the same every time.

    Args:
        before, after: scores [S, N] of the same records in the same order, by the seed of the training; of what is not
            trained, the same scores for every seed. Several scores of one record are averaged first.
        level: of the interval, in (0, 1).
        draws: bootstrap samples.
        seed: of the drawing; the same seed gives the same interval, and draws the same records for any number of seeds.

    Raises:
        ValueError: no seed or record, different numbers of them, a score that is not finite, or a level outside (0, 1).
    """
    numbers = [len(row) for row in (*before, *after)]
    if not numbers or not numbers[0] or len(set(numbers)) > 1:
        got = f"{numbers[: len(before)]} and {numbers[len(before) :]}"
        raise ValueError(f"paired scores: need the same records, at least one, got {got}")
    if len(before) != len(after):
        raise ValueError(f"paired scores: need the same seeds, got {len(before)} and {len(after)}")
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"need a level in (0, 1) and at least one draw, got {level} and {draws}")
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if not np.isfinite(change).all():
        record = int(np.argmin(np.isfinite(change).all(0)))
        raise ValueError(f"paired scores: record {record} has no finite difference")
    parts = _parts(len(change), draws, seed)
    means = [(_drawn(change, rows) * parts[at : at + len(rows)]).sum(1) for at, rows in _rows(change, draws, seed)]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(change.mean()), float(low), float(high))


def _parts(seeds: int, draws: int, seed: int) -> np.ndarray:
    """[draws, S] float64: the part that each seed has in a draw of as many seeds; rows sum to 1."""
    drawn = np.random.default_rng((seed, seeds)).integers(seeds, size=(draws, seeds))
    return (drawn[:, :, None] == np.arange(seeds)).mean(1)


def _rows(change: np.ndarray, draws: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of drawn records [block, N], each with the number of draws before it."""
    generator, records = np.random.default_rng(seed), change.shape[1]
    size = max(1, _BLOCK // records)
    for at in range(0, draws, size):
        yield at, generator.integers(records, size=(min(size, draws - at), records))


def _drawn(change: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[block, S]: each seed's mean over drawn records."""
    return np.stack([of_seed[rows].mean(1) for of_seed in change], axis=1)


def spearman_interval(
    first: Sequence[float], second: Sequence[float], *, level: float = LEVEL, draws: int = 2000, seed: int = 0
) -> Interval:
    """Spearman's rank correlation of two scores of the same records, with its percentile interval over records.

    Args:
        first, second: [N] in the same order; equal scores share the mean of their ranks.
        level, draws, seed: see :func:`paired_interval`.

    Returns:
        ``change`` is the correlation, in [−1, 1]; 0 where one of the scores is the same for all records.

    Raises:
        ValueError: fewer than two records, different numbers of scores, or a level outside (0, 1).
    """
    if len(first) < 2 or len(first) != len(second):
        raise ValueError(f"correlated scores: need the same two or more records, got {len(first)} and {len(second)}")
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"need a level in (0, 1) and at least one draw, got {level} and {draws}")
    scores = np.asarray([first, second], dtype=np.float64)
    return _over_records(scores, lambda drawn: _correlation(*map(_ranks, drawn)), level, draws, seed)


def relative_interval(
    first: tuple[Sequence[float], Sequence[float]],
    second: tuple[Sequence[float], Sequence[float]],
    *,
    level: float = LEVEL,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """The relative change of one mean less that of another, with its percentile interval over records: 0 where both
    lose the same part of what they began with.

    Args:
        first, second: scores [N] before and after, all of the same records in the same order.
        level, draws, seed: see :func:`paired_interval`.

    Raises:
        ValueError: no record, different numbers of scores, a mean before that is 0, or a level outside (0, 1).
    """
    if len({len(scores) for scores in (*first, *second)}) > 1 or not first[0]:
        raise ValueError(f"relative change: need the same records, got {[len(s) for s in (*first, *second)]}")
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"need a level in (0, 1) and at least one draw, got {level} and {draws}")
    scores = np.asarray([*first, *second], dtype=np.float64)
    if not scores[[0, 2]].mean(1).all():
        raise ValueError("relative change: a mean before is 0")
    return _over_records(scores, _relative, level, draws, seed)


def _relative(scores: np.ndarray) -> float:
    before, after, other_before, other_after = scores.mean(1)
    return float(after / before - other_after / other_before)


def _over_records(
    scores: np.ndarray, value: Callable[[np.ndarray], float], level: float, draws: int, seed: int
) -> Interval:
    """What ``value`` makes of scores [K, N], with its percentile interval over drawn records."""
    generator, records = np.random.default_rng(seed), scores.shape[1]
    found = [value(scores[:, generator.integers(records, size=records)]) for _ in range(draws)]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value(scores), float(low), float(high))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks [N] from 0; equal values share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else 0.0
