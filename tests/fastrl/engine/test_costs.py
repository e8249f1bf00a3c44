"""The predicted memory and traffic of an update, against the engine's tensors and the optimizers' allocations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastrl.config.sections import EngineRecipe, OptimRecipe
from fastrl.engine import costs, optimizers
from fastrl.engine.costs import Held, Moved, gradients_leave, held, moment_bytes, moved
from fastrl.engine.local import LocalEngine
from fastrl.engine.optimizers import AdamW8bit, step_scratch
from tests.helpers.planned import counted_peak

NUMBERS = 1 << 16


def optim(**keys: Any) -> OptimRecipe:
    return OptimRecipe.model_validate({"steps": 1, **keys})


LOCAL = EngineRecipe()  # type: ignore[call-arg]


def sharded(stage: int, *, host: bool = False) -> EngineRecipe:
    return EngineRecipe.model_validate({"kind": "deepspeed", "zero_stage": stage, "offload_optimizer": host})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", ["fp32", "8bit", "offload"])
def test_what_is_held_is_what_the_engine_keeps(states: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Copies and moments on any device, and the bytes of their checkpoint."""
    model = nn.Linear(256, NUMBERS // 256, bias=False).to(dtype)
    chosen = optim(states=states)
    engine = LocalEngine(model, chosen)
    engine.backward(model(torch.ones(1, 256, dtype=dtype)).float().sum())
    engine.step()
    (master,) = engine._masters.values()
    copy = 0 if master is model.weight else master.numel() * master.element_size()
    state = engine._optimizers[0].state[master].values()
    kept = sum(tensor.numel() * tensor.element_size() for tensor in state if tensor.ndim)
    each = held(chosen, LOCAL)
    if states == "offload":
        assert each == Held(0, 0, 0, host=16)
        assert (copy + kept) / NUMBERS == each.host - costs.FLOAT  # and a gradient until it is used
    else:
        assert (copy, kept) == (each.copy * NUMBERS * (dtype != torch.float32), each.moments * NUMBERS)
    engine.save(tmp_path)
    written = (tmp_path / "optimizer.safetensors").stat().st_size
    assert engine.saved_bytes() == pytest.approx(written, rel=0.01)


def test_ranks_share_states_and_gradients_by_the_stage() -> None:
    for stage, states, gradient in ((0, 1, 1), (1, 4, 1), (2, 4, 4)):
        each = held(optim(), sharded(stage), ranks=4)
        assert each == Held(4 / states, 8 / states, 4 / gradient, host=0)
    assert held(optim(), sharded(2)) == held(optim(), LOCAL) == Held(4, 8, 4, 0)  # one rank
    assert held(optim(), sharded(2, host=True), ranks=4) == Held(0, 0, 1, host=4)


def test_gradients_leave_one_by_one_where_they_are_moved_or_used_at_once() -> None:
    released = optim(gradient_release=True, clip_norm=None)
    assert [gradients_leave(released, micro_batches=n) for n in (1, 2)] == [True, False]
    assert gradients_leave(optim(states="offload"), micro_batches=9)
    assert not gradients_leave(optim(), micro_batches=1)
    assert held(released, LOCAL).gradient == 0


def test_the_host_moves_what_the_device_would_and_the_link_carries_the_rest() -> None:
    here, away = moved(optim(), LOCAL, itemsize=2), moved(optim(states="offload"), LOCAL, itemsize=2, micro_batches=3)
    assert here == Moved(12 + 4 + 16 + 8 + 2)
    assert away == Moved(0, link=2 * (3 + 1), host=here.device - 2)
    assert moved(optim(), sharded(2, host=True), itemsize=2, micro_batches=3) == away
    assert moved(optim(states="8bit"), LOCAL, itemsize=2).device == here.device - 2 * (8 - moment_bytes("8bit"))


@pytest.mark.parametrize("numbers", [NUMBERS, 3 * NUMBERS])
def test_scratch_of_a_step_is_what_it_allocates(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "CHUNK", 2 * NUMBERS)
    for kind, states in ((AdamW8bit, "8bit"), (torch.optim.AdamW, "fp32")):
        parameter = nn.Parameter(torch.zeros(numbers))
        parameter.grad = torch.randn(numbers)
        optimizer = kind([parameter])
        optimizer.step()  # creates the moments
        assert step_scratch(numbers, states, fused=False) == pytest.approx(counted_peak(optimizer.step), rel=0.01)
    assert step_scratch(numbers, "fp32", fused=True) == 0


def test_moments_are_as_large_as_the_optimizers_own_state(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (moment_bytes("fp32"), moment_bytes("offload"), moment_bytes("8bit")) == (8, 8, 2 + 8 / 256)
    monkeypatch.setattr(optimizers, "BLOCK", 64)
    assert moment_bytes("8bit") == 2 + 8 / 64
