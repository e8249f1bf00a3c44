"""The two passes over a tile of logits in C++: against float64 and the eager code they replace, at every edge."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels import _native
from fastrl_kernels.linear_logprob import linear_logprob
from fastrl_kernels.token_logprob import token_logprob, token_logprob_reference
from tests.helpers.gradients import same_bits_with_threads

pytestmark = pytest.mark.skipif(
    any(_native.lacks(f"fastrl_{name}_tile") for name in ("fold", "differentiate")),
    reason="the extension lacks these functions",
)
COLUMNS = [1, 3, 16, 127, 128, 129, 1000, 4099]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the C++ functions that were called."""
    names: list[str] = []
    call = _native._call
    monkeypatch.setattr(_native, "_call", lambda name, *rest: (names.append(name), call(name, *rest))[1])
    return names


def _gradient(function: Callable[..., Any], logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    x = logits.clone().requires_grad_()
    logp = function(x, target, **options).logp
    upstream = torch.linspace(-2, 3, logp.numel(), dtype=logp.dtype)
    return logp.detach(), torch.autograd.grad(logp, x, upstream)[0]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_float64(called: list[str], columns: int, temperature: float) -> None:
    logits, target = 4 * torch.randn(9, columns), torch.randint(0, columns, (9,))
    target[3] = -100
    if columns > 2:
        logits[1], logits[2, 1:], logits[4] = 0.5, -math.inf, 100.0  # ties, forbidden tokens, large logits
        target[2] = 0
        logits[5, target[5]] += 30  # a confident target: 1 - p is tiny, and must not be 0
    got = _gradient(token_logprob, logits, target, temperature=temperature)
    want = _gradient(token_logprob_reference, logits.double(), target, temperature=temperature)
    torch.testing.assert_close(got[0].double(), want[0], rtol=5e-5, atol=1e-15)
    torch.testing.assert_close(got[1].double(), want[1], rtol=5e-5, atol=1e-15)
    assert called == ["fastrl_fold_tile", "fastrl_differentiate_tile"]


def test_numbers_that_are_not_finite_are_as_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        for places in ([2], [0, 5], list(range(40))):
            logits, target = torch.randn(3, 40), torch.tensor([2, 7, -100])
            logits[0, places], logits[2, places] = bad, bad
            mine = _gradient(token_logprob, logits, target)
            with monkeypatch.context() as patch:
                patch.setattr(_native, "lacks", lambda name: "left out")
                eager = _gradient(token_logprob, logits, target)
            for a, b in zip(mine, eager, strict=True):
                torch.testing.assert_close(a, b, equal_nan=True)


def test_logits_are_only_read_and_their_gradient_may_take_their_place(called: list[str]) -> None:
    logits, target = torch.randn(6, 300), torch.randint(0, 300, (6,))
    leaf = logits.clone().requires_grad_()
    (apart,) = torch.autograd.grad(token_logprob(leaf, target).logp.sum(), leaf)
    assert torch.equal(leaf, logits)
    strided = torch.randn(6, 400)[:, 50:350].copy_(logits).requires_grad_()
    (of_strided,) = torch.autograd.grad(token_logprob(strided, target).logp.sum(), strided)
    inner = leaf * 1
    (inside,) = torch.autograd.grad(token_logprob(inner, target, inplace_backward=True).logp.sum(), leaf)
    assert torch.equal(inside, apart)
    assert torch.equal(of_strided, apart)
    assert called.count("fastrl_differentiate_tile") == 3


def test_slabs_add_up(called: list[str]) -> None:
    hidden, head, target = torch.randn(70, 8), 3 * torch.randn(900, 8), torch.randint(0, 900, (70,))
    whole = linear_logprob(hidden, head, target).logp
    calls = len(called)
    slabs = linear_logprob(hidden, head, target, scratch_bytes=800_000).logp
    assert len(called) > calls + 1
    torch.testing.assert_close(slabs, whole, rtol=1e-6, atol=1e-6)
    exact = linear_logprob(hidden.double(), head.double(), target).logp
    torch.testing.assert_close(slabs.double(), exact, rtol=1e-5, atol=1e-5)


def test_what_they_do_not_compute_stays_with_torch(called: list[str]) -> None:
    logits, target = torch.randn(4, 50).requires_grad_(), torch.randint(0, 50, (4,))
    token_logprob(logits.double(), target)
    token_logprob(logits, target[:, None].expand(4, 2).contiguous())
    token_logprob(logits, target, return_entropy=True).entropy.sum().backward()  # type: ignore[union-attr]
    token_logprob(logits.detach().T.contiguous().T, target)
    assert not called


def test_thread_count_changes_nothing() -> None:
    logits, target = torch.randn(300, 9000), torch.randint(0, 9000, (300,))
    assert same_bits_with_threads((1, 2, 5), lambda: _gradient(token_logprob, logits, target))
