"""The real allocations of a step on this CPU, beside those of the plan."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastrl.batch import PackedBatch
from fastrl.engine.local import LocalEngine
from fastrl.engine.optimizers import step_scratch
from fastrl.models import load_policy
from fastrl.models.checkpointing import Kind
from fastrl.plan.estimate import count_model
from fastrl.plan.trace import meta_model, trace_batch
from fastrl.recipe import LoraRecipe, ModelRecipe, OptimRecipe
from fastrl_kernels.linear_policy_loss import linear_policy_loss


def counted_peak(run: Callable[[], object]) -> int:
    """Largest sum of live allocations during ``run``, above what was live before."""
    gc.collect()  # otherwise an earlier test's model may be freed during the run
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    del kept
    return peak


def measured_and_planned(
    folder: Path,
    batch: PackedBatch,
    *,
    dtype: torch.dtype,
    checkpointing: Kind,
    lora: LoraRecipe | None,
    passes: int = 1,
    row_local: bool = False,
) -> tuple[int, int]:
    """Peak bytes of a training step above those between steps: counted and planned."""
    spec = lora.spec() if lora is not None else None
    policy = load_policy(folder, device="cpu", dtype=dtype, lora=spec, gradient_checkpointing=checkpointing)
    engine = LocalEngine(policy.model, OptimRecipe(steps=9, lr=1e-4))  # type: ignore[call-arg]

    def loss() -> torch.Tensor:
        if not row_local:
            return policy.logprob(batch).logp.mean()
        head, count = policy.head_weight, len(batch.targets)
        advantage, weight = torch.ones(len(batch.completions)), torch.full((count,), 1 / count)
        return linear_policy_loss(
            policy.hidden(batch), head, batch.targets, advantage, batch.completion_of_token,
            weight=weight, head_grad=engine.gradient_of(head),
        ).loss  # fmt: skip

    def step() -> None:
        for _ in range(passes):
            engine.backward(loss())
        engine.step()

    step()  # creates the moments
    counted = counted_peak(step)
    recipe = ModelRecipe(path=str(folder), lora=lora, gradient_checkpointing=checkpointing)  # type: ignore[call-arg]
    core = meta_model(json.loads((folder / "config.json").read_text()), recipe, dtype)
    assert sum(p.numel() for p in core.parameters()) == sum(p.numel() for p in policy.core.parameters())
    traced = trace_batch(core, batch, gpu=False, accumulates=passes > 1, row_local=row_local)
    model = count_model(core)
    return counted, max(traced.peak, 4 * model.trainable + step_scratch(model.largest, "fp32", fused=False))
