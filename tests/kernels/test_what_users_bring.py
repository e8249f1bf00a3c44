"""Shapes and dtypes that users commonly pass: integers, one problem, padded batches, lists."""

from __future__ import annotations

import pytest
import torch

from fastrl_kernels import group_advantage, linear_assignment, linear_logprob, policy_loss, token_logprob
from fastrl_kernels.reference import linear_logprob_reference, policy_loss_reference, token_logprob_reference


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


def test_integer_rewards_and_lists() -> None:
    want = group_advantage(torch.tensor([1.0, 0.0, 3.0, 3.0]), 2)
    for rewards in (torch.tensor([1, 0, 3, 3]), [1, 0, 3, 3], [1.0, 0.0, 3.0, 3.0]):
        for group in (2, [0, 0, 1, 1], torch.tensor([0, 0, 1, 1])):
            torch.testing.assert_close(group_advantage(rewards, group), want)
    assert group_advantage(torch.tensor([True, False]), 2).advantage[0] > 0
