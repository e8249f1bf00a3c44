"""The demos' claims: results that break them and results that do not."""

from __future__ import annotations

from typing import Any

import pytest

from fastrl.toy.demos import perception_r1, perpo, reper, utr
from fastrl.toy.demos.claims import Check, Claim, beyond_spread, gains, loses

HALF = 0.01  # half of the width of every interval


def results(*changes: float, **others: float) -> list[dict[str, Any]]:
    """A result for each seed in which the main comparison changed so; the others are given by name."""
    names = {
        **dict.fromkeys(("greedy", "UTR, greedy"), 0.2),
        **dict.fromkeys(("UTR against one frame", "UTR against one frame, greedy", "UTR against one frame, TPL"), 0.2),
        **dict.fromkeys(("turn 3, false captions", "sampled, distance", "greedy, distance"), -0.2),
        **others,
    }
    found = []
    for seed, main in enumerate(changes):
        every = {**names, **dict.fromkeys(("sampled", "PerPO", "turn 3", "UTR"), main)}
        intervals = {name: {"change": c, "low": c - HALF, "high": c + HALF} for name, c in every.items()}
        found.append({"seed": seed, "unseen": {"changes": intervals}})
    return found


@pytest.mark.parametrize(
    ("claim", "found", "broken"),
    [
        (perception_r1.CLAIM, results(0.07, 0.08, 0.07), []),
        (perception_r1.CLAIM, results(0.07, 0.055), ["seed 1: sampled"]),  # 0.055 is above 0.05, its interval is not
        (perception_r1.CLAIM, results(0.07, greedy=0.005), ["seed 0: greedy"]),
        (perception_r1.CLAIMS["counting"], results(0.07, 0.08), []),
        (perception_r1.CLAIMS["counting"], results(0.055), ["seed 0: sampled changed"]),
        (perception_r1.CLAIMS["counting"], results(0.07, greedy=0.0), ["seed 0: greedy changed"]),
        # more right counts, with points that are no nearer
        (
            perception_r1.CLAIMS["counting"],
            results(0.3, **{"sampled, distance": -0.005}),
            ["seed 0: sampled, distance"],
        ),
        (perception_r1.CLAIMS["counting"], results(0.3, **{"greedy, distance": 0.2}), ["seed 0: greedy, distance"]),
        (perception_r1.CLAIMS["ocr"], results(0.07, greedy=-0.02), []),
        (perception_r1.CLAIMS["ocr"], results(0.055, greedy=0.5), ["seed 0: sampled"]),
        (perpo.CLAIM, results(0.05, 0.08, 0.06), []),
        (perpo.CLAIM, results(0.02, 0.08), ["seed 0: PerPO"]),  # 0.02 is within the spread of 0.06
        (perpo.CLAIM, results(-0.02, -0.02), ["seed 0", "seed 1", "seed 0", "seed 1"]),
        (perpo.CLAIM, results(0.0), ["seed 0", "seed 0"]),
        (reper.CLAIM, results(0.02, 0.2), []),
        (reper.CLAIM, results(0.005), ["seed 0: turn 3"]),  # it rises, but not surely
        (reper.CLAIM, results(0.1, **{"turn 3, false captions": -0.005}), ["seed 0: turn 3, false captions"]),
        (utr.CLAIM, results(0.1, 0.1), []),
        (utr.CLAIM, results(0.1, **{"UTR against one frame, TPL": 0.0}), ["seed 0: UTR against one frame, TPL"]),
        (utr.CLAIM, results(0.1, **{"UTR, greedy": 0.055}), ["seed 0: UTR, greedy"]),
    ],
)
def test_a_claim_names_the_seeds_that_break_it(claim: Claim, found: list[dict[str, Any]], broken: list[str]) -> None:
    lines = claim.broken(found)
    assert len(lines) == len(broken)
    assert all(line.startswith(start) for line, start in zip(lines, broken, strict=True))


@pytest.mark.parametrize("check", [gains("sampled"), loses("sampled"), beyond_spread("sampled")])
def test_what_was_not_measured_holds_no_claim(check: Check) -> None:
    measured, other = results(0.2, 0.2)
    del other["unseen"]["changes"]["sampled"]  # no record has a score before and after
    assert "seed 1: sampled was not measured" in check([measured, other])
