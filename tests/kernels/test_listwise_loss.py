"""Listwise losses against the formulas in plain Python, order invariance, ties, gaps, masks, and the interpreter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastrl_kernels.listwise_loss import (
    MAX_ITEMS,
    _listwise_op,
    launch_config,
    listwise_loss,
    listwise_loss_reference,
)

KINDS = ["perpo", "listmle"]


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _perpo(score: list[float], reward: list[float], beta: float, gamma: float) -> float:
    """The released trainer's loss: pairs of the list sorted by falling reward; equal rewards left out."""
    order = sorted(range(len(score)), key=lambda i: -reward[i])
    pairs = [(i, j) for i, j in itertools.combinations(order, 2) if reward[i] != reward[j]]
    weights = [abs(reward[i] - reward[j]) ** gamma for i, j in pairs]
    terms = [w * _softplus(-beta * (score[i] - score[j])) for w, (i, j) in zip(weights, pairs, strict=True)]
    return math.fsum(terms) / math.fsum(weights) if pairs else 0.0


def _listmle(score: list[float], reward: list[float], beta: float, gamma: float) -> float:
    """Negative log-likelihood of the ranking, ties in input order."""
    ranked = [beta * score[i] for i in sorted(range(len(score)), key=lambda i: -reward[i])]
    top = [max(ranked[k:]) for k in range(len(ranked))]
    lse = [t + math.log(math.fsum(math.exp(x - t) for x in ranked[k:])) for k, t in enumerate(top)]
    return math.fsum(a - b for a, b in zip(lse, ranked, strict=True))


ORACLE = {"perpo": _perpo, "listmle": _listmle}
_items = st.lists(st.tuples(st.floats(-1e4, 1e4), st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, -3.0])), max_size=9)


@given(_items, st.sampled_from(KINDS), st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([0.1, 1.0]))
def test_value_is_the_written_out_formula(items, kind, gamma, beta):
    score, reward = [s for s, _ in items], [r for _, r in items]
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (score, reward)]
    got = listwise_loss(*tensors, kind=kind, gamma=gamma, beta=beta).item()
    assert got == pytest.approx(ORACLE[kind](score, reward, beta, gamma), rel=1e-9, abs=1e-9)


def _problem(b: int, k: int, gap: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, tied rewards, a mask; NaN where the mask is off."""
    generator = torch.Generator().manual_seed(b * 5000 + k)
    score = torch.randn(b, k, generator=generator) * gap
    reward = torch.randint(0, 6, (b, k), generator=generator) / 5
    mask = torch.rand(b, k, generator=generator) > 0.2
    score[~mask] = math.nan
    reward[~mask] = math.nan
    return score.to(dtype), reward.to(dtype), mask


def _grad(function, score: Tensor, *rest, upstream: Tensor, **options) -> tuple[Tensor, Tensor]:
    score = score.clone().requires_grad_()
    loss = function(score, *rest, **options)
    return loss.detach(), torch.autograd.grad(loss, score, upstream.to(loss.dtype))[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [listwise_loss, listwise_loss_reference])
def test_gradcheck(function, kind):
    score, reward, mask = _problem(3, 7, 2.0, torch.float64)
    score = torch.nan_to_num(score).requires_grad_()
    torch.autograd.gradcheck(lambda s: function(s, reward, mask=mask, kind=kind, beta=0.7), score)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gap", [1.0, 1e4])
def test_precision_of_the_inputs_is_the_only_loss(kind, dtype, gap):
    score, reward, mask = _problem(4, 33, gap, dtype)
    upstream = torch.randn(4)
    loss, grad = _grad(listwise_loss, score, reward, mask=mask, kind=kind, upstream=upstream)
    want, want_grad = _grad(listwise_loss, score.double(), reward.double(), mask=mask, kind=kind, upstream=upstream)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), want_grad, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert (grad[~mask] == 0).all()


def test_a_widely_copied_listmle_is_wrong_here_and_this_one_is_not():
    # the global-maximum form with an epsilon inside the logarithm gives 32.95 for these scores
    score, reward = torch.tensor([[40.0, 0.0, 1.0]], requires_grad=True), torch.tensor([[2.0, 1.0, 0.0]])
    loss = listwise_loss(score, reward, kind="listmle", beta=1.0)
    assert loss.item() == pytest.approx(math.log1p(math.e), rel=1e-6)
    (grad,) = torch.autograd.grad(loss.sum(), score)
    assert grad[0].tolist() == pytest.approx([0, -0.7310586, 0.7310586], abs=1e-6)


def test_perpo_ignores_the_order_of_the_items():
    score, reward, mask = _problem(5, 12, 3.0, torch.float64)
    order = torch.randperm(12)
    upstream = torch.randn(5)
    loss, grad = _grad(listwise_loss, score, reward, mask=mask, upstream=upstream)
    moved, moved_grad = _grad(listwise_loss, score[:, order], reward[:, order], mask=mask[:, order], upstream=upstream)
    torch.testing.assert_close(moved, loss)
    torch.testing.assert_close(moved_grad, grad[:, order])


def _check_not_finite(kind):
    """Only the list with that number is NaN, including its gradient."""
    for bad in (math.nan, math.inf, -math.inf):
        score = torch.tensor([[1.0, bad, 3.0], [1.0, 2.0, 3.0]])
        reward = torch.tensor([[2.0, 1.0, 0.0]] * 2)
        loss, grad = _grad(listwise_loss, score, reward, kind=kind, upstream=torch.ones(2))
        assert loss.isnan().tolist() == [True, False]
        assert grad.isnan().all(1).tolist() == [True, False]
        mask = torch.tensor([[True, False, True]] * 2)  # a masked item changes nothing
        loss, grad = _grad(listwise_loss, score, reward, mask=mask, kind=kind, upstream=torch.ones(2))
        assert loss.isfinite().all()
        assert grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_that_is_not_finite_gives_nan(kind):
    _check_not_finite(kind)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_an_error(bad):
    reward = torch.tensor([[1.0, bad]])
    with pytest.raises(ValueError, match=r"reward: expected finite numbers, got (nan|inf) at \[0, 1\]"):
        listwise_loss(torch.zeros(1, 2), reward)
    assert listwise_loss(torch.zeros(1, 2), reward, mask=torch.tensor([[True, False]])).item() == 0


def test_rewards_at_the_end_of_the_range():
    reward = torch.tensor([[1e308, 0.0, -1e308]], dtype=torch.float64)
    score = torch.tensor([[0.3, 0.2, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(listwise_loss(score, reward), listwise_loss(score, reward / 1e308))


def test_dpo_is_a_list_of_two():
    chosen, rejected = torch.randn(2, 4, dtype=torch.float64)
    want = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected))
    reward = torch.tensor([[0.2, 0.9]]).expand(4, 2).double()  # the better one may be second
    torch.testing.assert_close(listwise_loss(torch.stack([rejected, chosen], 1), reward, beta=0.1), want)


def _check_degenerate(dtype):
    """No pairs to compare: loss and gradient are exactly 0."""
    score = torch.randn(2, 5, dtype=dtype) * 100
    ones = torch.ones(2)
    for gamma in (0.0, 0.5, 1.0):
        loss, grad = _grad(listwise_loss, score, torch.full_like(score, 0.3), gamma=gamma, upstream=ones)
        assert (loss == 0).all()
        assert (grad == 0).all()
    for kind in KINDS:
        for mask in (torch.zeros(2, 5, dtype=torch.bool), torch.eye(5, dtype=torch.bool)[:2]):
            loss, grad = _grad(listwise_loss, score, torch.rand_like(score), mask=mask, kind=kind, upstream=ones)
            assert (loss == 0).all()
            assert (grad == 0).all()
        for shape in ((0, 3), (2, 0), (2, 1)):
            empty = torch.randn(shape, dtype=dtype)
            loss, grad = _grad(listwise_loss, empty, empty.clone(), kind=kind, upstream=torch.ones(shape[0]))
            assert loss.tolist() == [0] * shape[0]
            assert (grad == 0).all()


def test_nothing_to_compare_gives_exact_zeros():
    _check_degenerate(torch.float64)


def _check_ties_and_scales(dtype):
    score = torch.tensor([[0.5, -1.0, 2.0, 0.0]], dtype=dtype)
    reward = torch.tensor([[1.0, 0.5, 0.5, 0.0]], dtype=dtype)
    pairs = [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]  # not (1, 2): equal rewards
    uniform = sum(_softplus(-0.1 * (score[0, i] - score[0, j]).item()) for i, j in pairs) / 5
    assert listwise_loss(score, reward, gamma=0.0).item() == pytest.approx(uniform, rel=1e-6)
    base = listwise_loss(score, reward).item()
    for factor in (1e30, 3e38 if dtype == torch.float64 else 3e37, 1e-30):
        assert listwise_loss(score, reward * factor).item() == pytest.approx(base, rel=1e-5)
    widest = torch.tensor([[3e38, 0.0, 0.0, -3e38]], dtype=dtype)  # the gap overflows fp32
    assert math.isfinite(listwise_loss(score, widest).item())
    swapped, tied = torch.tensor([[0.0, 1.0, 2.0]], dtype=dtype), torch.zeros(1, 3, dtype=dtype)
    first = listwise_loss(swapped, tied, kind="listmle", beta=1.0).item()
    assert first == pytest.approx(_listmle([0.0, 1.0, 2.0], [0.0, 0.0, 0.0], 1.0, 0.0), rel=1e-6)


def test_ties_and_scales():
    _check_ties_and_scales(torch.float64)


def test_long_lists_and_layouts():
    score, reward, mask = _problem(3, MAX_ITEMS, 5.0, torch.float32)
    for kind in KINDS:
        upstream = torch.ones(1).expand(3)  # stride 0, as .sum() gives
        loss, grad = _grad(listwise_loss, score.T.contiguous().T, reward, mask=mask, kind=kind, upstream=upstream)
        want, want_grad = _grad(listwise_loss, score, reward, mask=mask, kind=kind, upstream=torch.ones(3))
        assert torch.equal(loss, want)
        assert torch.equal(grad, want_grad)
        alone = listwise_loss(score[1:2], reward[1:2], mask=mask[1:2], kind=kind)
        torch.testing.assert_close(alone, want[1:2])


@pytest.mark.parametrize("kind", KINDS)
def test_op_is_well_registered_and_compiles(kind):
    score, reward, mask = torch.randn(3, 5, requires_grad=True), torch.rand(3, 5), torch.rand(3, 5) > 0.3
    torch.library.opcheck(_listwise_op, (score, reward, mask, kind == "listmle", 0.1, 0.5))
    compiled = torch.compile(listwise_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(score, reward, kind=kind), listwise_loss(score, reward, kind=kind))


def test_launch_configs_hold_their_items():
    for k in (1, 2, 31, 32, 33, 64, 65, 256, 257, MAX_ITEMS):
        config = launch_config(k)
        assert config.items >= k
        assert config.rows * config.items // (32 * config.warps) <= 32  # pairs a thread holds
    with pytest.raises(ValueError, match="at most 1024 items"):
        launch_config(MAX_ITEMS + 1)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, r"score: expected shape \[any, any\], got \[3\]", {"score": torch.ones(3)}),
        (ValueError, r"reward: expected shape \[2, 3\], got \[2, 4\]", {"reward": torch.ones(2, 4)}),
        (TypeError, "reward: expected dtype .* got bool", {"reward": torch.ones(2, 3, dtype=torch.bool)}),
        (TypeError, "mask: expected dtype bool", {"mask": torch.ones(2, 3)}),
        (ValueError, "kind: expected one of perpo, listmle, got 'lipo'", {"kind": "lipo"}),
        (ValueError, "gamma: expected a finite number >= 0, got -1", {"gamma": -1}),
        (ValueError, "score: at most 1024 items", {"score": torch.ones(1, 1025), "reward": torch.ones(1, 1025)}),
    ],
)
def test_bad_arguments_are_named(error, match, change):
    with pytest.raises(error, match=match):
        listwise_loss(**({"score": torch.ones(2, 3), "reward": torch.ones(2, 3)} | change))


@pytest.fixture
def poisoned(monkeypatch):
    """torch.empty gives NaN, so that an element that a kernel does not write is detected."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("b", "k"), [(2, 1), (3, 2), (2, 5), (2, 31), (2, 33), (1, 65), (1, 257)])
@pytest.mark.parametrize("gap", [1.0, 1e4])
def test_kernel_equals_float64(poisoned, kind, b, k, gap):
    dtype = torch.bfloat16 if k == 31 else torch.float32
    score, reward, mask = _problem(b, k, gap, dtype)
    upstream = torch.randn(b)
    for given_mask in (mask, None):
        if given_mask is None:
            score, reward = torch.nan_to_num(score), torch.nan_to_num(reward)
        loss, grad = _grad(listwise_loss, score, reward, mask=given_mask, kind=kind, upstream=upstream)
        want, want_grad = _grad(
            listwise_loss_reference, score.double(), reward.double(), mask=given_mask, kind=kind, upstream=upstream
        )
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
        # a score of 1e4 carries 1e-3 of its own rounding into the exponent
        atol = 1e-6 if gap == 1.0 else 1e-4
        torch.testing.assert_close(grad.double(), want_grad, rtol=max(2e-5, torch.finfo(dtype).eps), atol=atol)
        assert given_mask is None or (grad[~mask] == 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("check", [_check_degenerate, _check_ties_and_scales])
def test_kernel_at_the_edges(poisoned, check):
    check(torch.float32)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_and_numbers_that_are_not_finite(poisoned, kind):
    _check_not_finite(kind)
    score, reward = torch.zeros(2, 3), torch.tensor([[1.0, math.nan, 0.0], [1.0, 2.0, 0.0]])
    loss, grad = torch.ops.fastrl.listwise_loss(score, reward, None, kind == "listmle", 0.1, 0.5)  # as on a GPU
    assert loss.isnan().tolist() == [True, False]
    assert grad.isnan().all(1).tolist() == [True, False]
