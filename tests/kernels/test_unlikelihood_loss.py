"""Token unlikelihood against the formula in high precision, at both ends of p, and in the interpreter."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch

from fastrl_kernels.unlikelihood_loss import (
    MAX_SLOPE,
    _unlikelihood_op,
    unlikelihood_loss,
    unlikelihood_loss_reference,
)


def _exact(logp: float, sigma: float, alpha: float) -> tuple[float, float]:
    """Loss of one token and its slope with 60 digits; p is held at 1 - 1e-6, with the tangent beyond."""
    with localcontext() as context:
        context.prec = 60
        top = Decimal("0.999999")
        x, s, a = Decimal(logp), Decimal(sigma), Decimal(alpha)
        p = min(x.exp(), top)
        slope = p / (1 - p)
        log1mexp = (1 - p).ln() - slope * (x - p.ln() if p == top else 0)
        return float(-(s * x + a * (1 - s) * log1mexp)), float(-(s - a * (1 - s) * slope))


def _check_both_ends(dtype: torch.dtype, tolerance: float, grad_tolerance: float):
    points = torch.cat([torch.logspace(-9, 2.1, 24), torch.tensor([math.log(2), 1e-6, 0.7])])
    for x in (-points).to(dtype).tolist():
        for sigma in (0.0, 0.3, 1.0):
            logp = torch.tensor([x], dtype=dtype, requires_grad=True)
            loss = unlikelihood_loss(logp, torch.tensor([sigma], dtype=torch.float64), alpha=10.0)
            (grad,) = torch.autograd.grad(loss, logp)
            want, slope = _exact(x, sigma, 10.0)
            assert loss.item() == pytest.approx(want, rel=tolerance, abs=1e-37), (x, sigma)
            assert grad.item() == pytest.approx(slope, rel=grad_tolerance, abs=1e-37), (x, sigma)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "grad_tolerance"),
    [(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-6, 1e-6), (torch.bfloat16, 1e-6, 2**-8)],
)
def test_both_ends(dtype, tolerance, grad_tolerance):
    _check_both_ends(dtype, tolerance, grad_tolerance)


def test_fp16_values():  # its slopes near p = 1 do not fit fp16
    for x in (-1e-3, -0.5, -8.0):
        logp = torch.tensor([x], dtype=torch.float16)
        want, _ = _exact(logp.item(), 0.3, 10.0)
        assert unlikelihood_loss(logp, torch.tensor([0.3]).double()).item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("function", [unlikelihood_loss, unlikelihood_loss_reference])
def test_gradcheck(function):
    logp = (-torch.linspace(0.001, 6, 20, dtype=torch.float64)).requires_grad_()
    sigma, weight = torch.rand(20, dtype=torch.float64), torch.rand(20, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: function(x, sigma, alpha=3.0, weight=weight), logp)


def test_slope_is_bounded_and_keeps_its_sign_where_the_model_is_certain():
    for x in (-1e-7, -1e-30, 0.0, 1e-7):
        logp = torch.tensor([x], requires_grad=True)
        loss = unlikelihood_loss(logp, torch.zeros(1), alpha=1.0)
        (grad,) = torch.autograd.grad(loss, logp)
        assert math.isfinite(loss.item())
        assert grad.item() == pytest.approx(MAX_SLOPE, rel=1e-6)


def test_special_cases_are_likelihood():
    logp = -torch.rand(30, dtype=torch.float64) * 4
    sigma = torch.rand(30, dtype=torch.float64)
    torch.testing.assert_close(unlikelihood_loss(logp, torch.ones_like(sigma)), -logp.mean())
    torch.testing.assert_close(unlikelihood_loss(logp, sigma, alpha=0.0), -(sigma * logp).mean())


def _check_impossible(dtype):
    never = torch.tensor([-math.inf], dtype=dtype, requires_grad=True)
    loss = unlikelihood_loss(never, torch.zeros(1))
    assert loss == 0  # already impossible: no gradient
    assert torch.autograd.grad(loss, never)[0] == 0
    assert unlikelihood_loss(never, torch.ones(1)) == math.inf


def test_impossible_tokens():
    _check_impossible(torch.float64)


def _check_masks(dtype):
    logp = torch.tensor([-1.0, math.nan, -2.0, math.nan], dtype=dtype, requires_grad=True)
    weight = torch.tensor([0.5, 0, 0.25, 0], dtype=dtype)
    sigma = torch.tensor([0.5, math.nan, 1.0, 0.2], dtype=dtype)
    loss = unlikelihood_loss(logp, sigma, weight=weight)
    want = 0.5 * _exact(-1.0, 0.5, 10.0)[0] + 0.25 * 2.0
    assert loss.item() == pytest.approx(want, rel=1e-6)
    (grad,) = torch.autograd.grad(loss, logp)
    assert grad[[1, 3]].tolist() == [0, 0]
    assert grad[0].item() == pytest.approx(0.5 * _exact(-1.0, 0.5, 10.0)[1], rel=1e-6)
    for n, w in ((0, None), (0, torch.empty(0, dtype=dtype)), (2, torch.zeros(2, dtype=dtype))):
        empty = torch.full((n,), math.nan, dtype=dtype, requires_grad=True)
        zero = unlikelihood_loss(empty, torch.zeros(n, dtype=dtype), weight=w)
        assert zero == 0
        assert (torch.autograd.grad(zero, empty)[0] == 0).all()


def test_masks_and_empty():
    _check_masks(torch.float64)


def test_layouts_upstream_gradients_and_repeats():
    logp, sigma = -torch.rand(41), torch.rand(41)
    spread = torch.stack([logp, logp], 1)[:, 0].requires_grad_()
    (grad,) = torch.autograd.grad((unlikelihood_loss(spread, sigma).expand(2) * torch.tensor([1.0, 2.0])).sum(), spread)
    plain = logp.clone().requires_grad_()
    loss = unlikelihood_loss(plain, sigma)
    torch.testing.assert_close(grad, 3 * torch.autograd.grad(loss, plain)[0])
    assert torch.equal(loss, unlikelihood_loss(plain, sigma))


def test_op_is_well_registered_and_compiles():
    logp, sigma = (-torch.rand(9) - 0.1).requires_grad_(), torch.rand(9)
    torch.library.opcheck(_unlikelihood_op, (logp, sigma, None, 10.0))
    torch.library.opcheck(_unlikelihood_op, (logp, sigma, torch.rand(9), 2.0))
    compiled = torch.compile(unlikelihood_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logp, sigma), unlikelihood_loss(logp, sigma))


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, r"logp: expected shape \[any\]", {"logp": torch.ones(2, 2, 2)}),
        (TypeError, "logp: expected dtype", {"logp": torch.ones(3, dtype=torch.int64)}),
        (ValueError, r"sigma: expected shape \[3\], got \[2\]", {"sigma": torch.ones(2)}),
        (ValueError, r"weight: expected shape \[3\]", {"weight": torch.ones(4)}),
        (ValueError, "alpha: expected >= 0, got -1", {"alpha": -1}),
    ],
)
def test_bad_arguments_are_named(error, match, change):
    with pytest.raises(error, match=match):
        unlikelihood_loss(**({"logp": -torch.ones(3), "sigma": torch.ones(3)} | change))


@pytest.fixture
def poisoned(monkeypatch):
    """torch.empty gives NaN, so that an element that a kernel does not write is detected."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))


@pytest.mark.interpreter
def test_kernel_at_both_ends(poisoned):
    _check_both_ends(torch.float32, 1e-6, 1e-6)
    _check_masks(torch.float32)
    _check_impossible(torch.float32)


@pytest.mark.interpreter
@pytest.mark.parametrize("n", [1, 255, 256, 257, 521])
@pytest.mark.parametrize("weighted", [False, True])
def test_kernel_equals_float64(poisoned, n, weighted):
    dtype = torch.bfloat16 if n == 257 else torch.float32
    logp, sigma = (-5 * torch.rand(n)).to(dtype).requires_grad_(), torch.rand(n)
    weight = torch.rand(n) * (torch.arange(n) % 3 > 0) if weighted else None
    exact = logp.detach().double().requires_grad_()
    loss = unlikelihood_loss(logp, sigma, weight=weight)
    want = unlikelihood_loss_reference(exact, sigma, weight=weight)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    grad, want_grad = torch.autograd.grad(loss, logp)[0], torch.autograd.grad(want, exact)[0]
    torch.testing.assert_close(grad.double(), want_grad, rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-7)
