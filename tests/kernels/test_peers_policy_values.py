"""Advantages, importance weights and policy losses: the numbers that other libraries' own tests assert.

verl (``tests/trainer/ppo``, ``tests/utils``), TRL (``test_utils``, ``test_core``, ``test_grpo_trainer``,
``test_gpg_trainer``) and Liger (``test_grpo_loss``); each test names theirs. Their code is called, on random ones, in
``test_parity`` and ``integrations``.
"""

from __future__ import annotations

from itertools import product
from math import exp, log, nan, sqrt

import pytest
import torch
from torch import Tensor

from fastrl_kernels import group_advantage, policy_loss, token_weights

pytestmark = pytest.mark.usefixtures("path")

# ---- verl: importance weights of the rollout


def importance_weights(gap: list[list[float]], **options: object) -> Tensor:
    """The factor of every token's objective: its gradient at ratio 1 and advantage 1. ``gap`` is old minus rollout."""
    old = torch.full((len(gap), len(gap[0])), -2.0, requires_grad=True)
    loss = policy_loss(
        old, torch.ones(len(gap)), old_logp=old.detach(), sampler_logp=old.detach() - torch.tensor(gap),
        aggregate="constant", normalizer=1.0, **options,  # type: ignore[arg-type]
    ).loss  # fmt: skip
    return -torch.autograd.grad(loss, old)[0]


@pytest.mark.parametrize("importance", ["truncate", "mask"])
def test_verls_weights_within_the_bound(importance: str) -> None:
    """``test_mask_mode``: old -2, rollout -1 and -2.5, at most 2. Its lower bound, 0.5, is a mask of the caller's."""
    found = importance_weights([[-1.0] * 5, [0.5] * 5], importance=importance, importance_cap=2.0)
    torch.testing.assert_close(found, torch.tensor([[0.368] * 5, [1.649] * 5]), rtol=0, atol=5e-4)


def test_verls_weights_are_capped_and_never_zeroed() -> None:
    """``test_basic_rollout_is``: at most the threshold; a token 15 nats less likely keeps a weight above 0."""
    gap = [[0.0, 0, -15, 0, 0], [0, 3, 0, 0, 0]]
    found = importance_weights(gap, importance="truncate", importance_cap=2.0)
    torch.testing.assert_close(found, torch.tensor([[1, 1, exp(-15), 1, 1], [1, 2, 1, 1, 1]]))


def test_verls_sequence_weights_are_one_number() -> None:
    """``test_basic_rollout_is``: the same for every token, at most 5."""
    gap = [[0.1, 0.2, -0.1, 0.3, 0.1], [1.0, 1, 1, 0, 0]]
    found = importance_weights(gap, importance="truncate", importance_level="sequence", importance_cap=5.0)
    torch.testing.assert_close(found, torch.tensor([[exp(0.6)] * 5, [5.0] * 5]))


def test_verls_icepop_loss() -> None:
    """``test_exact_icepop_matches_filtered_weighted_ppo_loss``: above 5 a weight is 0; the mean is over all rows."""
    old, advantage = torch.full((3,), -1.0), torch.tensor([1.0, -1.0, 2.0])
    found = policy_loss(
        old, advantage, torch.arange(3), old_logp=old, sampler_logp=torch.tensor([-0.5, -3.5, -0.8]),
        importance="mask", importance_cap=5.0, aggregate="token",
    )  # fmt: skip
    expected = -(torch.tensor([0.60653067, 0.0, 0.81873075]) * advantage).mean()
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=1e-6)


# ---- verl: advantages


def test_verls_dimensions_normalised_before_their_sum() -> None:
    """``test_gdpo_normalizes_each_reward_dimension_before_sum``, ``test_gdpo_weights_change_the_aggregation``."""

    def summed(accuracy: list[float], layout: list[float], weight: float = 1.0) -> Tensor:
        parts = [group_advantage(part, 2, eps=1e-6).advantage for part in (accuracy, layout)]
        return parts[0] + weight * parts[1]

    found = summed([1, 0, 0, 1], [0, 1, 0, 1])
    torch.testing.assert_close(found, torch.tensor([0, 0, -sqrt(2), sqrt(2)]), rtol=1e-5, atol=1e-6)
    accuracy, layout = [0.0, 1, 1, 0], [1.0, 0, 1, 0]
    assert not torch.allclose(summed(accuracy, layout), summed(accuracy, layout, weight=5.0))


def test_verls_rewards_of_low_variance() -> None:
    """``test_grpo_vectorized_matches_original_for_low_variance_rewards``: differences of 1e-5 keep their digits."""
    rewards = torch.tensor([1.0, 1.00001, 2.0, 2.00001])
    half = (rewards[1::2].double() - rewards[::2].double()) / 2  # of what float32 holds
    expected = (half / (sqrt(2) * half + 1e-6)).repeat_interleave(2) * torch.tensor([-1, 1, -1, 1])
    torch.testing.assert_close(group_advantage(rewards, 2, eps=1e-6).advantage, expected.float(), rtol=1e-4, atol=0)


def test_verls_variances_of_groups() -> None:
    """``test_selects_smallest_stable_variance_mass_prefix``: two groups of three have 26/28 of the variance."""
    variance = group_advantage([-3.0, -2, 3, 2, -1, 1], [0, 1, 0, 1, 2, 2]).std.square()
    torch.testing.assert_close(variance, torch.tensor([18.0, 8, 2]))
    assert (variance[:2].sum() / variance.sum()).item() == pytest.approx(26 / 28)


def test_verls_gpg_group() -> None:
    """``test_gpg_applies_n_over_nonzero_scaling``: rewards 4 and 0, times 2 rewards over 1 that is not 0."""
    assert (2 * group_advantage([4.0, 0.0], 2, scale="none").advantage).tolist() == [4, -4]


RESPONSES = torch.tensor(list(product((0.0, 1.0), repeat=3)), dtype=torch.float64)


def expected_gradient(size: int, **options: str) -> tuple[Tensor, Tensor]:
    """The estimate's expectation over all groups of ``size`` responses of verl's three-token policy; and the truth."""
    chance = torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64).sigmoid()
    likely, score = torch.where(RESPONSES == 1, chance, 1 - chance).prod(1), RESPONSES - chance
    reward = RESPONSES @ torch.tensor([2.0, 1, -1], dtype=torch.float64)
    groups = torch.cartesian_prod(*[torch.arange(8)] * size)
    advantage = group_advantage(reward[groups].flatten(), size, **options).advantage.view(groups.shape)  # type: ignore[arg-type]
    each = (advantage[:, :, None] * score[groups]).mean(1)
    return likely[groups].prod(1) @ each, (likely * reward) @ score


@pytest.mark.parametrize("size", [2, 3, 4])
def test_verls_expected_policy_gradients(size: int) -> None:
    """``test_advantage_estimator_gradient_on_cpu``: RLOO is unbiased, the group's mean shortens by (G - 1) / G, and the
    std turns the direction."""
    found, truth = expected_gradient(size, baseline="leave_one_out", scale="none")
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)
    found, truth = expected_gradient(size, scale="none")
    torch.testing.assert_close(found, truth * (size - 1) / size, rtol=0, atol=1e-9)
    found, truth = expected_gradient(size)
    ratio = found / truth
    assert ratio.max() - ratio.min() > 1e-3


# ---- verl: losses and their sums


@pytest.mark.parametrize(("dual_clip", "expected"), [(None, 10.0), (3.0, 3.0)])
def test_verls_standard_and_dual_clip(dual_clip: float | None, expected: float) -> None:
    """``test_vanilla_without_dual_clip_matches_standard_ppo``: ratio 10, advantage -1."""
    logp = torch.tensor([[log(10.0)]])
    found = policy_loss(logp, torch.tensor([-1.0]), old_logp=torch.zeros(1, 1), dual_clip=dual_clip)
    assert found.loss.item() == pytest.approx(expected)
    assert (found.clip_low_fraction, found.clip_high_fraction) == (0, 0)


def test_verls_clipped_gradient_is_zero() -> None:
    """``test_negative_advantage_gradient_survives_where_ppo_clips_to_zero``: ratio e^-5, advantages -1 and -0.5."""
    old = torch.full((2, 8), -1.0)
    logp = (old - 5).requires_grad_()
    found = policy_loss(logp, torch.tensor([-1.0, -0.5]), old_logp=old)
    assert not torch.autograd.grad(found.loss, logp)[0].any()
    assert found.clip_low_fraction == 1


def test_verls_unclipped_importance_sampling() -> None:
    """``test_importance_sampling_matches_direct_formula_and_gradient``: advantages by token, the third masked."""
    old, logp = torch.tensor([-1.0, -0.7, -0.2]), torch.tensor([-0.8, -0.9, -0.1], requires_grad=True)
    advantage, mask = torch.tensor([2.0, -1.5, 9.0]), torch.tensor([1, 1, 0])
    loss = policy_loss(
        logp, advantage, torch.arange(3), mask=mask, old_logp=old, clip_low=1.0, clip_high=1e6
    ).loss  # fmt: skip
    each = torch.tensor([-2 * exp(0.2) / 2, 1.5 * exp(-0.2) / 2, 0])
    torch.testing.assert_close(loss.detach(), each.sum())
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], each)


def test_verls_weights_of_samples() -> None:
    """``test_ppo_loss_applies_per_sample_loss_weight_to_policy_gradient``: -0.625."""
    weight = torch.tensor([[0.25, 0.25], [0.5, 0.5]]) / 4
    found = policy_loss(torch.zeros(2, 2), torch.tensor([1.0, 2.0]), old_logp=torch.zeros(2, 2), weight=weight)
    assert found.loss.item() == -0.625


VERL_ROWS = torch.arange(1.0, 13).view(3, 4)
VERL_MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]])


@pytest.mark.parametrize(
    ("rows", "mask", "normalizer", "expected"),
    [
        (VERL_ROWS, VERL_MASK, 3 * 4, 2.5),
        (VERL_ROWS, VERL_MASK, 3 * 10, 1.0),
        (torch.arange(1.0, 13).view(4, 3), torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 1]]), 4 * 6, 53 / 24),
        (torch.arange(1.0, 10).view(3, 3), torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]]), 2 * 3, 10 / 6),
        (torch.arange(1.0, 10).view(3, 3), torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]]), 3 * 3, 10 / 9),
    ],
)
def test_verls_sums_over_a_constant(rows: Tensor, mask: Tensor, normalizer: int, expected: float) -> None:
    """``test_loss_aggregation_on_cpu``: also in parts that are added up, as of data-parallel processes."""
    ids = torch.arange(len(rows))[:, None].expand(rows.shape)
    weight = token_weights(ids, aggregate="constant", mask=mask, normalizer=float(normalizer))
    torch.testing.assert_close(weight, mask / normalizer)
    assert (weight * rows).sum().item() == pytest.approx(expected)
    parts = [
        (
            token_weights(ids[part], aggregate="constant", mask=mask[part], normalizer=float(normalizer)) * rows[part]
        ).sum()
        for part in (slice(0, 2), slice(2, None))
    ]
    assert sum(parts).item() == pytest.approx(expected)  # type: ignore[union-attr]


@pytest.mark.parametrize("gap", [0.2, -0.3])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_verls_divergences_without_padding(gap: float, padding: int) -> None:
    """``test_offpolicy_metrics_padding_on_cpu``: k1 and k3 of the rollout to the trained policy; rows of padding."""
    old = torch.tensor([[-1.0, -7.0, -2.0, -7.0], *[[-3.0] * 4] * padding, [-3.0, -2.0, -1.0, -7.0]])
    rollout = old + gap
    rollout[1 : 1 + padding] = -4.0
    mask = torch.tensor([[1, 0, 1, 0], *[[0] * 4] * padding, [1, 1, 1, 0]])
    for kind, expected in (("k1", gap), ("k3", exp(-gap) + gap - 1)):
        found = policy_loss(rollout, torch.zeros(len(old)), ref_logp=old, mask=mask, kl=kind)
        assert found.kl.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("value", "mask", "expected"),
    [([1.0, 2, 3, 4], [1, 0, 0, 1], 2.5), ([1.0, 2, nan, 4], [1, 0, 0, 1], 2.5), ([1.0, 2, nan, 4], [1, 0, 1, 0], nan)],
)
def test_verls_masked_mean(value: list[float], mask: list[int], expected: float) -> None:
    """``test_masked_mean``, as the mean of k1 to a reference of 0."""
    reference, counted = torch.zeros(1, 4), torch.tensor([mask])
    found = policy_loss(torch.tensor([value]), torch.zeros(1), ref_logp=reference, mask=counted, kl="k1")
    assert found.kl.item() == pytest.approx(expected, nan_ok=True)


def test_verls_masked_nan() -> None:
    """``test_apply_kl_penalty_masks_invalid_logprob_nans_on_cpu``."""
    logp = torch.tensor([[0.0, nan]])
    found = policy_loss(logp, torch.ones(1), old_logp=logp, ref_logp=logp, mask=torch.tensor([[1, 0]]), beta=0.1)
    assert (found.loss, found.kl) == (-1, 0)


# ---- TRL


def test_trls_nanstd() -> None:
    """``TestNanStd``: what is NaN there belongs to no group here; a group of one has a std of 0, not NaN."""
    found = group_advantage([1.0, 2, 3, 9, 3, 5, 7], [0, 0, 0, -1, 1, 1, 2])
    torch.testing.assert_close(found.std, torch.tensor([1.0, 1.4142135, 0.0]))


def test_trls_masked_mean_variance_and_whitening() -> None:
    """``test_core``: 1, 2, 3, 4 of which the middle two count."""
    found = group_advantage([1.0, 2, 3, 4], [-1, 0, 0, -1], eps=1e-8)
    assert (found.mean.item(), found.std.item() ** 2) == (2.5, pytest.approx(0.5))
    torch.testing.assert_close(found.advantage, torch.tensor([0, -sqrt(0.5), sqrt(0.5), 0]))
    weight = token_weights(torch.zeros(4, dtype=torch.int64), aggregate="token", mask=torch.tensor([0, 1, 1, 0]))
    assert weight @ torch.tensor([1.0, 2, 3, 4]) == 2.5


@pytest.mark.parametrize(
    ("rewards", "size", "fraction"),
    [
        ([0.0, 1, 2, 5, 5, 5], 3, 1 / 2),
        ([0.0, 1, 2], 3, 1),
        ([5.0] * 6, 3, 0),
        ([0.0, 2, 5, 5, 5, 5], 2, 1 / 3),
        ([5.0, 5, 0, 2], 2, 1 / 2),
        ([2.9, 2.9, 2.9, 3.1, 3.1, 3.1], 3, 0),  # whose mean is rounded
        ([1.0, 1, 1 + 2**-23], 3, 1),
    ],
)
def test_trls_groups_that_carry_a_signal(rewards: list[float], size: int, fraction: float) -> None:
    """``TestGPGTrainer``: the share of groups that are not constant; no rounding reaches the others' advantages."""
    found = group_advantage(rewards, size, scale="none")
    assert 1 - found.constant.float().mean().item() == pytest.approx(fraction)
    quiet = found.advantage[found.constant.repeat_interleave(size)]
    assert not quiet.any()


def test_trls_constant_group_with_a_member_left_out() -> None:
    """``test_a_partly_unscorable_degenerate_group_stays_degenerate``: what is NaN there belongs to no group here."""
    found = group_advantage([2.9, 2.9, 2.9, 7.0], [0, 0, 0, -1])
    assert found.constant.tolist() == [True]
    assert found.advantage.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_trls_sapo_at_ratio_one(ratio: str) -> None:
    """``test_get_sapo_token_loss``: 2 at temperature 1."""
    logp = torch.full((2, 4), -0.5)
    found = policy_loss(logp, torch.ones(2), old_logp=logp, loss="sapo", ratio=ratio, tau_positive=1.0)
    assert found.loss.item() == pytest.approx(-2.0)


@pytest.mark.parametrize(
    ("logp", "mask", "expected"),
    [
        ([-2.0, -2, -2, -2], [1, 1, 1, 1], 2.0),
        ([-0.5, -0.5, -0.5, -0.5], [1, 1, 1, 1], 0.5),
        ([-2.0, -2, -10_000, 10_000], [1, 1, 0, 0], 2.0),
        ([-0.5, -0.5, -10_000, 10_000], [1, 1, 0, 0], 0.5),
    ],
)
def test_trls_mean_log_ratio_to_the_sampler(logp: list[float], mask: list[int], expected: float) -> None:
    """``test_get_off_policy_mask``, ``.._padding``: sampler's log-probs 0; padding of any size does not count."""
    found = policy_loss(
        torch.zeros(1, 4), torch.tensor([-1.0]), ref_logp=torch.tensor([logp]), mask=torch.tensor([mask]), kl="k1"
    )
    assert found.kl.item() == expected


# ---- Liger

LIGER_LOSSES = [
    {"loss": "clip", "clip_low": 0.2, "clip_high": 0.4},
    {"loss": "cispo", "clip_low": 1.0, "clip_high": 4.0},  # its bound is the ratio's, 5
    {"loss": "sapo", "tau_positive": 1.0, "tau_negative": 1.05},
]


@pytest.mark.parametrize("options", LIGER_LOSSES, ids=[str(x["loss"]) for x in LIGER_LOSSES])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_ligers_weights_of_the_sampler(options: dict, beta: float) -> None:
    """``test_grpo_loss_with_vllm_is_ratio``: a weight of 1 is none, and 0.42 scales all but the KL, however given."""
    logp, old = torch.tensor([[-1.0, -0.2, -3, -0.7], [-0.4, -2, -1, -1]]), torch.full((2, 4), -1.0)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    options = {**options, "old_logp": old, "ref_logp": torch.full((2, 4), -0.9), "mask": mask, "beta": beta}
    advantage = torch.tensor([0.8, -1.3])
    plain = policy_loss(logp, advantage, **options)
    kl = beta * plain.kl
    for weight in (1.0, 0.42):
        sampler = old - log(weight)
        found = policy_loss(logp, advantage, sampler_logp=sampler, importance="truncate", **options)
        torch.testing.assert_close(found.loss - kl, weight * (plain.loss - kl))
