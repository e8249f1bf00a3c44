"""Engines: the schedule, parameter groups, float32 copies of low-precision weights, saving, and DeepSpeed's calls."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastrl.engine import make_engine
from fastrl.engine.base import NonFiniteError, lr_scale, parameter_groups
from fastrl.engine.local import LocalEngine
from fastrl.recipe import EngineRecipe, OptimRecipe


def optim(**values: Any) -> OptimRecipe:
    return OptimRecipe(**({"steps": 10, "lr": 0.1, "clip_norm": None} | values))


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    return nn.ModuleDict({"visual": nn.Linear(3, 4), "merger": nn.Linear(4, 4), "head": nn.Linear(4, 2)}).to(dtype)


def loss_of(model: nn.Module, scale: float = 1.0) -> torch.Tensor:
    x = torch.linspace(-1, 1, 6).reshape(2, 3).to(next(model.parameters()).dtype)
    return (
        sum((p.float() ** 2).sum() for p in model.parameters()) * 0.01
        + scale
        * model["head"](  # type: ignore[operator,index,return-value]
            model["merger"](model["visual"](x))  # type: ignore[operator,index]
        )
        .float()
        .pow(2)
        .sum()
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.0] * 4),
        ({"warmup": 2}, [0.5, 1.0, 1.0, 1.0]),
        ({"warmup": 0.5}, [0.5, 1.0, 1.0, 1.0]),
        ({"schedule": "cosine"}, [1.0, 0.853553, 0.5, 0.146447]),
        ({"schedule": "cosine", "min_lr_ratio": 0.5, "warmup": 2}, [0.5, 1.0, 1.0, 0.75]),
    ],
)
def test_schedule(options: dict[str, Any], expected: list[float]) -> None:
    recipe = optim(steps=2, updates_per_batch=2, **options)
    assert [lr_scale(u, recipe) for u in range(4)] == pytest.approx(expected, abs=1e-6)


def test_one_update_is_adamw_with_the_schedules_rate() -> None:
    ours, theirs = small(), small()
    engine = LocalEngine(ours, optim(warmup=2, weight_decay=0.1, clip_norm=0.5))
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    plain = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=0.1
    )
    for scale in (0.5, 1.0, 1.0):
        engine.backward(loss_of(ours))
        info = engine.step()
        loss_of(theirs).backward()
        norm = nn.utils.clip_grad_norm_(list(theirs.parameters()), 0.5)
        for group in plain.param_groups:
            group["lr"] = 0.1 * scale
        plain.step()
        plain.zero_grad()
        assert info.grad_norm == pytest.approx(float(norm))
        assert info.lr == pytest.approx(0.1 * scale)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        assert a.grad is None


def test_parameter_groups_follow_the_first_pattern_that_matches() -> None:
    recipe = optim(
        weight_decay=0.3, groups=[{"match": "merger", "lr": 2.0}, {"match": "*.weight", "lr": 1.0, "weight_decay": 0.0}]
    )
    found = {name: (g["lr"], g["weight_decay"]) for g in parameter_groups(small(), recipe) for name in g["names"]}
    assert found["merger.weight"] == (2.0, 0.3)
    assert found["merger.bias"] == (2.0, 0.0)
    assert found["visual.weight"] == (1.0, 0.0)
    assert found["visual.bias"] == (0.1, 0.0)


def test_pattern_that_matches_nothing_and_a_frozen_model_are_errors() -> None:
    with pytest.raises(ValueError, match=r"optim\.groups\.0\.match: 'projector' .* merger"):
        parameter_groups(small(), optim(groups=[{"match": "projector", "lr": 1.0}]))
    with pytest.raises(ValueError, match="every parameter is frozen"):
        parameter_groups(small().requires_grad_(False), optim())


def test_small_updates_survive_bfloat16() -> None:
    model = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    nn.init.constant_(model.weight, 0.5)
    engine = LocalEngine(model, optim(lr=1e-5))
    for update in range(200):  # Adam moves each weight by 1e-5 an update; neighbours of 0.5 are 2e-3 away
        engine.backward(model.weight.sum())
        engine.step()
        if update == 2:
            assert bool((model.weight == 0.5).all())
    assert bool((model.weight < 0.5).all())


def test_micro_batch_gradients_of_bfloat16_add_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    engine = LocalEngine(model, optim(lr=0.0))
    engine.backward(model.weight.sum() * 256)
    engine.backward(model.weight.sum() * 1.0)  # 257 cannot be represented in bfloat16
    assert engine.step().grad_norm == 257.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_leaves_the_weights(bad: float) -> None:
    model = small()
    before = [p.detach().clone() for p in model.parameters()]
    engine = LocalEngine(model, optim())
    engine.backward(loss_of(model) * bad)
    with pytest.raises(NonFiniteError, match="gradient norm"):
        engine.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_engine_goes_on_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small(dtype)
    engine = LocalEngine(model, optim(schedule="cosine"))
    for _ in range(2):
        engine.backward(loss_of(model))
        engine.step()
    engine.save(tmp_path)
    other = small(dtype)
    resumed = LocalEngine(other, optim(schedule="cosine"))
    resumed.load(tmp_path)
    for m, e in ((model, engine), (other, resumed)):
        e.backward(loss_of(m))
        e.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_loading_into_another_model_names_the_difference(tmp_path: Path) -> None:
    LocalEngine(small(), optim()).save(tmp_path)
    model = small()
    model["head"].requires_grad_(False)  # type: ignore[index]
    engine = LocalEngine(model, optim())
    with pytest.raises(ValueError, match=r"2 differ, the first: head\.bias"):
        engine.load(tmp_path)


def test_deepspeed_missing_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastrl.engine.deepspeed as module

    monkeypatch.setattr(module, "deepspeed_available", lambda: False)
    with pytest.raises(ValueError, match=r"fastrl\[distributed\]"):
        make_engine(small(), optim(), EngineRecipe(kind="deepspeed"), Path())


def test_deepspeed_without_a_launcher_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastrl.engine.deepspeed as module

    monkeypatch.setattr(module, "deepspeed_available", lambda: True)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun"):
        make_engine(small(), optim(), EngineRecipe(kind="deepspeed"), Path())


class FakeEngine:
    """Records the calls, and does with plain AdamW what DeepSpeed does on one rank."""

    def __init__(self, groups: list[dict[str, Any]], config: dict[str, Any]) -> None:
        self.config = config
        self.calls: list[Any] = []
        self.optimizer = torch.optim.AdamW(groups, lr=config["optimizer"]["params"]["lr"])

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.calls.append(is_boundary)

    def backward(self, loss: torch.Tensor) -> None:
        self.calls.append("backward")
        loss.backward()

    def step(self) -> None:
        self.calls.append("step")
        self.optimizer.step()
        self.optimizer.zero_grad()

    def was_step_applied(self) -> bool:
        return True

    def get_global_grad_norm(self) -> float:
        return 1.5


@pytest.fixture
def fake_deepspeed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeEngine]]:
    made: list[FakeEngine] = []

    def initialize(*, model: nn.Module, model_parameters: list[dict[str, Any]], config: dict[str, Any]) -> Any:
        made.append(FakeEngine(model_parameters, config))
        return made[-1], made[-1].optimizer, None, None

    module = types.ModuleType("deepspeed")
    module.__spec__ = importlib.machinery.ModuleSpec("deepspeed", None)
    module.initialize = initialize  # type: ignore[attr-defined]
    module.init_distributed = lambda timeout: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield made
    torch.distributed.destroy_process_group()


def test_deepspeed_reduces_in_the_last_backward_only(fake_deepspeed: list[FakeEngine]) -> None:
    ours, theirs = small(), small()
    engine = make_engine(ours, optim(warmup=2), EngineRecipe(kind="deepspeed", zero_stage=1), Path())
    local = LocalEngine(theirs, optim(warmup=2))
    for e, model in ((engine, ours), (local, theirs)):
        e.backward(loss_of(model), last=False)
        e.backward(loss_of(model, 2.0), last=True)
        info = e.step()
        assert info.lr == pytest.approx(0.05)
    assert fake_deepspeed[0].calls == [False, "backward", True, "backward", "step"]
    assert fake_deepspeed[0].config["zero_optimization"] == {"stage": 1}
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert (engine.rank, engine.world_size, engine.average(2.5), engine.maximum(3.0)) == (0, 1, 2.5, 3.0)
    assert engine.gather({"a": 1}) == local.gather({"a": 1}) == [{"a": 1}]
