"""Recipe keys that choose a loss, the form of a reward or an advantage, against TRL's own functions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.batch import PackedBatch
from fastrl.config.sections import RewardRecipe
from fastrl.methods.perception_r1 import PerceptionR1Options, grpo_loss, overlong_penalty
from fastrl.methods.rollouts import RecipeRewards
from fastrl.recipe import RecipeError, load_recipe
from fastrl_kernels.token_weights import token_weights
from tests.helpers.scripted import scored, scripted
from tests.helpers.trl_losses import AGGREGATES, B, Batch, T, TrlTrainer


def packed(batch: Batch, sampler: Tensor | None, aggregate: dict[str, Any]) -> PackedBatch:
    """The part of a packed batch that a loss reads."""
    tokens = {"old_logp": batch.old, "ref_logp": batch.ref, "sampler_logp": sampler}
    per_token = {name: value[batch.rows] for name, value in tokens.items() if value is not None}
    per_token["weight"] = token_weights(batch.ids, n_completions=B, dtype=torch.float64, **aggregate)
    found = {"per_token": per_token, "per_completion": {"advantage": batch.advantage}, "completion_of_token": batch.ids}
    return SimpleNamespace(**found)  # type: ignore[return-value]


def trl_loss(batch: Batch, ratio: Tensor | None = None, **settings: Any) -> Tensor:
    """TRL's loss; ``ratio`` are its importance weights."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    trainer = TrlTrainer(batch, beta=0.04, **settings)
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = ratio is not None
    inputs = {
        "prompt_ids": torch.zeros(B, 1), "prompt_mask": torch.ones(B, 1), "completion_ids": torch.zeros(B, T),
        "completion_mask": batch.mask, "advantages": batch.advantage, "ref_per_token_logps": batch.ref,
        "num_items_in_batch": torch.tensor(100.0), "old_per_token_logps": batch.old, "importance_sampling_ratio": ratio,
    }  # fmt: skip
    return grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)


SEQUENCE, TOKEN = AGGREGATES["grpo"], AGGREGATES["dapo"]
LOSSES = {
    "grpo": ({}, {"loss_type": "grpo"}, SEQUENCE),
    "cispo": ({"clip_low": 1, "clip_high": 0.2}, {"loss_type": "cispo", "epsilon_high": 1.2}, TOKEN),
    "sapo": ({"tau_negative": torch.tensor(1.05).item()}, {"loss_type": "sapo"}, SEQUENCE),
    "gspo": ({}, {"loss_type": "grpo", "level": "sequence"}, SEQUENCE),
    "gspo-token": ({}, {"loss_type": "grpo", "level": "sequence"}, SEQUENCE),  # equal: one advantage per answer
}


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("importance", ["none", "truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_trl_losses_by_key(loss: str, importance: str, level: str) -> None:
    if (loss, level) == ("gspo-token", "token") and importance != "none":
        with pytest.raises(ValueError, match="importance_level: sequence"):
            PerceptionR1Options.model_validate({"loss": loss, "importance": importance, "importance_level": level})
        return
    batch = Batch()
    own, settings, aggregate = LOSSES[loss]
    sampler, ratio = None, None
    if importance != "none":
        sampler = batch.old - 0.2 * torch.randn(B, T, dtype=torch.float64)
        gap = (batch.old - sampler) * batch.mask
        ratio = (gap.sum(1, keepdim=True) if level == "sequence" else gap).exp()
        ratio = ratio.clamp(max=1.1) if importance == "truncate" else ratio.masked_fill(ratio > 1.1, 0)
    keys = {"clip_low": 0.15, "clip_high": 0.25, "beta": 0.04, "loss": loss, "importance_cap": 1.1, **own}
    options = PerceptionR1Options.model_validate({**keys, "importance": importance, "importance_level": level})
    want = trl_loss(batch, ratio, **settings)
    got, _ = grpo_loss(batch.logp[batch.rows], None, packed(batch, sampler, aggregate), options)
    batch.same(got, want)


def test_importance_without_the_samplers_log_probs_is_said() -> None:
    batch = Batch()
    with pytest.raises(ValueError, match="needs the sampler's log-probs"):
        grpo_loss(
            batch.logp[batch.rows],
            None,
            packed(batch, None, SEQUENCE),
            PerceptionR1Options.model_validate({"importance": "mask"}),
        )


@pytest.mark.parametrize(("most", "cache"), [(20, 5), (20, 20), (7, 1)])
def test_trl_overlong(most: int, cache: int) -> None:
    peer = pytest.importorskip("trl.rewards").get_soft_overlong_punishment(most, cache)
    want = peer(completion_ids=[[0] * n for n in range(most + 3)])
    assert [overlong_penalty(n, most, cache) for n in range(most + 3)] == pytest.approx(want)


def test_overlong_is_a_component_that_is_weighed() -> None:
    totals = []
    sections: tuple[dict[str, Any], ...] = ({}, {"overlong": 3, "weights": {"overlong": 0.5}})
    for section in sections:
        method, groups = scored(["[1, 2, 3, 4]", "nothing"])
        method._rewards = RecipeRewards(RewardRecipe(**section))
        method._rewards.check([g.record for g in groups if g.record is not None])
        method.context.rollout = method.context.rollout.model_copy(update={"max_new_tokens": 4})
        for group in groups:
            for n, completion in enumerate(group.completions):
                completion.token_ids = torch.zeros(4 - 2 * n, dtype=torch.int64)
        method._score(groups)
        totals.append([c.scalars["reward"] for g in groups for c in g.completions])
    penalties = [c.rewards["overlong"] for g in groups for c in g.completions]
    assert penalties == pytest.approx([-1.0, -1 / 3])
    assert totals[1] == pytest.approx([t + 0.5 * p for t, p in zip(totals[0], penalties, strict=True)])


def test_overlong_beyond_the_longest_answer_and_under_another_method_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"must not exceed rollout\.max_new_tokens"):
        load_recipe("perception-r1-counting-tiny", {"reward.overlong": 10**5})
    with pytest.raises(RecipeError, match=r"reward\.overlong is only read with"):
        load_recipe("perpo-grounding-tiny", {"reward.overlong": 1})


@pytest.mark.parametrize("normalise", ["sum", "each"])
def test_trl_normalisation_of_several_rewards(normalise: str) -> None:
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    parts = torch.rand(12, 2, dtype=torch.float64)
    flat = torch.tensor([[0.3, 0.7]] * 4, dtype=torch.float64)  # at the end, a group whose rewards are equal
    method = scripted({name: [0.0] * 4 for name in "abcd"}, normalise=normalise)
    groups = method._sample(method.context.stream.take(4))
    for completion, row in zip((c for g in groups for c in g.completions), [*parts, *flat], strict=True):
        completion.rewards = {"one": float(row[0]), "two": float(row[1])}
        completion.scalars["reward"] = float(row.sum())
    result = method._advantages(groups)
    grouped = torch.cat([parts, flat]).view(-1, 4, 2)
    if normalise == "each":
        each = (grouped - grouped.mean(1, keepdim=True)) / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
        total = each.view(-1, 2).nansum(1)
        want = (total - total.mean()) / (nanstd(total) + 1e-4)
    else:
        total = grouped.sum(2)
        want = ((total - total.mean(1, keepdim=True)) / (nanstd(total, dim=1).unsqueeze(1) + 1e-4)).flatten()
    torch.testing.assert_close(result.advantage, want)
    assert result.constant.tolist() == [False, False, False, True]
    assert not result.advantage[12:].any()


def test_rloo_is_leave_one_out_without_scale() -> None:
    rewards = torch.rand(2, 4, dtype=torch.float64)
    method = scripted(dict(zip("ab", rewards.tolist(), strict=True)), baseline="rloo")
    prepared = method.prepare(method.context.stream.take(2))
    got = [c.scalars["advantage"] for g in prepared.groups for c in g.completions]
    want = rewards - (rewards.sum(1, keepdim=True) - rewards) / 3
    assert got == pytest.approx(want.flatten().tolist())
