"""Losses, advantages, weights and overlaps in C++: against the float64 references, and the eager code they replace."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels import _native
from fastrl_kernels.group_advantage import _eager as advantage_eager
from fastrl_kernels.group_advantage import group_advantage, group_advantage_reference
from fastrl_kernels.listwise_loss import listwise_loss, listwise_loss_reference
from fastrl_kernels.pairwise_iou import KINDS, pairwise_iou, pairwise_iou_reference
from fastrl_kernels.policy_loss import policy_loss, policy_loss_reference
from fastrl_kernels.token_weights import token_weights

NAMES = ("token_weights", "group_advantage", "policy_rows", "listwise_loss", "pairwise_iou")
pytestmark = pytest.mark.skipif(
    any(_native.lacks(f"fastrl_{name}") for name in NAMES), reason="the extension lacks these functions"
)
HALVES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the C++ functions that were called."""
    names: list[str] = []
    call = _native._call
    monkeypatch.setattr(_native, "_call", lambda name, *rest: (names.append(name), call(name, *rest))[1])
    return names


def _without(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(_native, "lacks", lambda name: "left out")
        return run()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("baseline", "scale"), itertools.product(("mean", "leave_one_out"), ("std", "none")))
def test_advantages_of_ragged_groups(called: list[str], dtype: torch.dtype, baseline: str, scale: str) -> None:
    rewards, ids = torch.randn(61, 3).to(dtype), torch.randint(-1, 9, (61,), dtype=torch.int32)
    rewards[ids == 2], ids[ids == 7] = 0.5, 6  # a constant group, an empty one
    options: dict[str, Any] = {"weights": torch.tensor([1.0, 0.5, -2.0]), "baseline": baseline, "scale": scale}
    for unbiased in (True, False):
        got = group_advantage(rewards, ids, n_groups=9, unbiased=unbiased, **options)
        want = group_advantage_reference(rewards.double(), ids, n_groups=9, unbiased=unbiased, **options)
        assert got.constant.tolist() == want.constant.tolist()
        for mine, exact in zip(got[:4], want[:4], strict=True):
            torch.testing.assert_close(mine, exact.float(), rtol=1.2e-7, atol=0)
    assert called == ["fastrl_group_advantage"] * 2


def test_not_a_number_stays_in_its_group() -> None:
    rewards = torch.tensor([[1.0], [math.nan], [2.0], [2.0], [0.0], [math.inf]])
    arguments = (rewards, None, None, 2, 3, False, True, True, 1e-4)
    got, want = torch.ops.fastrl.group_advantage(*arguments), advantage_eager(*arguments)
    for mine, eager in zip(got, want, strict=True):
        torch.testing.assert_close(mine, eager, equal_nan=True)


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_weights_are_those_of_torch(called: list[str], monkeypatch: pytest.MonkeyPatch, aggregate: str) -> None:
    ids, mask = torch.randint(-1, 8, (73,)), torch.randint(0, 3, (73,))
    mask[ids == 3] = 0  # a completion without rows that count
    for given, normalizer in itertools.product((None, mask, mask > 0), (7, 300.5)):

        def run(given: Tensor | None = given, normalizer: float = normalizer) -> list[Tensor]:
            options = {"aggregate": aggregate, "mask": given, "n_completions": 8}
            plain = [] if aggregate == "constant" else [token_weights(ids, **options)]
            return [*plain, token_weights(ids, normalizer=normalizer, **options)]

        for mine, eager in zip(run(), _without(monkeypatch, run), strict=True):
            assert torch.equal(mine, eager)
    assert set(called) == {"fastrl_token_weights"}
    assert token_weights(ids[:0], aggregate="token", n_completions=0).shape == (0,)


POLICIES = [
    {},
    {"loss": "cispo", "beta": 0.1},
    {"loss": "sapo", "tau_positive": 2.0},
    {"dual_clip": 1.2, "beta": 0.2, "kl": "k1"},
    {"beta": 0.2, "kl": "k2", "kl_gradient": "k2"},
    {"ratio": "sequence", "clip_low": 0.02, "clip_high": 0.02, "beta": 0.1},
    {"importance": "truncate", "importance_cap": 1.1},
    {"importance": "mask", "importance_cap": 1.1, "importance_level": "sequence"},
    {"importance": "truncate", "importance_cap": 1.1, "importance_level": "sequence", "ratio": "sequence"},
    {"loss": "cispo", "ratio": "sequence", "importance": "mask", "importance_cap": 1.2},
]


def _policy(dtype: torch.dtype, n: int = 203) -> dict[str, Any]:
    logp = -3 * torch.rand(n)
    given = {name: logp + 0.3 * torch.randn(n) for name in ("old_logp", "ref_logp", "sampler_logp")}
    weight = torch.rand(n) + 0.1
    weight[torch.rand(n) < 0.3] = 0
    for vector in (logp, *given.values()):
        vector[weight == 0] = math.nan
    given["sampler_logp"][:9] = math.nan  # of some live rows, too
    return {
        name: x.to(dtype) for name, x in {"logp": logp, "advantage": torch.randn(7), "weight": weight, **given}.items()
    } | {"completion": torch.randint(-1, 7, (n,), dtype=torch.int32)}


@pytest.mark.parametrize("options", POLICIES)
@pytest.mark.parametrize("dtype", HALVES)
def test_policy_losses(called: list[str], dtype: torch.dtype, options: dict[str, Any]) -> None:
    p = _policy(dtype)
    if "importance" not in options:
        del p["sampler_logp"]
    exact = {name: x.double() if x.is_floating_point() else x for name, x in p.items()}
    found = []
    for function, given in ((policy_loss, p), (policy_loss_reference, exact)):
        logp = given["logp"].clone().requires_grad_()
        out = function(**(given | {"logp": logp}), **options)
        (grad,) = torch.autograd.grad(out.loss, logp)
        found.append((torch.stack(tuple(out)).double(), grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1].to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    assert called == ["fastrl_policy_rows"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"ratio": "sequence"}, {"loss": "sapo"}, {"importance": "truncate"}])
def test_policy_rows_that_are_not_finite_are_as_in_torch(
    monkeypatch: pytest.MonkeyPatch, bad: float, options: dict[str, Any]
) -> None:
    for name in ("logp", "old_logp", "ref_logp"):
        p = _policy(torch.float32, 22)
        if "importance" not in options:
            del p["sampler_logp"]
        p["weight"][13], p["completion"][13], p[name][13] = 0.3, 2, bad

        def run(p: dict[str, Any] = p) -> tuple[Tensor, ...]:
            logp = p["logp"].clone().requires_grad_()
            out = policy_loss(**(p | {"logp": logp}), beta=0.1, **options)
            return (*out, *torch.autograd.grad(out.loss, logp))

        for mine, eager in zip(run(), _without(monkeypatch, run), strict=True):
            torch.testing.assert_close(mine, eager, equal_nan=True)


@pytest.mark.parametrize("x", [0.0, 1e-12, -1e-7, 3e-3, -0.34, 0.35, 1.0, -5.0, 19.99, 21.0, -800.0])
def test_kl_keeps_its_relative_accuracy(x: float) -> None:
    logp, ref = torch.tensor([0.0], requires_grad=True), torch.tensor([x])
    ids, zero = torch.tensor([0]), torch.zeros(1)
    out = policy_loss(logp, zero, ids, ref_logp=ref, beta=1.0)
    (grad,) = torch.autograd.grad(out.loss, logp)
    near = min(float(ref), 20.0)
    torch.testing.assert_close(grad.double(), -torch.tensor([math.expm1(near)]).double(), rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("kind", ["perpo", "listmle"])
@pytest.mark.parametrize("k", [0, 1, 2, 5, 33, 130])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.7, 1.0, 2.0])
def test_lists(called: list[str], kind: str, k: int, gamma: float) -> None:
    mask = torch.rand(6, k) > 0.3
    mask[4:5] = False
    for dtype, gap in ((torch.float32, 1.0), (torch.float32, 1e4), (torch.bfloat16, 1.0)):
        score, reward = (gap * torch.randn(6, k)).to(dtype), (torch.randint(0, 6, (6, k)) / 5).to(dtype)
        score[~mask], reward[~mask] = math.nan, math.nan
        options = {"mask": mask, "kind": kind, "gamma": gamma}
        mine, exact = score.clone().requires_grad_(), score.double().requires_grad_()
        got = listwise_loss(mine, reward, **options)
        want = listwise_loss_reference(exact, reward.double(), **options)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
        grads = torch.autograd.grad(got.sum(), mine)[0].double(), torch.autograd.grad(want.sum(), exact)[0]
        torch.testing.assert_close(grads[0], grads[1].nan_to_num(), rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert set(called) == {"fastrl_listwise_loss"}


@pytest.mark.parametrize("kind", ["perpo", "listmle"])
def test_a_score_that_is_not_finite_spoils_its_list(kind: str) -> None:
    score = torch.tensor([[1.0, math.inf, 0.0], [1.0, 2.0, 0.5], [1.0, 0.0, math.nan]])
    mask = torch.tensor([[True, True, False], [True, True, True], [True, True, False]])
    loss, grad = torch.ops.fastrl.listwise_loss(score, score.new_ones(3, 3), mask, kind == "listmle", 0.1, 0.5)
    assert loss.isnan().tolist() == [True, False, False]
    assert grad.isnan().tolist() == [[True, True, False], [False] * 3, [False] * 3]


def _boxes(*shape: int) -> Tensor:
    edge = torch.tensor([0.0, 1.0, 2.0, 2.0**40, -3e38, math.nan, math.inf, 1e-23])
    boxes = torch.rand(*shape, 4) * 4
    boxes[..., 2:] += boxes[..., :2]
    odd = torch.rand(*shape, 4) < 0.08
    return torch.where(odd, edge[torch.randint(0, 8, (*shape, 4))], boxes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduce", [None, "max"])
def test_overlaps_are_those_of_torch(called: list[str], kind: str, reduce: str | None) -> None:
    for n, m in ((5, 34), (1, 1), (3, 0), (0, 4)):
        a, b = _boxes(3, 1, n), _boxes(2, m)
        n_a, n_b = torch.randint(-1, n + 2, (3, 2)), torch.randint(-1, m + 2, (3, 2), dtype=torch.int32)
        for counts in ({}, {"n_a": n_a, "n_b": n_b}):
            got = pairwise_iou(a, b, kind=kind, reduce=reduce, **counts)
            want = pairwise_iou_reference(a, b, kind=kind, reduce=reduce, **counts)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert set(called) == {"fastrl_pairwise_iou"}


def test_overlaps_with_a_gradient_stay_with_torch(called: list[str]) -> None:
    a, b = (_boxes(4).nan_to_num(1, 1, 1).requires_grad_() for _ in range(2))
    (grad,) = torch.autograd.grad(pairwise_iou(a, b).sum(), a, create_graph=True)
    assert grad.requires_grad
    assert not called


def test_float64_stays_with_torch(called: list[str]) -> None:
    x, ids = torch.rand(6, dtype=torch.float64), torch.arange(6) % 2
    group_advantage(x, 2)
    listwise_loss(x[None], x[None])
    pairwise_iou(x[None, :4], x[None, :4])
    policy_loss(x, x[:2], ids, weight=x)
    policy_loss(x.float(), x[:2].float(), ids, weight=x)  # one of them is enough
    assert not called


def test_thread_count_changes_nothing() -> None:
    score, reward, boxes = torch.randn(300, 64), torch.rand(300, 64), _boxes(40, 200)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            lists = [listwise_loss(score, reward, kind=kind) for kind in ("perpo", "listmle")]
            outs.append((*lists, pairwise_iou(boxes, boxes.flip(0), kind="ciou")))
    finally:
        torch.set_num_threads(before)
    for other in outs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs[0], other, strict=True))
