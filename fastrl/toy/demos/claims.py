"""Claims of the demos about their results over seeds: one sentence each, with a check that finds violations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]  # what a demo's ``run`` returns
Check = Callable[[Sequence[Result]], list[str]]


@dataclass(frozen=True)
class Claim:
    """A demo's claim. Every demo module has one as ``CLAIM``."""

    text: str
    checks: tuple[Check, ...]

    def broken(self, results: Sequence[Result]) -> list[str]:
        """Violations in the results of one demo on several seeds, one line each; empty if the claim holds."""
        return [line for check in self.checks for line in check(results)]


def gains(comparison: str, above: float = 0.0) -> Check:
    """On every seed the whole 95 % interval of a comparison on the reported set lies above ``above``."""
    return lambda results: [
        *_missing(results, comparison),
        *(
            f"seed {seed}: {comparison} changed by {_shown(c)}, not above {above:g}"
            for seed, c in _compared(results, comparison)
            if c["low"] <= above
        ),
    ]


def loses(comparison: str) -> Check:
    """On every seed the whole interval lies below 0."""
    return lambda results: [
        *_missing(results, comparison),
        *(
            f"seed {seed}: {comparison} changed by {_shown(c)}, not below 0"
            for seed, c in _compared(results, comparison)
            if c["high"] >= 0
        ),
    ]


def beyond_spread(comparison: str) -> Check:
    """The change on every seed is larger than the spread (largest − smallest change) between seeds."""

    def check(results: Sequence[Result]) -> list[str]:
        changes = [(seed, c["change"]) for seed, c in _compared(results, comparison)]
        spread = max((c for _, c in changes), default=0.0) - min((c for _, c in changes), default=0.0)
        return [
            *_missing(results, comparison),
            *(
                f"seed {seed}: {comparison} changed by {changed:+.4f}, the spread between seeds is {spread:.4f}"
                for seed, changed in changes
                if changed <= max(spread, 0.0)
            ),
        ]

    return check


def _compared(results: Sequence[Result], comparison: str) -> list[tuple[int, Mapping[str, float]]]:
    found = [(r["seed"], r["unseen"]["changes"].get(comparison)) for r in results]
    return [(seed, change) for seed, change in found if change is not None]


def _missing(results: Sequence[Result], comparison: str) -> list[str]:
    """Seeds without the comparison, as no record has both scores: what was not measured holds no claim."""
    seeds = [r["seed"] for r in results if comparison not in r["unseen"]["changes"]]
    return [f"seed {seed}: {comparison} was not measured" for seed in seeds]


def _shown(found: Mapping[str, float]) -> str:
    return f"{found['change']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
