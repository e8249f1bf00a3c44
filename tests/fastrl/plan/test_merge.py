"""Whether rollouts merge: decided by recipe and memory, and counted as a real rollout allocates."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.models import load_policy
from fastrl.models.families import family_of
from fastrl.models.merged import merged_bytes
from fastrl.plan.advice import advise
from fastrl.plan.estimate import make_plan, rollout_bytes
from fastrl.plan.hardware import GIB, GPUS
from fastrl.plan.merge import decide_merge
from fastrl.plan.show import plan_text, plan_values
from fastrl.plan.trace import meta_model, trace_rollout
from fastrl.plan.workload import Workload
from fastrl.recipe import LoraRecipe, ModelRecipe, Recipe, RecipeError, load_recipe
from fastrl.rollout import Generator, Sampling
from tests.fastrl.conftest import build_config, build_folder, build_tokenizer
from tests.helpers.planned import counted_peak

FAMILY = family_of(build_config("qwen2_5", build_tokenizer()))
QWEN = "Qwen/Qwen2.5-VL-3B-Instruct"


def recipe_of(**changes: Any) -> Recipe:
    return load_recipe("perception-r1-counting-tiny", {"model.freeze": [], "model.lora": {"rank": 16}, **changes})


def test_memory_decides_and_the_recipe_may(tiny_folder: Callable[[str], Path]) -> None:
    core = load_policy(tiny_folder("qwen2_5"), device="cpu", lora={"rank": 2}).core
    size = merged_bytes(core)
    auto = recipe_of()
    assert decide_merge(auto, core, 2 * size, keeps=False).on
    assert not decide_merge(auto, core, 2 * size, keeps=True).on
    assert not decide_merge(auto, core, 1.9 * size, keeps=False).on
    assert not decide_merge(auto, core, -1.0, keeps=False).on
    assert decide_merge(recipe_of(**{"rollout.merge_lora": True}), core, 0.0, keeps=True).on
    assert not decide_merge(recipe_of(**{"rollout.merge_lora": "off"}), core, 1e12, keeps=False).on
    assert not decide_merge(recipe_of(**{"model.lora": None}), core, 1e12, keeps=False).on
    assert "engine.kind: fsdp2" in decide_merge(recipe_of(**{"engine.kind": "fsdp2"}), core, 1e12, keeps=False).reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.lora": None}, "without model.lora there are no adapters"),
        ({"model.quantize": "4bit"}, "sums would have to be quantized again"),
        ({"engine.kind": "fsdp2"}, "engine.kind: fsdp2 holds whole weights only"),
    ],
)
def test_what_cannot_be_merged_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=rf"rollout\.merge_lora: on .*{message}"):
        recipe_of(**{"rollout.merge_lora": "on", **changes})


@pytest.mark.parametrize("merge", [False, True])
def test_a_rollouts_bytes(tmp_path: Path, merge: bool) -> None:
    size = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 3000}
    folder = build_folder(tmp_path, "qwen2_5", num_attention_heads=8, **size)
    policy = load_policy(folder, device="cpu", lora={"rank": 4})
    policy.eos_token_ids = (10**6,)  # no answer ends early
    sampling = Sampling(n=8, max_new_tokens=30)
    sizes: dict[str, Any] = {
        "prompts": 4,
        "group": 8,
        "answer_tokens": 30,
        "text_tokens": 60,
        "images": 1,
        "token_budget": 4096,
    }
    work = Workload(**sizes, family=FAMILY, image=FAMILY.blank(224 * 224), sampling=sampling)
    prompts = [
        replace(p, images=tuple(replace(i, pixel_values=torch.rand(i.pixel_values.shape)) for i in p.images))
        for p in work.chunk()
    ]
    counted = counted_peak(lambda: Generator(policy, merge=merge).generate(prompts, sampling, torch.Generator()))
    model = ModelRecipe(path=str(folder), lora=LoraRecipe(rank=4))  # type: ignore[call-arg]
    core = meta_model(json.loads((folder / "config.json").read_text()), model, torch.float32)
    traced = trace_rollout(core, work.chunk(), limits=work.limits, sampling=sampling, gpu=False, merge=merge)
    assert (traced.merged > 0) == merge
    assert traced.merged + max(traced.merging, rollout_bytes(work, traced)) == pytest.approx(counted, rel=0.05)


@pytest.mark.gate
def test_a_plan_counts_the_copy_and_advises_against_it() -> None:
    gpu = GPUS["h200"]
    changes: dict[str, Any] = {"model.path": QWEN, "optim.token_budget": 1024, "model.gradient_checkpointing": True}
    changes["rollout.keep_prompts"] = "off"
    on, off = (make_plan(recipe_of(**changes, **{"rollout.merge_lora": m}), gpu) for m in ("auto", "off"))
    assert (on.merging.on, off.merging.on, off.memory.merged) == (True, False, 0)
    assert on.memory.merged == pytest.approx(5.5e9, rel=0.03)
    assert on.memory.rollout == pytest.approx(off.memory.rollout + on.memory.merged, rel=0.02)
    assert on.work.flops["decode"] < off.work.flops["decode"]
    assert "rollouts sample with merged adapters" in plan_text(on, [])
    assert plan_values(on, [])["merge_lora"]["on"] is True
    assert on.memory.peak == on.memory.rollout
    small = replace(gpu, memory=(on.memory.rollout + GIB // 2) / 0.96)  # of which 1 GiB and 4 % are not planned with
    forced = make_plan(recipe_of(**changes, **{"rollout.merge_lora": "on"}), small)
    assert not forced.fits
    assert [change.keys for change in advise(forced)] == [{"rollout.merge_lora": "off"}]
