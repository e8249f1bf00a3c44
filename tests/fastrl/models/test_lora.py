"""Kinds of adapters: LoRA, rsLoRA and DoRA train, sample, merge, resume, and are saved for peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.batch import PackedBatch, PromptGroup, pack_row
from fastrl.models import Policy, load_policy
from fastrl.models.dora import CachedDora
from fastrl.models.lora import merged_state_dict
from fastrl.recipe import LoraRecipe
from fastrl.rollout import Generator, Sampling
from fastrl.trainer import train
from tests.helpers.planned import measured_and_planned
from tests.helpers.rollouts import encode, make_records, rng
from tests.helpers.training import make_recipe, steady_rows
from tests.helpers.training import make_records as training_records

Folder = Callable[[str], Path]
KINDS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}, "both": {"dora": True, "rslora": True}}


def adapted(folder: Path, dtype: torch.dtype | None = None, **kind: Any) -> Policy:
    """A policy with adapters far from their initial values, at which they change nothing."""
    policy = load_policy(folder, device="cpu", dtype=dtype, lora={"rank": 4, "dropout": 0.1, **kind})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.core.named_parameters():
            if "lora_B" in name or "lora_magnitude" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


def batch_of(policy: Policy) -> PackedBatch:
    """Prompts with sampled answers, as one row."""
    prompts = encode(policy, make_records()[:2])
    answers = Generator(policy).generate(prompts, Sampling(3, 8), rng())
    return pack_row([PromptGroup(p, a) for p, a in zip(prompts, answers, strict=True)])


def logp_of(policy: Policy, batch: PackedBatch) -> Tensor:
    return policy.logprob(batch).logp.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_sampler_and_trainer_agree(tiny_folder: Folder, kind: str) -> None:
    """The fast decode step runs the adapted layers; DoRA's cached scale is that of the training pass."""
    policy = adapted(tiny_folder("qwen2_5"), **KINDS[kind], dropout=0.0)
    batch = batch_of(policy)
    assert policy.core.training is False
    gap = (policy.logprob(batch).logp.detach() - batch.per_token["sampler_logp"]).abs().max()
    assert gap < 1e-5


def test_the_kept_scale_of_dora_follows_the_weights(tiny_folder: Folder) -> None:
    policy = adapted(tiny_folder("qwen2_5"), dora=True)
    variants = [v for m in policy.core.modules() for v in getattr(m, "lora_variant", {}).values()]
    assert variants
    assert all(type(variant) is CachedDora for variant in variants)
    batch = batch_of(policy)
    with torch.no_grad():
        first = logp_of(policy, batch)
        held = [variant._cached for variant in variants]
        assert all(torch.equal(first, logp_of(policy, batch)) for _ in range(2))
        assert [variant._cached for variant in variants] == held  # computed once
        for name, parameter in policy.core.named_parameters():
            if "lora_A" in name:
                parameter.mul_(1.5)  # as an optimizer would change them
        second = logp_of(policy, batch)
        assert (first - second).abs().max() > 1e-3
    places = [variant._cached[1].data_ptr() for variant in variants]
    policy.logprob(batch).logp.sum().backward()  # a training pass clears it
    assert [variant._cached for variant in variants] == [None] * len(variants)
    with torch.no_grad():
        assert torch.equal(second, logp_of(policy, batch))
    assert [variant._cached[1].data_ptr() for variant in variants] == places  # which a captured graph reads


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_pefts_and_compute_the_same(tiny_folder: Folder, tmp_path: Path, kind: str) -> None:
    policy = adapted(tiny_folder("qwen2_5"), **KINDS[kind], also_train=["projector"])
    batch = batch_of(policy)
    with torch.no_grad():
        adapters = logp_of(policy, batch)
    policy.save(tmp_path / "merged")
    merged = load_policy(tmp_path / "merged", device="cpu")
    with torch.no_grad():
        assert (logp_of(merged, batch) - adapters).abs().max() < 1e-5
    state = merged_state_dict(policy.core)
    theirs = policy.peft.merge_and_unload().state_dict()
    assert set(state) == set(theirs)
    for name, value in state.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


def test_merging_in_bfloat16_rounds_once(tiny_folder: Folder) -> None:
    policy = adapted(tiny_folder("qwen2_5"), torch.bfloat16, dora=True)
    state = merged_state_dict(policy.core)
    for name, module in policy.core.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        a, b = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
        summed = module.get_base_layer().weight.double() + module.scaling["default"] * (b @ a)
        scale = module.lora_magnitude_vector["default"].weight.double() / summed.norm(dim=1)
        exact = scale[:, None] * summed
        assert state[f"{name}.weight"].dtype == torch.bfloat16
        torch.testing.assert_close(state[f"{name}.weight"].double(), exact, rtol=2**-8, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_is_saved(tiny_folder: Folder, tmp_path: Path, kind: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    folder = tiny_folder("qwen2_5")
    policy = adapted(folder, **KINDS[kind], also_train=["projector"])
    policy.save_adapter(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == folder.resolve()
    assert (config["use_dora"], config["use_rslora"]) == ("dora" in KINDS[kind], "rslora" in KINDS[kind])
    base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    for name, value in merged_state_dict(policy.core).items():
        torch.testing.assert_close(value, loaded[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_a_run_saves_both_and_resumes_bit_for_bit(tiny_folder: Folder, tmp_path: Path, kind: str) -> None:
    spec = {"rank": 2, "dropout": 0.1, **KINDS[kind]}
    folder, records = tiny_folder("qwen2_5"), training_records()
    changes: dict[str, Any] = {"model__lora": spec, "method__beta": 0.05, "optim__lr": 1e-2, "optim__steps": 2}
    for out in ("whole", "parts"):
        if out == "parts":
            train(make_recipe(folder, tmp_path / out, **{**changes, "optim__steps": 1}), records=records, show=False)
        summary = train(make_recipe(folder, tmp_path / out, **changes), records=records, show=False, resume=True)
    assert steady_rows(tmp_path / "whole") == steady_rows(tmp_path / "parts")
    assert summary.adapter is not None
    assert summary.adapter == summary.checkpoint / "adapter"  # type: ignore[operator]
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        both = [(tmp_path / out / name).read_bytes() for out in ("whole", "parts")]
        assert both[0] == both[1]


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_the_plan_counts_them(tiny_folder: Folder, kind: str) -> None:
    folder = tiny_folder("qwen2_5")
    batch = batch_of(load_policy(folder, device="cpu"))
    spec = LoraRecipe(rank=8, **KINDS[kind])  # type: ignore[call-arg]
    counted, planned = measured_and_planned(folder, batch, dtype=torch.float32, checkpointing=True, lora=spec)
    assert planned == pytest.approx(counted, rel=0.02)


def test_dora_is_for_linear_layers(tiny_folder: Folder) -> None:
    with pytest.raises(ValueError, match=r"lora\.dora: only for linear layers.*matches .*embed_tokens"):
        load_policy(tiny_folder("qwen2_5"), device="cpu", lora={"dora": True, "targets": ".*(embed_tokens|q_proj)"})
