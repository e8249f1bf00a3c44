"""Contracts shared by losses and heads: first derivatives only, meta tensors, checked numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrl_kernels import (
    decode_attention,
    group_advantage,
    linear_logprob,
    linear_policy_loss,
    listwise_loss,
    policy_loss,
    token_logprob,
    token_weights,
    unlikelihood_loss,
)


def head(n: int = 4, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = None if device == "meta" else torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 8, generator=generator, device=device)
    weight = torch.randn(16, 8, generator=generator, device=device)
    return hidden, weight, torch.arange(n, device=device)


def ids(device: str = "cpu") -> Tensor:
    return torch.tensor([0, 0, 1, 1], device=device)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "policy": lambda x: policy_loss(x, torch.tensor([1.0, -1.0]), ids(), old_logp=x.detach() - 0.1).loss,
    "listwise": lambda x: listwise_loss(x[None], torch.tensor([[3.0, 1.0, 2.0, 0.0]]), beta=1.0)[0],
    "unlikelihood": lambda x: unlikelihood_loss(x, torch.tensor([0.1, 0.5, 0.9, 1.0])),
    "linear policy": lambda x: (
        linear_policy_loss(
            x[:, None] * head()[0],
            head()[1],
            head()[2],
            torch.tensor([1.0, -1.0]),
            ids(),
            old_logp=torch.full((4,), -2.0),
        ).loss
    ),
    "linear logprob": lambda x: linear_logprob(x[:, None] * head()[0], *head()[1:]).logp.sum(),
    "token logprob": lambda x: token_logprob(x[:, None] * head()[1][:4], head()[2]).logp.sum(),
}


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "unlikelihood"])  # which has one
def test_a_second_derivative_raises_instead_of_being_wrong(name: str) -> None:
    x = torch.tensor([-1.0, -2.0, -0.5, -1.5], requires_grad=True)
    with pytest.raises(RuntimeError):  # noqa: PT012 (gradients made in the forward are refused a graph at once)
        (first,) = torch.autograd.grad(LOSSES[name](x) ** 2, x, create_graph=True)
        torch.autograd.grad(first.square().sum() + x.sum(), x)


def losses_on(device: str) -> dict[str, Any]:
    hidden, weight, target = head(device=device)
    rewards, logp = hidden[:, 0], hidden[:, 1]
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32, device=device)
    query, keys = torch.ones(4, 2, 8, device=device), torch.ones(2, 1, 3, 8, device=device)
    own = torch.ones(4, 1, 2, 8, device=device)
    return {
        "advantage": group_advantage(rewards, ids(device), n_groups=2).advantage,
        "weights": token_weights(ids(device), n_completions=2),
        "policy": policy_loss(logp, rewards[:2], ids(device)).loss,
        "linear": linear_logprob(hidden, weight, target).logp,
        "linear policy": linear_policy_loss(hidden, weight, target, rewards[:2], ids(device)).loss,
        "token": token_logprob(hidden, target).logp,
        "listwise": listwise_loss(rewards[None], logp[None]),
        "unlikelihood": unlikelihood_loss(logp, rewards),
        "attention": decode_attention(query, keys, keys, own, own, row_offsets=offsets),
    }


def test_stand_ins_have_the_shapes_and_dtypes_of_the_real_results() -> None:
    real = losses_on("cpu")
    meta = losses_on("meta")
    with FakeTensorMode():
        fake = losses_on("cpu")
    for name, result in real.items():
        for other in (meta[name], fake[name]):
            assert (other.shape, other.dtype) == (result.shape, result.dtype), name


BAD: dict[str, Callable[[], object]] = {
    "beta: expected a finite number >= 0, got nan": lambda: listwise_loss(*torch.rand(2, 1, 3), beta=math.nan),
    "beta: expected a finite number >= 0, got -1": lambda: policy_loss(
        torch.rand(4), torch.rand(2), ids(), ref_logp=torch.rand(4), beta=-1
    ),
    "gamma: expected a finite number >= 0, got inf": lambda: listwise_loss(*torch.rand(2, 1, 3), gamma=math.inf),
    "softcap: expected a finite number > 0, got inf": lambda: linear_logprob(*head(), softcap=math.inf),
    "temperature: expected a finite number > 0 (from 1e-30), got 1e-40": lambda: linear_logprob(
        *head(), temperature=1e-40
    ),
    "scratch_bytes: expected a whole number > 0, got 1000000.0": lambda: linear_logprob(*head(), scratch_bytes=1e6),  # type: ignore[arg-type]
    "grad_scale: expected a finite number other than 0, got nan": lambda: linear_policy_loss(
        *head(), torch.rand(2), ids(), grad_scale=math.nan
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_a_wrong_number_is_named(message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared as it is)
        BAD[message]()
    assert str(caught.value) == message


@pytest.mark.parametrize("number", [np.int64(3), np.float32(3), 3, 3.0, torch.tensor(3)])
def test_a_normalizer_is_any_number(number: Any) -> None:
    assert token_weights(ids(), aggregate="token", normalizer=number).tolist() == pytest.approx([1 / 3] * 4)
