"""Every row of docs/losses.md: the peer's own code where it runs on tensors, its documented formula where it does not.

TRL's ``_compute_loss`` and Liger's ``ppo_loss_fn`` are called as they are, on padded ``[B, T]`` batches; ours gets the
same numbers packed. Loss, gradient and metrics must agree in float64.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastrl_kernels.group_advantage import group_advantage
from fastrl_kernels.linear_logprob import linear_logprob
from fastrl_kernels.policy_loss import policy_loss
from fastrl_kernels.token_logprob import token_logprob
from fastrl_kernels.token_weights import token_weights
from tests.helpers.trl_losses import AGGREGATES, HIGH, LONGEST, LOW, B, Batch, T, TrlTrainer


@pytest.fixture
def batch() -> Batch:
    return Batch()


def _weight(batch: Batch, **options) -> Tensor:
    return token_weights(batch.ids, n_completions=B, dtype=torch.float64, **options)


# ---------------------------------------------------------------------------------------------------------------- TRL


def _trl(batch: Batch, *, old: bool = True, **settings) -> tuple[Tensor, dict]:
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    trainer = TrlTrainer(batch, **settings)
    inputs = {
        "prompt_ids": torch.zeros(B, 1), "prompt_mask": torch.ones(B, 1), "completion_ids": torch.zeros(B, T),
        "completion_mask": batch.mask, "advantages": batch.advantage, "ref_per_token_logps": batch.ref,
        "num_items_in_batch": torch.tensor(100.0), "old_per_token_logps": batch.old if old else None,
    }  # fmt: skip
    return grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


@pytest.mark.parametrize("loss_type", list(AGGREGATES))
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_trl_loss_types(batch, loss_type, beta):
    want, metrics = _trl(batch, loss_type=loss_type, beta=beta)
    got = batch.ours(beta=beta, **AGGREGATES[loss_type])
    batch.same(got.loss, want)
    assert got.clip_low_fraction.item() == pytest.approx(metrics["clip_ratio/low_mean"][0])
    assert got.clip_high_fraction.item() == pytest.approx(metrics["clip_ratio/high_mean"][0])
    assert 0 < got.clip_low_fraction < 1
    if beta:
        assert got.kl.item() == pytest.approx(metrics["kl"][0])


def test_trl_on_policy(batch):
    want, _ = _trl(batch, loss_type="grpo", beta=0.04, old=False)
    batch.same(batch.ours(beta=0.04, old=False, **AGGREGATES["grpo"]).loss, want)


def test_trl_gspo(batch):
    want, _ = _trl(batch, loss_type="grpo", level="sequence", beta=0.04)
    batch.same(batch.ours(beta=0.04, ratio="sequence", **AGGREGATES["grpo"]).loss, want)


def test_trl_luspo(batch):
    # each sequence's one loss times its length, mean over sequences
    want, _ = _trl(batch, loss_type="luspo", level="sequence")
    batch.same(batch.ours(ratio="sequence", aggregate="constant", normalizer=B).loss, want)


def test_trl_two_sided_clip(batch):
    want, _ = _trl(batch, loss_type="grpo", delta=1.4)
    batch.same(batch.ours(dual_clip=1.4, **AGGREGATES["grpo"]).loss, want)


def test_trl_cispo(batch):
    want, _ = _trl(batch, loss_type="cispo", epsilon_high=1.2, beta=0.04)  # its bound is the ratio's, and no lower one
    got = batch.ours(loss="cispo", clip_low=1, clip_high=0.2, beta=0.04, aggregate="token", normalizer=100)
    batch.same(got.loss, want)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_trl_sapo(batch, level):
    want, _ = _trl(batch, loss_type="sapo", beta=0.04, level=level)
    rounded = torch.tensor(1.05).item()  # as its torch.where of two numbers makes it
    batch.same(batch.ours(loss="sapo", ratio=level, beta=0.04, tau_negative=rounded, **AGGREGATES["grpo"]).loss, want)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("columns", [16, 4096])
def test_trl_chunked_logprob(temperature, columns):
    """Its head over vocabulary tiles: log-probs, entropies and both gradients, from per-row upstream gradients."""
    chunked = pytest.importorskip("trl.kernels.chunked_logprob")
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(11, 8, generator=generator), torch.randn(70, 8, generator=generator)
    target, up = torch.randint(70, (11,), generator=generator), torch.randn(2, 11, generator=generator)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    asked = (None, 1.0, ("entropy",))
    theirs = chunked.ChunkedLogProbFunction.apply(hidden, weight, None, target, temperature, columns, *asked)[:2]
    ours = linear_logprob(hidden, weight, target, temperature=temperature, return_entropy=True, scratch_bytes=60_000)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    mine, other = (torch.autograd.grad(side[0], leaves, up[0], retain_graph=True) for side in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_trl_log_probs_and_entropy_of_logits():
    utils = pytest.importorskip("trl.trainer.utils")
    logits, target = torch.randn(2, 5, 70), torch.randint(70, (2, 5))
    ours = token_logprob(logits.flatten(0, 1), target.flatten(), return_entropy=True)
    torch.testing.assert_close(ours.logp.view(2, 5), utils.selective_log_softmax(logits, target))
    torch.testing.assert_close(ours.entropy.view(2, 5), utils.entropy_from_logits(logits))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_trl_advantages(scale):
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    parts, weights = torch.rand(12, 2, dtype=torch.float64), torch.tensor([1.0, 0.3], dtype=torch.float64)
    rewards = (parts * weights).nansum(1)
    grouped = rewards.view(-1, 4)
    want = rewards - grouped.mean(1).repeat_interleave(4)
    if scale != "none":
        std = nanstd(grouped, dim=1).repeat_interleave(4) if scale == "group" else nanstd(rewards)
        want = want / (std + 1e-4)
    got = group_advantage(parts, 4, weights=weights, scale="std" if scale == "group" else "none")
    advantage = got.advantage / (got.reward.std() + 1e-4) if scale == "batch" else got.advantage
    torch.testing.assert_close(advantage, want)


def test_trl_normalize_then_sum():
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    parts, weights = torch.rand(12, 2, dtype=torch.float64), torch.tensor([1.0, 0.3], dtype=torch.float64)
    grouped = parts.view(-1, 4, 2)
    each = (grouped - grouped.mean(1, keepdim=True)) / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
    rewards = (each.view(-1, 2) * weights).nansum(1)
    want = (rewards - rewards.mean()) / (nanstd(rewards) + 1e-4)
    summed = torch.stack([group_advantage(column, 4).advantage for column in parts.T], 1) @ weights
    torch.testing.assert_close(group_advantage(summed, 12).advantage, want)  # the whole batch as one group


# -------------------------------------------------------------------------------------------------------------- Liger


def _liger(batch: Batch, **settings) -> tuple[Tensor, list[Tensor]]:
    grpo_loss = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    return grpo_loss.LigerFusedLinearGRPOFunction.ppo_loss_fn(
        batch.logp, batch.mask, batch.advantage, batch.mask, ref_per_token_logps=batch.ref,
        old_per_token_logps=batch.old, epsilon_low=LOW, epsilon_high=settings.pop("epsilon_high", HIGH),
        max_completion_length=LONGEST, num_items_in_batch=100, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("loss_type", list(AGGREGATES))
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("delta", [None, 1.4])
def test_liger_flavours(batch, loss_type, level, delta):
    want, metrics = _liger(batch, loss_type=loss_type, importance_sampling_level=level, beta=0.04, delta=delta)
    got = batch.ours(beta=0.04, ratio=level, dual_clip=delta, **AGGREGATES[loss_type])
    batch.same(got.loss, want)
    assert got.kl.item() == pytest.approx(metrics[0].item())
    clipped = got.clip_low_fraction + got.clip_high_fraction
    assert clipped.item() == pytest.approx(metrics[1].item())


def test_liger_luspo(batch):
    want, _ = _liger(batch, loss_type="luspo", importance_sampling_level="sequence", beta=0.0)
    batch.same(batch.ours(ratio="sequence", aggregate="constant", normalizer=B).loss, want)


@pytest.mark.parametrize("loss", ["clip", "cispo", "sapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("importance", ["truncate", "mask"])
def test_liger_rollout_correction(batch, loss, level, importance):
    """TRL hands Liger its importance weights: exp of the log-ratio (summed over a sequence), limited or masked."""
    sampler = batch.old - 0.2 * torch.randn(B, T, dtype=torch.float64)
    gap = (batch.old - sampler) * batch.mask
    weight = (gap.sum(1, keepdim=True) if level == "sequence" else gap).exp()
    weight = weight.clamp(max=1.1) if importance == "truncate" else weight.masked_fill(weight > 1.1, 0)
    bounds = {"clip_low": 1, "clip_high": 0.25} if loss == "cispo" else {}
    want, _ = _liger(
        batch,
        loss_type={"clip": "dapo"}.get(loss, loss),
        beta=0.04,
        vllm_is_ratio=weight,
        epsilon_high=1.25 if bounds else HIGH,
    )
    aggregate = AGGREGATES["grpo" if loss == "sapo" else "dapo"]
    told = {"sampler_logp": sampler[batch.rows], "importance": importance, "importance_cap": 1.1}
    got = batch.ours(loss=loss, beta=0.04, importance_level=level, **told, **bounds, **aggregate)
    batch.same(got.loss, want)


def test_liger_from_hidden_states(batch):
    """The whole path: Liger's fused head and loss against ours, with gradients of hidden states and head."""
    grpo_loss = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    hidden, head = torch.randn(B, T, 12), torch.randn(37, 12) * 0.3
    targets = torch.randint(0, 37, (B, T))
    grads = []
    for peer in (True, False):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if peer:
            module = grpo_loss.LigerFusedLinearGRPOLoss(
                beta=0.0, compiled=False, use_ref_model=False, chunk_size=2, loss_type="grpo", temperature=0.8
            )
            loss, _ = module(h, w, targets, batch.mask.float(), batch.advantage.float())
        else:
            logp = linear_logprob(h[batch.rows], w, targets[batch.rows], temperature=0.8).logp
            weight = _weight(batch, **AGGREGATES["grpo"]).float()
            loss = policy_loss(logp, batch.advantage.float(), batch.ids, weight=weight).loss
        grads.append((loss.detach(), *torch.autograd.grad(loss, (h, w))))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- verl
# Formulas as verl documents them (algorithm pages and docstrings of its core algorithms).


def _verl_aggregate(matrix: Tensor, mask: Tensor, mode: str) -> Tensor:
    tokens = mask.sum(1)
    sequences = (tokens > 0).double()
    if mode == "token-mean":
        return (matrix * mask).sum() / mask.sum()
    per_sequence = (matrix * mask).sum(1)
    if mode == "seq-mean-token-mean":
        per_sequence = per_sequence / (tokens + 1e-8)
    loss = (per_sequence * sequences).sum() / sequences.sum()
    return loss / T if mode == "seq-mean-token-sum-norm" else loss


VERL_AGGREGATES = {
    "token-mean": {"aggregate": "token"},
    "seq-mean-token-mean": {"aggregate": "sequence"},
    "seq-mean-token-sum": {"aggregate": "constant", "normalizer": B - 1},
    "seq-mean-token-sum-norm": {"aggregate": "constant", "normalizer": (B - 1) * T},
}


@pytest.mark.parametrize("mode", list(VERL_AGGREGATES))
def test_verl_clipped_loss_with_dual_clip(batch, mode):
    a = batch.advantage.unsqueeze(1)
    ratio = (batch.logp - batch.old).clamp(-20, 20).exp()
    clipped = torch.maximum(-a * ratio, -a * ratio.clamp(1 - LOW, 1 + HIGH))
    matrix = torch.where(a < 0, torch.min(-a * 1.5, clipped), clipped)
    want = _verl_aggregate(matrix, batch.mask, mode)
    # verl adds 1e-8 to a sequence's length, hence its value only to that
    torch.testing.assert_close(batch.ours(dual_clip=1.5, **VERL_AGGREGATES[mode]).loss, want, rtol=1e-7, atol=1e-8)
    if mode != "seq-mean-token-mean":
        batch.same(batch.ours(dual_clip=1.5, **VERL_AGGREGATES[mode]).loss, want)


@pytest.mark.parametrize(("name", "kl"), [("kl", "k1"), ("mse", "k2"), ("low_var_kl", "k3")])
@pytest.mark.parametrize("straight_through", [False, True])
def test_verl_kl_losses(batch, name, kl, straight_through):
    difference = batch.logp - batch.ref
    assert difference.abs().max() < 2  # where verl's clamps of the estimate do not act
    value = {"kl": difference, "mse": 0.5 * difference**2, "low_var_kl": (-difference).exp() + difference - 1}[name]
    if straight_through:  # verl's "k1+", "k3+": value of one, gradient of k2
        k2 = 0.5 * difference**2
        value = k2 - k2.detach() + value.detach()
    a, ratio = batch.advantage.unsqueeze(1), (batch.logp - batch.old).exp()
    policy = torch.maximum(-a * ratio, -a * ratio.clamp(1 - LOW, 1 + HIGH))
    want = _verl_aggregate(policy + 0.1 * value, batch.mask, "token-mean")
    gradient = "k2" if straight_through else "value"
    batch.same(batch.ours(aggregate="token", beta=0.1, kl=kl, kl_gradient=gradient).loss, want)


def test_verl_gspo(batch):
    log_ratio, length = batch.logp - batch.old, batch.mask.sum(1).clamp(min=1)
    mean = ((log_ratio * batch.mask).sum(1) / length).detach().unsqueeze(1)
    ratio = (batch.logp - batch.logp.detach() + mean).clamp(max=10).exp()
    a = batch.advantage.unsqueeze(1)
    matrix = torch.maximum(-a * ratio, -a * ratio.clamp(1 - LOW, 1 + HIGH))
    per_sequence = (matrix * batch.mask).sum(1) / length
    want = per_sequence.sum() / (batch.mask.sum(1) > 0).sum()
    batch.same(batch.ours(ratio="sequence", aggregate="sequence").loss, want)


def _verl_row_loss(name: str, log_ratio: Tensor, logp: Tensor, a: Tensor) -> Tensor:
    ratio = log_ratio.clamp(-20, 20).exp()
    if name == "cispo":
        return -ratio.clamp(1 - LOW, 1 + HIGH).detach() * a * logp
    tau = torch.where(a > 0, torch.ones_like(a), torch.full_like(a, 1.05))
    return -a * torch.sigmoid(tau * (ratio - 1)) * (4 / tau)


@pytest.mark.parametrize("name", ["sapo", "cispo"])
def test_verl_sapo_and_cispo(batch, name):
    row = _verl_row_loss(name, batch.logp - batch.old, batch.logp, batch.advantage.unsqueeze(1))
    batch.same(batch.ours(loss=name, aggregate="token").loss, _verl_aggregate(row, batch.mask, "token-mean"))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", ["sapo", "cispo"])
def test_verl_rollout_importance(batch, name, level):
    rollout = batch.old - 0.2 * torch.randn(B, T, dtype=torch.float64)
    gap = (batch.old - rollout) * batch.mask
    weight = (gap.sum(1, keepdim=True) if level == "sequence" else gap).clamp(-20, 20).exp().clamp(max=1.1)
    row = _verl_row_loss(name, batch.logp - batch.old, batch.logp, batch.advantage.unsqueeze(1)) * weight
    told = {"sampler_logp": rollout[batch.rows], "importance": "truncate", "importance_cap": 1.1}
    got = batch.ours(loss=name, aggregate="token", importance_level=level, **told)
    batch.same(got.loss, _verl_aggregate(row, batch.mask, "token-mean"))


def test_verl_gpg_gradient_is_the_on_policy_loss(batch):
    want = _verl_aggregate(-batch.logp * batch.advantage.unsqueeze(1), batch.mask, "token-mean")
    batch.same(batch.ours(old=False, aggregate="token").loss, want, value=False)


@pytest.mark.parametrize("by_std", [True, False])
def test_verl_group_advantage(by_std):
    rewards, ids = torch.rand(10, dtype=torch.float64), torch.tensor([2, 0, 0, 2, 1, 1, 0, 2, 1, 0])
    want = torch.empty_like(rewards)
    for i, g in enumerate(ids.tolist()):
        members = rewards[ids == g]
        want[i] = (rewards[i] - members.mean()) / (members.std() + 1e-6 if by_std else 1)
    got = group_advantage(rewards, ids, scale="std" if by_std else "none", eps=1e-6)
    torch.testing.assert_close(got.advantage, want)


def test_verl_and_trl_rloo():
    rewards, ids = torch.rand(10, dtype=torch.float64), torch.tensor([2, 0, 0, 2, 1, 1, 0, 2, 1, 0])
    n = torch.bincount(ids)[ids].double()
    want = (n * rewards - torch.bincount(ids, weights=rewards)[ids]) / (n - 1)
    torch.testing.assert_close(group_advantage(rewards, ids, baseline="leave_one_out", scale="none").advantage, want)
    grouped = rewards[:8].view(2, 4)  # TRL: reward minus the mean of the other generations
    baseline = (grouped.sum(1, keepdim=True) - grouped) / 3
    got = group_advantage(rewards[:8], 4, baseline="leave_one_out", scale="none").advantage
    torch.testing.assert_close(got, (grouped - baseline).flatten())


# --------------------------------------------------------------------------------------------------------------- docs


def test_the_documented_example_runs_and_every_named_test_exists():
    repo = Path(__file__).resolve().parents[2]
    text = (repo / "docs" / "losses.md").read_text()
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(snippet, "docs/losses.md", "exec"), {})
    for file, name in re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", text):
        source = (repo / "tests" / "kernels" / (file or "test_parity.py")).read_text()
        assert f"def {name}(" in source, f"docs/losses.md names {name}"


# ------------------------------------------------------------------------------------------------------ Perception-R1


def test_perception_r1_released_loss(batch):
    """No clip, ratio of the log-prob to itself, k3, per sequence then over sequences; std + 1e-4, unbiased."""
    rewards = torch.rand(B, dtype=torch.float64)
    grouped = rewards.view(-1, 3)
    advantage = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()
    torch.testing.assert_close(group_advantage(rewards, 3).advantage, advantage)
    batch.advantage = advantage
    x = batch.ref - batch.logp
    row = -((batch.logp - batch.logp.detach()).exp() * advantage.unsqueeze(1) - 0.04 * (x.exp() - x - 1))
    live = batch.mask.sum(1) > 0  # a released completion has at least one token
    want = ((row * batch.mask).sum(1)[live] / batch.mask.sum(1)[live]).mean()
    batch.same(batch.ours(old=False, aggregate="sequence", beta=0.04, kl="k3").loss, want)
