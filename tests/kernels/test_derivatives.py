"""Derivatives that do not exist raise an error; those of second order that exist are correct."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastrl_kernels import (
    group_advantage,
    linear_logprob,
    linear_policy_loss,
    listwise_loss,
    policy_loss,
    token_logprob,
    unlikelihood_loss,
)
from fastrl_kernels.reference import (
    group_advantage_reference,
    policy_loss_reference,
    unlikelihood_loss_reference,
)

IDS, ADVANTAGE = torch.tensor([0, 0, 1]), torch.tensor([1.0, -2.0]).double()
HEAD = torch.ones(7, 5).double()
LOGP = -torch.tensor([0.2, 1.5, 0.7]).double()


def _policy(x: Tensor) -> Tensor:
    return policy_loss(x, ADVANTAGE, IDS, old_logp=LOGP - 0.01).loss


CALLS = {
    "policy_loss": (_policy, (3,)),
    "listwise_loss": (lambda x: listwise_loss(x, torch.arange(3).double()[None]).sum(), (1, 3)),
    "unlikelihood_loss": (lambda x: unlikelihood_loss(x, torch.full((3,), 0.3).double()), (3,)),
    "token_logprob": (lambda x: token_logprob(x, torch.zeros(2).long()).logp.sum(), (2, 5)),
    "linear_logprob": (lambda x: linear_logprob(x, HEAD, torch.zeros(2).long()).logp.sum(), (2, 5)),
    "linear_policy_loss": (
        lambda x: linear_policy_loss(x, torch.ones(7, 5).double(), IDS, ADVANTAGE, IDS).loss,
        (3, 5),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_refused_by_name(name: str) -> None:
    function, shape = CALLS[name]
    x = -torch.rand(shape, dtype=torch.float64) - 0.1
    message = f"{name}: has no forward-mode derivative"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        function(forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        assert torch.isfinite(function(x))  # no tangent, so no error


@pytest.mark.parametrize("name", ["policy_loss", "listwise_loss", "token_logprob", "linear_logprob"])
def test_second_derivatives_raise_where_they_are_asked_for(name: str) -> None:
    function, shape = CALLS[name]
    x = (-torch.rand(shape, dtype=torch.float64) - 0.1).requires_grad_()
    (first,) = torch.autograd.grad(function(x), x, create_graph=True)
    (plain,) = torch.autograd.grad(function(x), x)
    torch.testing.assert_close(first, plain)
    with pytest.raises((NotImplementedError, RuntimeError), match=name):
        torch.autograd.grad(first.sum() + x.sum(), x)


def test_gradients_made_in_the_forward_have_no_graph() -> None:
    function, shape = CALLS["linear_policy_loss"]
    x = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="linear_policy_loss: has no second derivative"):
        torch.autograd.grad(function(x), x, create_graph=True)


@pytest.mark.parametrize("function", [unlikelihood_loss, unlikelihood_loss_reference])
def test_unlikelihood_has_derivatives_of_every_order(function) -> None:
    sigma, weight = torch.tensor([0.3, 0.0, 1.0]).double(), torch.tensor([0.5, 2.0, 0.0]).double()
    logp = LOGP.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: function(x, sigma, weight=weight), logp)


def test_the_policy_reference_has_derivatives_of_every_order() -> None:
    logp = LOGP.clone().requires_grad_()
    options = {"old_logp": LOGP - 0.01, "ref_logp": LOGP + 0.1, "beta": 0.3}
    assert torch.autograd.gradgradcheck(lambda x: policy_loss_reference(x, ADVANTAGE, IDS, **options).loss, logp)


GROUPS = (4, torch.tensor([0, 2, 0, 1, 0, 2, -1, 1, 3, 2, 2, 4]))


@pytest.mark.parametrize("group", GROUPS, ids=["equal sizes", "ids"])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_group_advantage_has_a_derivative(baseline: str, scale: str, unbiased: bool, group: int | Tensor) -> None:
    rewards = torch.randn(12, 2).double()
    rewards[4:8] = rewards[4]  # a constant group, of equal sizes
    leaves = [rewards.requires_grad_(), torch.tensor([1.0, 0.3]).double().requires_grad_()]
    options = {"baseline": baseline, "scale": scale, "unbiased": unbiased, "eps": 0.01}
    count = {} if isinstance(group, int) else {"n_groups": 6}
    got, want = (
        function(leaves[0], group, weights=leaves[1], **options, **count)[:4]
        for function in (group_advantage, group_advantage_reference)
    )
    upstream = [torch.randn_like(x) for x in got]
    mine, truth = (torch.autograd.grad(out, leaves, upstream) for out in (got, want))
    torch.testing.assert_close(mine, truth)
    assert truth[0].isfinite().all()


def test_derivatives_of_group_advantage_that_do_not_exist() -> None:
    rewards = torch.rand(4).double().requires_grad_()
    (first,) = torch.autograd.grad(group_advantage(rewards, 2).advantage.square().sum(), rewards, create_graph=True)
    with pytest.raises(NotImplementedError, match="group_advantage: has no second derivative"):
        torch.autograd.grad(first.sum(), rewards)
    with pytest.raises(NotImplementedError, match="group_advantage: has no forward-mode derivative"):
        torch.func.jvp(lambda x: group_advantage(x, 2).advantage, (rewards,), (torch.ones_like(rewards),))
    assert not group_advantage(rewards, 2).constant.requires_grad
    empty = torch.zeros(0, 2, requires_grad=True)
    assert torch.autograd.grad(group_advantage(empty, 2).advantage.sum(), empty)[0].shape == (0, 2)
