"""The demos' claims: results that break them and results that do not."""

from __future__ import annotations

from typing import Any

import pytest

from fastrl.toy.demos import perception_r1, perpo, reper
from fastrl.toy.demos.claims import Claim


def results(*changes: float, greedy: float = 0.0, false: float = -0.1) -> list[dict[str, Any]]:
    return [
        {
            "seed": seed,
            "before": 0.4,
            "after": 0.4 + change,
            "greedy_before": 0.6,
            "greedy_after": 0.6 + greedy,
            "false_captions_before": 0.5,
            "false_captions_after": 0.5 + false,
        }
        for seed, change in enumerate(changes)
    ]


@pytest.mark.parametrize(
    ("claim", "found", "broken"),
    [
        (perception_r1.CLAIM, results(0.06, 0.08, 0.07), []),
        (perception_r1.CLAIM, results(0.06, 0.04), ["seed 1: the score"]),
        (perception_r1.CLAIM, results(0.06, greedy=-0.002), ["seed 0: greedy"]),
        (perpo.CLAIM, results(0.05, 0.08, 0.06), []),
        (perpo.CLAIM, results(0.02, 0.08), ["seed 0: the score"]),  # 0.02 is within the spread of 0.06
        (perpo.CLAIM, results(-0.01, -0.01), ["seed 0", "seed 1"]),
        (perpo.CLAIM, results(0.0), ["seed 0"]),
        (reper.CLAIM, results(0.01, 0.2), []),
        (reper.CLAIM, results(0.0), ["seed 0: the score"]),
        (reper.CLAIM, results(0.1, false=0.0), ["seed 0: false_captions"]),
    ],
)
def test_a_claim_names_the_seeds_that_break_it(claim: Claim, found: list[dict[str, Any]], broken: list[str]) -> None:
    lines = claim.broken(found)
    assert len(lines) == len(broken)
    assert all(line.startswith(start) for line, start in zip(lines, broken, strict=True))
