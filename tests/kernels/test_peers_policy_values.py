"""Advantages, importance weights and policy losses: the numbers that other libraries' own tests assert.

verl (``test_rollout_is``, ``test_rollout_corr``), TRL (``test_utils``, ``test_core``, ``test_grpo_trainer``) and Liger
(``test_grpo_loss``). Their code is called, on random numbers, in ``test_parity`` and ``integrations``.
"""

from __future__ import annotations

from math import exp, log, sqrt

import pytest
import torch
from torch import Tensor

from fastrl_kernels import group_advantage, policy_loss, token_weights

pytestmark = pytest.mark.usefixtures("path")

# ---- verl


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
