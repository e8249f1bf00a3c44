"""Metrics of several ranks in one row."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastrl.run.metrics import group_metrics, over_ranks, sampler_gap
from tests.helpers.scripted import text_group


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


def test_tokens_that_were_not_evaluated_are_no_gap() -> None:
    batch: Any = SimpleNamespace(per_token={"sampler_logp": torch.tensor([-1.0, -2.0, -3.0])})
    gap = sampler_gap(torch.tensor([-1.5, torch.inf, -3.0]), batch)
    assert gap["sampler/gap_mean"].item() == pytest.approx(0.25)
    assert gap["sampler/gap_max"].item() == pytest.approx(0.5)
    assert gap["sampler/ratio_mean"].item() == pytest.approx((torch.tensor(-0.5).exp().item() + 1) / 2)
    none = sampler_gap(torch.full((3,), torch.inf), batch)
    assert [none[f"sampler/{name}"].item() for name in ("gap_mean", "gap_max", "ratio_mean")] == [0.0, 0.0, 1.0]


def test_one_answer_has_no_spread_of_rewards() -> None:
    def rewarded(*rewards: float) -> Any:
        found = text_group([2] * len(rewards), [0.0] * len(rewards))
        for completion, reward in zip(found.completions, rewards, strict=True):
            completion.scalars["reward"] = reward
        return found

    alone = group_metrics([rewarded(0.5), rewarded(0.7)])
    assert alone["reward/mean"] == pytest.approx(0.6)
    assert "reward/group_std" not in alone  # 0 would be taken for groups without anything to learn from
    assert group_metrics([rewarded(0.5), rewarded(0.2, 0.4)])["reward/group_std"] == pytest.approx(0.1)
    assert group_metrics([rewarded(0.5, 0.5)])["reward/group_std"] == 0.0
