"""The plan of sharded weights against a real update of two gloo processes, and what ranks exchange."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fastrl.config.sections import EngineRecipe, OptimRecipe
from fastrl.engine.deepspeed import deepspeed_available
from fastrl.models.families import family_of
from fastrl.plan.estimate import Model, count_model
from fastrl.plan.sharded import ENGINES, Unit, engine_settings, network_of, partitions_of, shards_of, units_of
from fastrl.plan.trace import Trace, meta_model, trace_batch
from fastrl.plan.workload import packed
from fastrl.recipe import LoraRecipe, ModelRecipe, load_recipe
from tests.fastrl.conftest import build_folder
from tests.helpers.gloo import REPO, start

OPTIM = OptimRecipe(steps=1)  # type: ignore[call-arg]
FSDP2 = EngineRecipe(kind="fsdp2")  # type: ignore[call-arg]
LATE = EngineRecipe(kind="fsdp2", reduce_gradients="last")  # type: ignore[call-arg]


def test_units_are_the_layers_and_the_rest_each_weight_once() -> None:
    core = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    core[2].weight = core[0].bias = nn.Parameter(torch.zeros(2))  # shared between a layer and the rest
    core[1].requires_grad_(False)
    assert units_of(core, [core[0], core[1]]) == (Unit(0, 0, 0), Unit(32, 32, 8, 24), Unit(16, 0, 0, 16))
    shards = shards_of(units_of(core, [core[0], core[1]]), OPTIM, 4)
    assert (shards.weights, shards.moments, shards.gradients) == (12.0, 16.0, 8.0)


def test_what_ranks_exchange() -> None:
    units = (Unit(100, 100, 50), Unit(40, 40, 20), Unit(60, 60, 30))
    count = {"passes": 3, "updates": 1, "rollouts": 2}
    assert network_of(units, FSDP2, 4, **count) == (0.75 * (3 * 300 + 2 * 200), 0.75 * 3 * 400)
    assert network_of(units, FSDP2, 1, **count) == (0, 0)
    assert network_of(units, LATE, 4, **count) == (0.75 * (3 * 300 + 2 * 200), 0.75 * 400)
    deepspeed = [EngineRecipe(kind="deepspeed", zero_stage=stage) for stage in (0, 1, 2, 3)]  # type: ignore[call-arg,arg-type]
    assert [network_of(units, engine, 2, **count) for engine in deepspeed] == [
        (0, 200), (100, 200), (100, 300), (0.5 * (3 * 300 + 2 * 200), 300),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_by_name_is_a_valid_recipe(name: str) -> None:
    recipe = load_recipe("perception-r1-grounding-3b", engine_settings(name))
    assert recipe.engine.kind == ("deepspeed" if name.startswith("zero") else name)
    if name.startswith("zero"):
        assert recipe.engine.zero_stage == int(name[-1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zero4", "one of fsdp2, zero0, zero1, zero2, zero3, local, got 'zero4'"),
        ("fsdp", "one of fsdp2, zero0, zero1, zero2, zero3, local, got 'fsdp'"),
    ],
)
def test_an_engine_that_there_is_not(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine_settings(name)


def test_the_local_engine_is_one_process() -> None:
    assert engine_settings("local") == ["engine.kind=local"]
    with pytest.raises(ValueError, match="one process on one GPU, got 8 GPUs; take fsdp2 or zero0 to zero3"):
        engine_settings("local", 8)


def counted_and_traced(
    tmp_path: Path, helper: str, *, lora: bool, checkpointing: bool
) -> tuple[list[dict[str, int]], Trace, Model]:
    """What ``helper`` counts on each of two ranks, beside the trace of its micro-batch and the sizes of its model."""
    size = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 3000}
    (tmp_path / "model").mkdir()
    model = build_folder(tmp_path / "model", "qwen2_5", num_attention_heads=8, **size)
    code = (REPO / "tests" / "helpers" / helper).read_text()
    for process in start(code, tmp_path, model, tmp_path, int(lora), int(checkpointing)):
        _, message = process.communicate(timeout=900)
        assert process.returncode == 0, message[-3000:]
    adapters = LoraRecipe(rank=8) if lora else None  # type: ignore[call-arg]
    recipe = ModelRecipe(path=str(model), lora=adapters, gradient_checkpointing=checkpointing)  # type: ignore[call-arg]
    core = meta_model(json.loads((model / "config.json").read_text()), recipe, torch.float32)
    traced = trace_batch(core, packed(family_of(core.config), 60, [], [(16,) * 6]), gpu=False, accumulates=False)
    counted = [json.loads((tmp_path / f"counted-{rank}.json").read_text()) for rank in range(2)]
    return counted, traced, count_model(core)


@pytest.mark.gate
@pytest.mark.parametrize("lora", [False, True])
def test_memory_and_exchange_of_two_processes_are_planned(tmp_path: Path, lora: bool) -> None:
    """With LoRA, also with checkpointing. Memory within 10 %, exchanged bytes exactly."""
    ranks, traced, sizes = counted_and_traced(tmp_path, "sharded_memory.py", lora=lora, checkpointing=lora)
    shards = shards_of(sizes.units, OPTIM, 2)
    kept = shards.weights + shards.moments
    step = (traced.kept, traced.peak - 4 * sizes.trainable, traced.head_scratch)
    peak = shards.update(*step, accumulates=False)
    late = shards.update(*step, accumulates=True, reduces_last=True)
    update = network_of(sizes.units, FSDP2, 2, passes=1, updates=1, rollouts=0)
    rollout = network_of(sizes.units, FSDP2, 2, passes=0, updates=1, rollouts=1)
    for counted in ranks:
        assert counted["weight_shards"] == shards.weights
        assert kept + peak == pytest.approx(kept + counted["update"], rel=0.1)
        assert kept + shards.whole == pytest.approx(kept + counted["gathered"], rel=0.1)
        assert (counted["weights"], counted["gradients"]) == update
        assert (counted["rollout_weights"], 0) == rollout
        assert kept + late == pytest.approx(kept + counted["late"], rel=0.1)
        assert counted["late_gradients"] == update.gradients  # of two micro-batches


@pytest.mark.skipif(not deepspeed_available(), reason="DeepSpeed is not installed")
@pytest.mark.gate
@pytest.mark.parametrize(("lora", "checkpointing"), [(False, False), (False, True), (True, True)])
def test_memory_and_exchange_of_zero_3_are_planned(tmp_path: Path, lora: bool, checkpointing: bool) -> None:
    """As above, with DeepSpeed."""
    ranks, traced, sizes = counted_and_traced(tmp_path, "zero3_memory.py", lora=lora, checkpointing=checkpointing)
    shards = partitions_of(sizes.units, OPTIM, 2)
    peak = shards.update(traced.kept, traced.peak - 4 * sizes.trainable, traced.head_scratch, recomputes=checkpointing)
    zero = EngineRecipe(kind="deepspeed", zero_stage=3)  # type: ignore[call-arg]
    update = network_of(sizes.units, zero, 2, passes=1, updates=1, rollouts=0)
    rollout = network_of(sizes.units, zero, 2, passes=0, updates=1, rollouts=1)
    for counted in ranks:
        assert counted["weight_shards"] == shards.weights
        assert peak - shards.gradients == pytest.approx(counted["update"], rel=0.1)
        assert shards.whole == pytest.approx(counted["gathered"], rel=0.01)
        assert (counted["weights"], counted["gradients"]) == update
        assert (counted["rollout_weights"], 0) == rollout
