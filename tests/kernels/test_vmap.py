"""``torch.vmap``: assignment and detection reward as one larger batch, everything else as torch's own loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastrl_kernels import (
    detection_reward,
    group_advantage,
    linear_assignment,
    linear_logprob,
    listwise_loss,
    pairwise_iou,
    policy_loss,
    token_logprob,
    unlikelihood_loss,
)


@pytest.fixture
def no_loop() -> Iterator[None]:
    """Without torch's fallback, which calls an operator once for each element of the mapped dimension."""
    before = torch._C._functorch._is_vmap_fallback_enabled()
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(before)


def same(got: Any, calls: list[Any]) -> None:
    for mine, theirs in zip(got, zip(*calls, strict=True), strict=True):
        torch.testing.assert_close(mine, torch.stack(theirs))


@pytest.mark.usefixtures("no_loop")
def test_assignment_is_one_batch() -> None:
    cost, rows, cols = torch.rand(3, 2, 4, 6), torch.randint(5, (3, 2)), torch.randint(7, (2,))
    same(torch.vmap(linear_assignment)(cost), [linear_assignment(c) for c in cost])
    same(torch.vmap(linear_assignment)(cost[:, 0]), [linear_assignment(c) for c in cost[:, 0]])  # one [n, m] each

    def some(c: torch.Tensor, r: torch.Tensor, k: torch.Tensor) -> Any:
        return linear_assignment(c, n_rows=r, n_cols=k, maximize=True)

    got = torch.vmap(some, in_dims=(2, 0, None))(cost.movedim(0, 2), rows, cols)
    same(got, [some(c, r, cols) for c, r in zip(cost, rows, strict=True)])
    same(torch.vmap(some, in_dims=(None, 0, None))(cost[0], rows, cols), [some(cost[0], r, cols) for r in rows])
    nested = torch.vmap(torch.vmap(linear_assignment))(cost)
    assert torch.equal(nested.match, linear_assignment(cost.flatten(0, 1)).match.view(3, 2, 4))
    with pytest.raises(ValueError, match="strict: the status cannot be read under vmap"):
        torch.vmap(lambda c: linear_assignment(c, strict=True))(cost)


@pytest.mark.usefixtures("no_loop")
@pytest.mark.parametrize("labelled", [False, True])
def test_detection_is_one_batch(labelled: bool) -> None:
    gt = torch.rand(3, 2, 5, 4).cumsum(-1)
    pred = gt[:, :, :4] + 0.05 * torch.randn(3, 2, 4, 4)
    counts = torch.randint(5, (3, 2)), torch.randint(6, (3, 2))
    label = torch.randint(2, (3, 2, 4)), torch.randint(2, (2, 5))

    def score(p: Any, g: Any, n: Any, m: Any, mine: Any, theirs: Any) -> Any:
        named = {"pred_label": mine, "gt_label": theirs} if labelled else {}
        return detection_reward(p, g, n, m, **named)

    got = torch.vmap(score, in_dims=(0, 0, 0, 0, 0, None))(pred, gt, *counts, *label)
    same(got, [score(*each, label[1]) for each in zip(pred, gt, *counts, label[0], strict=True)])


CALLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear_logprob": lambda x: linear_logprob(x, torch.ones(7, 5), torch.tensor([0, 3, 6, -100])).logp,
    "token_logprob": lambda x: token_logprob(x, torch.tensor([0, 3, 4, -100])).logp,
    "policy_loss": lambda x: policy_loss(-x[:, 0], torch.tensor([1.0, -1.0]), torch.tensor([0, 0, 1, 1])).loss,
    "unlikelihood_loss": lambda x: unlikelihood_loss(-x[:, 0], torch.ones(4)),
    "listwise_loss": lambda x: listwise_loss(x, x.detach()),
    "group_advantage": lambda x: group_advantage(x[:, 0], 2).advantage,
    "pairwise_iou": lambda x: pairwise_iou(x[:, :4], x[:2, 1:]),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", CALLS)
def test_other_calls_are_looped_over(name: str) -> None:
    x = torch.rand(3, 4, 5).cumsum(-1)
    torch.testing.assert_close(torch.vmap(CALLS[name])(x), torch.stack([CALLS[name](one) for one in x]))
