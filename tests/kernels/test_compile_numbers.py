"""``torch.compile(fullgraph=True)`` goes on when a number changes from call to call, as a step's counts do: dynamo then
makes it symbolic, and a symbolic number cannot be put into a message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastrl_kernels import (
    detection_reward,
    group_advantage,
    linear_logprob,
    linear_policy_loss,
    listwise_loss,
    policy_loss,
    token_logprob,
    token_weights,
    unlikelihood_loss,
)

COMPLETION = torch.tensor([0, 0, 1, 2])
LOGP, ADVANTAGE = -torch.rand(4), torch.randn(3)
HIDDEN, HEAD, TARGET = torch.randn(4, 6), torch.randn(9, 6), torch.tensor([0, 3, 8, 2])
BOXES = torch.rand(2, 3, 4).cumsum(-1)
COUNTS = torch.tensor([3, 2])

CASES: dict[str, tuple[Callable[[Any], Any], tuple[Any, ...]]] = {
    "token_weights normalizer": (lambda x: token_weights(COMPLETION, normalizer=x), (10, 12, 7.5)),
    "token_weights n_completions": (lambda x: token_weights(COMPLETION, n_completions=x), (3, 4, 5)),
    "policy_loss normalizer": (lambda x: policy_loss(LOGP, ADVANTAGE, COMPLETION, normalizer=x).loss, (10, 12, 14)),
    "policy_loss clip": (
        lambda x: policy_loss(LOGP, ADVANTAGE, COMPLETION, old_logp=LOGP - 0.3, clip_low=x, clip_high=2 * x).loss,
        (0.1, 0.2, 0.3),
    ),
    "policy_loss beta": (
        lambda x: policy_loss(LOGP, ADVANTAGE, COMPLETION, ref_logp=LOGP - 0.3, beta=x).loss,
        (0.1, 0.2, 0.3),
    ),
    "policy_loss dual_clip": (
        lambda x: policy_loss(LOGP, ADVANTAGE, COMPLETION, old_logp=LOGP - 2, dual_clip=x).loss,
        (1.5, 2.0, 3.0),
    ),
    "linear_policy_loss": (
        lambda x: linear_policy_loss(HIDDEN, HEAD, TARGET, ADVANTAGE, COMPLETION, clip_low=x, grad_scale=x).loss,
        (0.1, 0.2, 0.3),
    ),
    "linear_logprob": (
        lambda x: linear_logprob(HIDDEN, HEAD, TARGET, temperature=x, softcap=10 * x).logp,
        (0.7, 0.8, 0.9),
    ),
    "token_logprob": (lambda x: token_logprob(HIDDEN @ HEAD.T, TARGET, temperature=x).logp, (0.7, 0.8, 0.9)),
    "group_advantage eps": (lambda x: group_advantage(LOGP, 2, eps=x).advantage, (1e-4, 1e-3, 1e-2)),
    "group_advantage group": (lambda x: group_advantage(LOGP, x).advantage, (2, 4, 1)),
    "group_advantage n_groups": (lambda x: group_advantage(LOGP, COMPLETION, n_groups=x).mean, (3, 4, 5)),
    "listwise_loss gamma": (lambda x: listwise_loss(BOXES[0], BOXES[1], gamma=x, beta=x), (0.5, 1.0, 2.0)),
    "unlikelihood_loss alpha": (lambda x: unlikelihood_loss(LOGP, LOGP.exp(), alpha=x), (1.0, 2.0, 3.0)),
    "detection_reward threshold": (
        lambda x: detection_reward(BOXES, BOXES, COUNTS, COUNTS, threshold=x).f1,
        (0.3, 0.5, 0.7),
    ),
    "detection_reward scale": (
        lambda x: detection_reward(BOXES[..., :2], BOXES[..., :2], COUNTS, COUNTS, metric="point", scale=x).f1,
        (3.0, 5.0, 7.0),
    ),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", CASES)
def test_a_number_may_change(name: str, dynamic: bool | None) -> None:
    call, values = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=dynamic)
    for value in values:
        torch.testing.assert_close(compiled(value), call(value))
