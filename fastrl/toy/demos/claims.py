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


def rises(name: str = "", by: float = 0.0) -> Check:
    """``{name}after − {name}before`` is at least ``by`` on every seed; with ``by`` 0, ``after`` is not lower."""
    return lambda results: [
        f"seed {r['seed']}: {_shown(name)} changed by {change:+.4f}, less than {by:+g}"
        for r, change in _changes(results, name)
        if change < by
    ]


def falls(name: str) -> Check:
    """``{name}after`` is lower than ``{name}before`` on every seed."""
    return lambda results: [
        f"seed {r['seed']}: {_shown(name)} changed by {change:+.4f}, did not fall"
        for r, change in _changes(results, name)
        if change >= 0
    ]


def rises_beyond_spread(name: str = "") -> Check:
    """The change on every seed is positive and larger than the spread (largest − smallest change) between seeds."""

    def check(results: Sequence[Result]) -> list[str]:
        changes = list(_changes(results, name))
        spread = max((c for _, c in changes), default=0.0) - min((c for _, c in changes), default=0.0)
        return [
            f"seed {r['seed']}: {_shown(name)} changed by {change:+.4f}, the spread between seeds is {spread:.4f}"
            for r, change in changes
            if change <= max(spread, 0.0)
        ]

    return check


def _changes(results: Sequence[Result], name: str) -> list[tuple[Result, float]]:
    return [(r, r[f"{name}after"] - r[f"{name}before"]) for r in results]


def _shown(name: str) -> str:
    return name.rstrip("_") or "the score"
