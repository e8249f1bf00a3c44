"""Shapes and dtypes that users commonly pass: integers, one problem, padded batches, lists."""

from __future__ import annotations

import pytest
import torch

from fastrl_kernels import (
    detection_reward,
    group_advantage,
    linear_assignment,
    linear_logprob,
    linear_policy_loss,
    pairwise_iou,
    policy_loss,
    token_logprob,
    token_weights,
    unlikelihood_loss,
)
from fastrl_kernels.reference import (
    linear_logprob_reference,
    linear_policy_loss_reference,
    policy_loss_reference,
    token_logprob_reference,
    unlikelihood_loss_reference,
)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_costs_and_one_problem(dtype: torch.dtype) -> None:
    cost = torch.tensor([[4, 1, 3], [2, 0, 5], [3, 2, 2]], dtype=dtype)
    one = linear_assignment(cost)
    assert one.match.tolist() == [1, 0, 2]
    assert (one.total.item(), one.total.shape, one.status.item()) == (5, (), 0)
    assert linear_assignment(cost[None]).match.tolist() == [[1, 0, 2]]
    big = torch.tensor([[2**40, 2**40 + 1], [2**40 + 1, 2**40 + 3]])  # exact beyond float32
    assert linear_assignment(big).match.tolist() == [1, 0]
    with pytest.raises(ValueError, match="cost: counts need a batch"):
        linear_assignment(cost, n_rows=torch.tensor([1]))


@pytest.mark.parametrize("linear", [linear_logprob, linear_logprob_reference])
@pytest.mark.parametrize("token", [token_logprob, token_logprob_reference])
def test_padded_hidden_states_and_int32_targets(linear, token) -> None:
    hidden, weight = torch.randn(2, 3, 5, requires_grad=True), torch.randn(7, 5)
    target, temperature = torch.randint(7, (2, 3), dtype=torch.int32), torch.rand(2, 3) + 0.5
    target[1, 2] = -100
    out = linear(hidden, weight, target, temperature=temperature, return_entropy=True)
    flat = linear_logprob(
        hidden.flatten(0, 1), weight, target.flatten().long(), temperature=temperature.flatten(), return_entropy=True
    )
    for got, want in zip(out, flat, strict=True):
        torch.testing.assert_close(got, want.view(2, 3))
    (grad,) = torch.autograd.grad(out.logp.sum(), hidden)
    assert grad.shape == hidden.shape
    again = token(hidden @ weight.T, target, temperature=temperature, return_entropy=True)
    torch.testing.assert_close(tuple(again), tuple(out))
    with pytest.raises(ValueError, match=r"target: expected shape \[2, 3\], got \[6\]"):
        linear(hidden, weight, target.flatten())


@pytest.mark.parametrize("function", [policy_loss, policy_loss_reference])
@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_padded_log_probs_with_a_mask(function, aggregate: str) -> None:
    logp, mask = -torch.rand(3, 4).double(), torch.arange(4) < torch.tensor([[4], [1], [2]])
    old, advantage = logp - 0.1, torch.tensor([1.0, -1.0, 0.5]).double()
    logp[~mask] = old[~mask] = torch.nan
    logp.requires_grad_()
    out = function(logp, advantage, mask=mask, old_logp=old, aggregate=aggregate)
    ids = torch.arange(3).repeat_interleave(mask.sum(1))
    want = policy_loss(logp[mask], advantage, ids, old_logp=old[mask], aggregate=aggregate)
    torch.testing.assert_close(tuple(out), tuple(want))
    got, packed = (torch.autograd.grad(loss, logp)[0] for loss in (out.loss, want.loss))
    torch.testing.assert_close(got, packed)
    with pytest.raises(ValueError, match=r"logp: \[C, L\] without completion ids, got \[12\]"):
        function(logp.flatten(), advantage)


@pytest.mark.parametrize("function", [linear_policy_loss, linear_policy_loss_reference])
@pytest.mark.parametrize("options", [{}, {"loss": "cispo"}, {"loss": "sapo"}, {"importance": "truncate"}], ids=str)
def test_padded_hidden_states_of_the_fused_loss(function, options: dict) -> None:
    """[C, L, H] with a mask, int32 targets: the same as the packed rows that the mask leaves."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 4, 5).double().requires_grad_(), torch.randn(9, 5).double().requires_grad_()
    target, mask = torch.randint(9, (3, 4), dtype=torch.int32), torch.arange(4) < torch.tensor([[4], [1], [2]])
    advantage, temperature = torch.tensor([1.0, -1.0, 0.5]).double(), torch.rand(3, 4) + 0.5
    vectors = {name: -2 + 0.1 * torch.randn(3, 4).double() for name in ("old_logp", "ref_logp")}
    if options.get("importance"):
        vectors["sampler_logp"] = vectors["old_logp"] + 0.1
    for x in vectors.values():
        x[~mask] = torch.nan
    given = {"temperature": temperature, "beta": 0.1, "aggregate": "sequence", **options}
    out = function(hidden, weight, target, advantage, mask=mask, **vectors, **given)
    ids = torch.arange(3).repeat_interleave(mask.sum(1))
    given["temperature"] = temperature[mask]
    packed = {name: x[mask] for name, x in vectors.items()}
    want = linear_policy_loss(hidden[mask], weight, target[mask].long(), advantage, ids, **packed, **given)
    torch.testing.assert_close(tuple(out[:-1]), tuple(want[:-1]))
    torch.testing.assert_close(out.logp[mask], want.logp)
    assert out.logp.shape == (3, 4)
    assert bool(out.logp[~mask].isinf().all())
    leaves = [hidden, weight]
    torch.testing.assert_close(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(want.loss, leaves))
    with pytest.raises(ValueError, match=r"target: \[C, L\] without completion ids, got \[12\]"):
        function(hidden.flatten(0, 1), weight, target.flatten(), advantage)
    with pytest.raises(ValueError, match=r"old_logp: expected shape \[3, 4\], got \[12\]"):
        function(hidden, weight, target, advantage, old_logp=torch.zeros(12))
    with pytest.raises(ValueError, match=r"target: expected 2 completions, as advantage, got 3"):
        function(hidden, weight, target, advantage[:2])


def test_rows_that_hold_several_completions() -> None:
    """[B, T] with ids [B, T], as packed rows are kept by other trainers."""
    logp, ids = -torch.rand(2, 4), torch.tensor([[0, 0, 1, -1], [2, 2, 2, 2]], dtype=torch.int32)
    advantage, old = torch.tensor([1.0, -1.0, 0.5]), logp - 0.1
    want = policy_loss(logp.flatten(), advantage, ids.flatten(), old_logp=old.flatten())
    torch.testing.assert_close(tuple(policy_loss(logp, advantage, ids, old_logp=old)), tuple(want))
    hidden, weight, target = torch.randn(2, 4, 5), torch.randn(9, 5), torch.randint(9, (2, 4))
    want = linear_policy_loss(hidden.flatten(0, 1), weight, target.flatten(), advantage, ids.flatten())
    got = linear_policy_loss(hidden, weight, target, advantage, ids)
    torch.testing.assert_close(tuple(got[:-1]), tuple(want[:-1]))
    torch.testing.assert_close(got.logp, want.logp.view(2, 4))
    for aggregate in ("token", "sequence"):
        made = token_weights(ids, aggregate=aggregate, mask=ids != 1)
        torch.testing.assert_close(
            made.flatten(), token_weights(ids.flatten(), aggregate=aggregate, mask=ids.flatten() != 1)
        )
        assert made.shape == (2, 4)


@pytest.mark.parametrize("function", [unlikelihood_loss, unlikelihood_loss_reference])
def test_padded_log_probs_of_the_unlikelihood(function) -> None:
    logp, sigma, mask = -torch.rand(3, 4).double(), torch.rand(3, 4), torch.arange(4) < torch.tensor([[4], [0], [2]])
    logp[~mask] = torch.nan
    logp.requires_grad_()
    weight = torch.rand(3, 4)
    for given in (None, weight):
        out = function(logp, sigma, mask=mask, weight=given)
        want = unlikelihood_loss(logp[mask], sigma[mask], weight=None if given is None else given[mask])
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(*(torch.autograd.grad(loss, logp)[0] for loss in (out, want)))
    assert function(logp, sigma, mask=torch.zeros(3, 4, dtype=torch.int32)) == 0
    with pytest.raises(ValueError, match=r"sigma: expected shape \[3, 4\], got \[3\]"):
        function(logp, sigma[:, 0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_boxes_of_whole_pixels(dtype: torch.dtype) -> None:
    a = torch.tensor([[0, 0, 20, 20], [5, 5, 9, 30]])
    b = torch.tensor([[10, 10, 30, 30], [5, 5, 9, 30], [0, 0, 20, 20]])
    torch.testing.assert_close(pairwise_iou(a.to(dtype), b.to(dtype)), pairwise_iou(a.float(), b.float()))
    torch.testing.assert_close(pairwise_iou(a.to(dtype), b.float()), pairwise_iou(a.float(), b.float()))
    counts = torch.tensor([2]), torch.tensor([3])
    got = detection_reward(a[None].to(dtype), b[None].to(dtype), *counts)
    torch.testing.assert_close(tuple(got), tuple(detection_reward(a[None].float(), b[None].float(), *counts)))


def test_integer_rewards_and_lists() -> None:
    want = group_advantage(torch.tensor([1.0, 0.0, 3.0, 3.0]), 2)
    for rewards in (torch.tensor([1, 0, 3, 3]), [1, 0, 3, 3], [1.0, 0.0, 3.0, 3.0]):
        for group in (2, [0, 0, 1, 1], torch.tensor([0, 0, 1, 1])):
            torch.testing.assert_close(group_advantage(rewards, group), want)
    assert group_advantage(torch.tensor([True, False]), 2).advantage[0] > 0
