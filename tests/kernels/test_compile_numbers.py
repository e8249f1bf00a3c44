"""``torch.compile(fullgraph=True)`` when a number changes from call to call, as a step's counts do.

A Python number becomes symbolic at its second value, and a symbolic number cannot be put into a message. A 0-d tensor
never recompiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

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


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.gate)])
@pytest.mark.parametrize("name", CASES)
def test_a_number_may_change(name: str, dynamic: bool | None) -> None:
    call, values = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=dynamic)
    for value in values:
        torch.testing.assert_close(compiled(value), call(value))


OLD = LOGP - torch.tensor([0.5, -0.1, -0.6, 0.9])  # log-ratios on which every bound below acts
SIGNS = torch.tensor([1.0, -1.0, -0.5])
LOSS = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0, "beta": 0.04}
SMALL, LARGE = (0.1, 0.2, 0.3), (1.1, 1.4, 2.0)


def _loss(**options: Any) -> Tensor:
    return policy_loss(LOGP, SIGNS, COMPLETION, **options).loss


def _linear_loss(**options: Any) -> Tensor:
    given = LOSS | {"old_logp": OLD, "ref_logp": OLD} | options
    return linear_policy_loss(HIDDEN, HEAD, TARGET, SIGNS, COMPLETION, **given).loss


TENSORS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, ...]]] = {
    "policy_loss clip_low": (lambda x: _loss(old_logp=OLD, clip_low=x), SMALL),
    "policy_loss clip_high": (lambda x: _loss(old_logp=OLD, clip_high=x), SMALL),
    "policy_loss dual_clip": (lambda x: _loss(old_logp=OLD, dual_clip=x), LARGE),
    "policy_loss beta": (lambda x: _loss(ref_logp=OLD, beta=x), SMALL),
    "policy_loss importance_cap": (lambda x: _loss(sampler_logp=OLD, importance="truncate", importance_cap=x), LARGE),
    "policy_loss taus": (lambda x: _loss(old_logp=OLD, loss="sapo", tau_positive=x, tau_negative=x), LARGE),
    "policy_loss normalizer": (lambda x: _loss(normalizer=x), LARGE),
    "linear_policy_loss bounds": (lambda x: _linear_loss(clip_low=x, clip_high=x, beta=x), SMALL),
    "linear_policy_loss temperature": (lambda x: _linear_loss(temperature=x), LARGE),
    "linear_logprob temperature": (lambda x: linear_logprob(HIDDEN, HEAD, TARGET, temperature=x).logp.sum(), LARGE),
    "token_logprob temperature": (lambda x: token_logprob(HIDDEN @ HEAD.T, TARGET, temperature=x).logp.sum(), LARGE),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_never_recompiles(name: str) -> None:
    call, values = TENSORS[name]
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = [compiled(torch.tensor(value)) for value in values]
    torch.testing.assert_close(found, [call(torch.tensor(value)) for value in values])
    assert counter.frame_count == 1
    assert len({float(x) for x in found}) == len(values)  # each was read
