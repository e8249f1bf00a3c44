"""Peak memory of the head ops, measured as the CPU allocator reports every allocation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastrl_kernels.linear_logprob import linear_logprob
from fastrl_kernels.linear_policy_loss import linear_policy_loss

MIB = 1 << 20


def peak_bytes(run: Callable[[], object]) -> int:
    """Largest sum of live allocations during ``run``, above what was live before. The result of ``run`` counts as
    live."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the profiler reported no allocation"
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del kept
    return peak


def test_the_meter_counts_what_is_alive() -> None:
    def run() -> torch.Tensor:
        first = torch.ones(3 * MIB, dtype=torch.uint8)
        del first
        second = torch.ones(2 * MIB, dtype=torch.uint8)
        third = torch.ones(2 * MIB, dtype=torch.uint8)
        return second + third

    assert 6 * MIB <= peak_bytes(run) < 6.1 * MIB


@pytest.mark.gate
def test_forward_and_backward_stay_in_the_budget() -> None:
    """N = 4096, H = 512, V = 65536, 64 MiB: under gradients + 1.25 x the budget. The logits would be 1 GiB."""
    n, h, v, budget = 4096, 512, 65536, 64 * MIB
    hidden = torch.randn(n, h, requires_grad=True)
    weight = (torch.randn(v, h) * h**-0.5).requires_grad_()
    target = torch.randint(v, (n,))

    def run() -> tuple[torch.Tensor, ...]:
        result = linear_logprob(hidden, weight, target, return_entropy=True, scratch_bytes=budget)
        assert result.entropy is not None
        return torch.autograd.grad(result.logp.mean() + 0.01 * result.entropy.mean(), [hidden, weight])

    gradients = (n * h + v * h) * 4
    assert peak_bytes(run) <= gradients + 1.25 * budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "v"), [(256, 32768), (2048, 4096), (512, 16384)])
def test_scratch_depends_on_neither_rows_nor_vocabulary(n: int, v: int, dtype: torch.dtype) -> None:
    h, budget = 32, 6 * MIB
    hidden = torch.randn(n, h).to(dtype).requires_grad_()
    weight = torch.randn(v, h).to(dtype).requires_grad_()
    bias = torch.randn(v, requires_grad=True)
    target = torch.randint(v, (n,))
    target[::9] = -100

    def run() -> tuple[torch.Tensor, ...]:
        result = linear_logprob(
            hidden, weight, target, bias=bias, softcap=8.0, return_entropy=True, scratch_bytes=budget
        )  # fmt: skip
        assert result.entropy is not None
        return torch.autograd.grad(result.logp.mean() + result.entropy.mean(), [hidden, weight, bias])

    size = torch.finfo(dtype).bits // 8
    gradients = n * h * (4 + size) + v * h * size + v * 4  # d hidden is summed in fp32
    assert n * v * 4 > 4 * budget
    assert peak_bytes(run) <= gradients + 1.25 * budget


def test_without_gradients_only_the_scratch() -> None:
    n, h, v, budget = 512, 32, 16384, 4 * MIB
    hidden, weight, target = torch.randn(n, h), torch.randn(v, h), torch.randint(v, (n,))
    peak = peak_bytes(lambda: linear_logprob(hidden, weight, target, return_entropy=True, scratch_bytes=budget))
    assert peak <= 1.25 * budget


@pytest.mark.parametrize("into", [False, True])
def test_row_local_loss_needs_the_gradients_and_the_scratch(into: bool) -> None:
    n, h, v, budget = 512, 64, 8192, 6 * MIB
    hidden, weight = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
    target, completion = torch.randint(v, (n,)), torch.arange(n) // 64
    buffer = torch.zeros(v, h) if into else None

    def run() -> tuple[torch.Tensor | None, ...]:
        result = linear_policy_loss(
            hidden, weight, target, torch.randn(8), completion, head_grad=buffer, scratch_bytes=budget
        )  # fmt: skip
        return torch.autograd.grad(result.loss, [hidden, weight], allow_unused=True)

    held = n * h * 4 + (0 if into else v * h * 4)
    assert peak_bytes(run) <= 2 * held + 1.25 * budget  # held from forward to backward, and scaled there
