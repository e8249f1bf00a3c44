"""The plan's peak against the GPU allocator's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.engine.local import LocalEngine
from fastrl.models import load_policy
from fastrl.plan.estimate import count_model
from fastrl.plan.trace import meta_model, trace_batch
from fastrl.plan.workload import packed
from fastrl.recipe import LoraRecipe, ModelRecipe, OptimRecipe
from tests.fastrl.conftest import build_folder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
WITHIN = 0.10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.2 B parameters, so that library workspaces are small in comparison."""
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    sizes |= {"vocab_size": 32000, "num_attention_heads": 16, "num_key_value_heads": 4}
    sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    return build_folder(tmp_path_factory.mktemp("gpu"), "qwen2_5", **sizes)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_training_step(folder: Path, checkpointing: bool, lora: bool) -> None:
    spec = LoraRecipe(rank=16) if lora else None  # type: ignore[call-arg]
    options = {"lora": spec.spec() if spec else None, "gradient_checkpointing": checkpointing}
    policy = load_policy(folder, device="cuda", dtype=torch.bfloat16, **options)  # type: ignore[arg-type]
    engine = LocalEngine(policy.model, OptimRecipe(steps=9, lr=1e-4))  # type: ignore[call-arg]
    empty = packed(policy.family, 64, [policy.family.blank(560 * 560)], [(256,) * 8] * 2)
    pixels = [replace(image, pixel_values=torch.rand(1600, 1176)) for image in empty.images]
    batch = replace(empty, images=tuple(pixels)).to("cuda")

    def step() -> None:
        engine.backward(policy.logprob(batch).logp.mean())
        engine.step()

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated() - before
    recipe = ModelRecipe(path=str(folder), lora=spec, gradient_checkpointing=checkpointing)  # type: ignore[call-arg]
    core = meta_model(json.loads((folder / "config.json").read_text()), recipe, torch.bfloat16)
    traced = trace_batch(core, empty, gpu=True)
    model = count_model(core)
    planned = max(traced.peak, 4 * model.trainable)
    print(f"planned {planned / 2**20:.1f} MiB, measured {measured / 2**20:.1f} MiB")
    assert planned + before == pytest.approx(measured + before, rel=WITHIN)
