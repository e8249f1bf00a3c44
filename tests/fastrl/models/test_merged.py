"""Merged copies for sampling: what they compute, that nothing is left of them, and how they are rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrl.models import Policy, load_policy
from fastrl.models.lora import merged_state_dict
from fastrl.models.merged import Merged, mergeable, merged_bytes, rounded
from fastrl.plan.trace import meta_model
from fastrl.recipe import LoraRecipe, ModelRecipe
from tests.fastrl.conftest import build_config, build_tokenizer
from tests.helpers.families import BUILDS, build_family
from tests.helpers.groups import picture_batch

Folder = Callable[[str], Path]
KINDS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}


def adapted(folder: Path, scale: float = 0.1, **options: Any) -> Policy:
    """A policy with adapters that change its output."""
    torch.manual_seed(0)
    policy = load_policy(folder, device="cpu", **options)
    with torch.no_grad():
        for name, parameter in policy.core.named_parameters():
            if "lora_B" in name or "lora_magnitude" in name:
                parameter.add_(scale * torch.randn(parameter.shape))
    return policy


@torch.no_grad()
def logp(policy: Policy) -> Tensor:
    return policy.logprob(picture_batch(policy)).logp


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_merged_layers_compute_what_adapters_do_and_are_gone_after(
    tiny_folder: Folder, kind: str, dtype: torch.dtype, within: float
) -> None:
    lora = {"rank": 4, "also_train": ["projector"], "targets": ["language", "vision"], **KINDS[kind]}
    policy = adapted(tiny_folder("qwen2_5"), dtype=dtype, lora=lora)
    before = dict(policy.core.named_modules())
    separate, merged = logp(policy), Merged(policy.core)
    with merged.active():
        assert not any("lora" in name for name, _ in policy.core.named_modules())
        together = logp(policy)
    torch.testing.assert_close(together, separate, rtol=within, atol=within)
    assert torch.equal(logp(policy), separate)
    after = dict(policy.core.named_modules())
    assert after.keys() == before.keys()
    assert all(after[name] is module for name, module in before.items())


@pytest.mark.parametrize(
    "model_type", [pytest.param(n, marks=[] if n == "internvl" else pytest.mark.gate) for n in sorted(BUILDS)]
)
def test_every_family(tmp_path: Path, model_type: str) -> None:
    policy = adapted(build_family(tmp_path, model_type), lora={"rank": 2, "targets": ["language"]})
    separate = logp(policy)
    with Merged(policy.core).active():
        torch.testing.assert_close(logp(policy), separate, rtol=1e-4, atol=1e-4)


def test_an_error_inside_leaves_nothing_behind(tiny_folder: Folder) -> None:
    policy = adapted(tiny_folder("qwen2_5"), lora={"rank": 4})
    state = {name: value.clone() for name, value in policy.core.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), Merged(policy.core).active():
        raise RuntimeError("inside")
    assert policy.core.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in policy.core.state_dict().items())


def test_only_adapters_on_plain_layers_are_merged(tiny_folder: Folder) -> None:
    policy = adapted(tiny_folder("qwen2_5"), lora={"rank": 4, "targets": ["q_proj", "down_proj"]})
    names = {name for _, name, _ in mergeable(policy.core)}
    assert names == {"q_proj", "down_proj"}
    copies = [
        t for name, t in merged_state_dict(policy.core).items() if name.endswith(("q_proj.weight", "down_proj.weight"))
    ]
    text = [t for t in copies if t.shape[0] == policy.core.config.text_config.hidden_size]
    assert merged_bytes(policy.core) == sum(t.numel() * t.element_size() for t in text)
    with policy.peft.disable_adapter():
        assert mergeable(policy.core) == []
    config = build_config("qwen2_5", build_tokenizer()).to_dict()
    recipe = ModelRecipe(path="", lora=LoraRecipe(rank=2), quantize="4bit")  # type: ignore[call-arg]
    assert mergeable(meta_model(config, recipe, torch.bfloat16)) == []
    assert mergeable(nn.Sequential(nn.Linear(2, 2))) == []


def test_numbers_of_the_dtype_stay_and_others_are_rounded_to_a_neighbour() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(4096), torch.tensor([0.0, -0.0, 1.0 - 2**-24, -255.9999, 3e-39])])
    exact = x.to(torch.bfloat16).float()
    assert torch.equal(rounded(exact, torch.bfloat16, 1).float(), exact)
    got = rounded(x, torch.bfloat16, 1)
    assert torch.equal(got, rounded(x, torch.bfloat16, 1))
    assert not torch.equal(got, rounded(x, torch.bfloat16, 2))
    assert ((got.double() - x.double()).abs() <= 2**-7 * x.double().abs() + 2.0**-133).all()
    assert torch.equal(rounded(x.double(), torch.float64, 1), x.double())
    assert torch.equal(rounded(x, torch.float32, 1), x)


def test_the_mean_of_rounded_numbers_is_the_number() -> None:
    x = torch.tensor([0.02 + 1e-6, -1.003, 200.2]).repeat_interleave(1 << 16)
    means = rounded(x, torch.bfloat16, 3).double().view(3, -1).mean(1)
    apart = x.view(3, -1)[:, 0].double()
    step = 2.0 ** (apart.abs().log2().floor() - 7)
    assert ((means - apart).abs() / step < 5 * 0.5 / (1 << 8)).all()  # five standard errors


def test_an_update_below_the_resolution_reaches_the_output() -> None:
    """Rounded to the nearest, a sum with so small an update is mostly W, and the sampler would be the base model."""
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(512, 2048)).to(torch.bfloat16).float()
    low, high = torch.randn(4, 2048) / 2048**0.5, torch.randn(512, 4)
    update = 1e-4 * high @ low
    x = torch.linalg.pinv(low)[:, 0] + 0.01 * torch.randn(2048)  # inputs that the adapter reads
    wanted = (update.double() @ x.double()).norm()

    def error(merged: Tensor) -> float:
        return float((((merged.double() - weight.double()) - update.double()) @ x.double()).norm() / wanted)

    assert error((weight + update).to(torch.bfloat16)) > 0.8
    assert error(rounded(weight + update, torch.bfloat16, 0)) < 0.3
