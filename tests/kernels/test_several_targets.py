"""Log-probs of several ids a row from one pass: values, gradients, repeated and ignored ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastrl_kernels import linear_logprob, token_logprob
from fastrl_kernels.reference import linear_logprob_reference, token_logprob_reference


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def ids(n: int, k: int, v: int) -> Tensor:
    target = torch.randint(v, (n, k))
    target[0] = target[0, 0]  # the same id k times
    target[1, ::2] = -100
    target[2] = -100
    return target


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(("k", "width"), [(1, 300), (2, 300), (5, 1031), (64, 70), (3, 4096 + 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits(dtype: torch.dtype, k: int, width: int, entropy: bool) -> None:
    torch.manual_seed(k)
    logits, target = (torch.randn(5, width) * 3).to(dtype).requires_grad_(), ids(5, k, width)
    temperature, up = torch.rand(5) + 0.5, torch.randn(5, k).double()
    up[4] = 0
    twin = logits.detach().double().requires_grad_()
    got = token_logprob(logits, target, temperature=temperature, return_entropy=entropy)
    want = token_logprob_reference(twin, target, temperature=temperature.double(), return_entropy=entropy)
    assert got.logp.shape == (5, k)
    assert relative(got.logp, want.logp) < 3e-6
    losses = [
        (out.logp * up).sum() + (0 if out.entropy is None else 0.3 * out.entropy[:4].sum()) for out in (got, want)
    ]
    mine, truth = torch.autograd.grad(losses[0], logits)[0], torch.autograd.grad(losses[1], twin)[0]
    assert relative(mine, truth) < (5e-6 if dtype == torch.float32 else 1.6e-2)
    assert not mine[2].any()
    assert not mine[4].any()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("budget", [1 << 30, 20_000])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_heads_in_slabs(budget: int, softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 3, 16), torch.randn(1100, 16) / 2, torch.randn(1100)
    target, leaves = ids(6, 4, 1100).view(2, 3, 4).int(), [hidden, weight, bias]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    options = {"softcap": softcap, "return_entropy": True}
    got = linear_logprob(*leaves[:2], target, bias=leaves[2], scratch_bytes=budget, **options)
    want = linear_logprob_reference(*twins[:2], target, bias=twins[2], **options)
    assert (got.logp.shape, got.entropy.shape) == ((2, 3, 4), (2, 3))
    up = torch.randn(2, 3, 4).double()
    pairs = zip(got, want, strict=True)
    assert all(relative(mine, truth) < 3e-6 for mine, truth in pairs)
    losses = [(out.logp * up).sum() + out.entropy.sum() for out in (got, want)]
    grads = zip(torch.autograd.grad(losses[0], leaves), torch.autograd.grad(losses[1], twins), strict=True)
    assert all(relative(mine, truth) < 5e-6 for mine, truth in grads)


@pytest.mark.usefixtures("path")
def test_a_confident_target_among_others_keeps_its_gradient() -> None:
    logits = torch.randn(3, 300)
    logits[:, 7] = torch.tensor([14.0, 18.0, 22.0])
    logits, target = logits.requires_grad_(), torch.tensor([[7, 5], [7, 7], [3, 7]])
    twin = logits.detach().double().requires_grad_()
    up = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 2.0]])  # the other target pulls nothing, nor hides the rest
    (mine,) = torch.autograd.grad(token_logprob(logits, target).logp, logits, up)
    (truth,) = torch.autograd.grad(token_logprob_reference(twin, target).logp, twin, up.double())
    assert bool(((mine - truth).abs() <= 1e-5 * truth.abs()).all())


def test_one_id_a_row_as_a_column_is_the_vector() -> None:
    logits, target = torch.randn(4, 30, requires_grad=True), torch.tensor([3, 4, -100, 29])
    vector, column = token_logprob(logits, target), token_logprob(logits, target[:, None])
    torch.testing.assert_close(column.logp[:, 0], vector.logp)
    grads = [torch.autograd.grad(out.logp.sum(), logits)[0] for out in (vector, column)]
    torch.testing.assert_close(*grads)


def test_opcheck_compile_and_stand_ins() -> None:
    logits, target = torch.randn(4, 30, requires_grad=True), ids(4, 3, 30)
    torch.library.opcheck(torch.ops.fastrl.token_logprob.default, (logits, target, None, 1.0, -100, True))
    hidden, weight = torch.randn(4, 5, requires_grad=True), torch.randn(30, 5, requires_grad=True)
    options = (1.0, 1.0, None, -100, True, False, 1 << 20)
    torch.library.opcheck(
        torch.ops.fastrl.linear_logprob.default, (hidden, weight, target, *(None,) * 5, *options, None, False)
    )
    compiled = torch.compile(lambda x: token_logprob(x, target).logp.sum(), fullgraph=True, backend="aot_eager")
    (got,), (want,) = (
        torch.autograd.grad(f, logits) for f in (compiled(logits), token_logprob(logits, target).logp.sum())
    )
    torch.testing.assert_close(got, want)
    meta = linear_logprob(
        hidden.detach().to("meta"), weight.detach().to("meta"), target.to("meta"), return_entropy=True
    )
    assert (meta.logp.shape, meta.entropy.shape) == ((4, 3), (4,))


def test_bad_targets_are_named() -> None:
    logits = torch.zeros(4, 9)
    with pytest.raises(ValueError, match=r"target: expected shape \[4, any\], got \[5, 2\]"):
        token_logprob(logits, torch.zeros(5, 2).long())
    with pytest.raises(ValueError, match="target: expected 1 to 1024 ids a row, got 0"):
        token_logprob(logits, torch.zeros(4, 0).long())
    with pytest.raises(ValueError, match=r"target: row 2 is 9, expected 0..8"):
        token_logprob(logits, torch.tensor([[0, 1], [2, 3], [4, 9], [5, 6]]))
