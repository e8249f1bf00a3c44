"""Kernels launch on the GPU of their tensors, whichever is the current device."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels import linear_logprob
from fastrl_kernels._common import launch


class Recorder:
    """Replaces a compiled kernel."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.log.append((grid, arguments, options))


def test_the_first_tensors_device_is_current_during_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Any:
        log.append(("enter", tensor.shape))
        yield
        log.append("exit")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    first, second = torch.zeros(3), torch.zeros(5)
    launch(Recorder(log), 7)(None, 2, first, second, BLOCK=4)
    assert log[0] == ("enter", first.shape)
    grid, arguments, options = log[1]
    assert (grid, arguments[2] is first, options) == ((7,), True, {"BLOCK": 4})
    assert log[2] == "exit"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_kernel_runs_on_the_second_gpu_while_the_first_is_current() -> None:
    hidden, weight = torch.randn(5, 8), torch.randn(11, 8)
    expected = linear_logprob(hidden, weight, torch.arange(5)).logp
    found = linear_logprob(hidden.to("cuda:1"), weight.to("cuda:1"), torch.arange(5, device="cuda:1")).logp
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
