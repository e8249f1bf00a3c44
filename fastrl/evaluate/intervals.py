"""Intervals of a difference between two sets of scores of the same records, and of their correlation: the bootstrap.

Records differ far more from each other than two models do on one record. So records are drawn with replacement and the
difference of each stays with it (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 13:
percentile intervals).
"""

from __future__ import annotations

from collections.abc import Sequence
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
    if not before or len(before) != len(after):
        raise ValueError(f"paired scores: need the same records, at least one, got {len(before)} and {len(after)}")
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"need a level in (0, 1) and at least one draw, got {level} and {draws}")
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if not np.isfinite(change).all():
        raise ValueError(f"paired scores: record {int(np.argmin(np.isfinite(change)))} has no finite difference")
    generator = np.random.default_rng(seed)
    size = max(1, _BLOCK // len(change))
    means = [
        change[generator.integers(len(change), size=(min(size, draws - at), len(change)))].mean(1)
        for at in range(0, draws, size)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(change.mean()), float(low), float(high))


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
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    generator = np.random.default_rng(seed)
    chosen = (generator.integers(len(a), size=len(a)) for _ in range(draws))
    found = [_correlation(_ranks(a[rows]), _ranks(b[rows])) for rows in chosen]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(_correlation(_ranks(a), _ranks(b)), float(low), float(high))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks [N] from 0; equal values share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else 0.0
