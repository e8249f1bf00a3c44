"""Signed error over 100 000 rows: errors of a head that do not average out bias training even if each is small."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastrl_kernels.linear_logprob import linear_logprob
from fastrl_kernels.token_logprob import LogProb, token_logprob, token_logprob_reference

ROWS, WIDTH, VOCABULARY, CHUNK = 100_000, 16, 500, 5000


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(ROWS, WIDTH).to(dtype)
    weight = (torch.randn(VOCABULARY, WIDTH) * 2 * WIDTH**-0.5).to(dtype)
    return hidden, weight, torch.randint(VOCABULARY, (ROWS,))


def truth(hidden: Tensor, weight: Tensor, target: Tensor) -> LogProb:
    parts = [
        token_logprob_reference(hidden[rows].double() @ weight.double().T, target[rows], return_entropy=True)
        for rows in torch.arange(ROWS).split(CHUNK)
    ]
    return LogProb(torch.cat([part.logp for part in parts]), torch.cat([part.entropy for part in parts]))


def mean_and_standard_error(got: Tensor, want: Tensor) -> tuple[float, float]:
    error = got.double() - want
    return float(error.mean()), float(error.std() / ROWS**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp32_tiles_have_no_bias(dtype: torch.dtype) -> None:
    hidden, weight, target = inputs(dtype)
    got = linear_logprob(hidden, weight, target, return_entropy=True, scratch_bytes=32 << 20)  # fp32 tiles on a CPU
    want = truth(hidden, weight, target)
    for mine, exact in zip(got, want, strict=True):
        mean, standard_error = mean_and_standard_error(mine, exact)
        assert standard_error < 1e-8
        assert abs(mean) < 4 * standard_error


def test_bf16_tiles_are_no_worse_than_the_plain_path() -> None:
    """A bf16 tile is a bf16 matmul, as in the plain path; the steps after it must add no bias."""
    hidden, weight, target = inputs(torch.bfloat16)
    want = truth(hidden, weight, target)
    mine, plain = [], []
    for rows in torch.arange(ROWS).split(CHUNK):
        tile = hidden[rows] @ weight.T
        mine.append(token_logprob(tile, target[rows], return_entropy=True))
        log_p = tile.float().log_softmax(1)
        plain.append((log_p.gather(1, target[rows, None])[:, 0], -(log_p * log_p.exp()).sum(1)))
    for position, exact in enumerate(want):
        ours, standard_error = mean_and_standard_error(torch.cat([part[position] for part in mine]), exact)
        theirs, _ = mean_and_standard_error(torch.cat([part[position] for part in plain]), exact)
        assert abs(ours) <= abs(theirs) + 0.01 * standard_error


def test_gradient_of_hidden_is_not_shrunk_by_many_slabs() -> None:
    """Rounding every slab's product to bf16 before the sum would bias it; slabs are summed in fp32."""
    n, v = 64, 4096
    hidden, weight = torch.randn(n, 64).bfloat16().requires_grad_(), torch.randn(v, 64).bfloat16()
    target, up = torch.randint(v, (n,)), torch.randn(n)

    def gradient(budget: int) -> Tensor:
        result = linear_logprob(hidden, weight, target, scratch_bytes=budget)
        return torch.autograd.grad(result.logp, hidden, up)[0].double()

    twin = hidden.detach().double().requires_grad_()
    logits = twin @ weight.double().T
    exact = torch.autograd.grad(token_logprob_reference(logits, target).logp, twin, up.double())[0]
    one, many = ((gradient(budget) - exact) * exact.sign() for budget in (1 << 30, 700_000))
    assert float(many.norm()) <= 1.05 * float(one.norm())
    assert abs(float(many.mean())) < 4 * float(many.std()) / many.numel() ** 0.5
