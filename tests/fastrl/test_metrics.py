"""What a row of metrics says of several ranks."""

from __future__ import annotations

from fastrl.metrics import over_ranks


def test_one_row_stands_for_all_ranks() -> None:
    rows = [
        {"step": 3, "loss": 1.0, "reward/max": 0.5, "reward/min": 0.1, "time/step": 2.0, "speed/tokens_per_s": 10.0},
        {"step": 3, "loss": 2.0, "reward/max": 0.7, "reward/min": 0.0, "time/step": 3.0, "speed/tokens_per_s": 20.0},
        {"step": 3, "loss": 3.0},
    ]
    assert over_ranks(rows) == {
        "step": 3, "loss": 2.0, "reward/max": 0.7, "reward/min": 0.0, "time/step": 3.0, "speed/tokens_per_s": 30.0,
    }  # fmt: skip
    assert over_ranks(rows[:1]) == rows[0]
