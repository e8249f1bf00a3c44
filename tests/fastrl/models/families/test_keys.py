"""Recipe keys that choose what is trained and how, for every family: adapters, single parts, methods, liger's
layers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastrl.batch import pack_row
from fastrl.data import load_data
from fastrl.data.lists import RankedList
from fastrl.data.records import Record, question
from fastrl.data.reflection import SpokenTurn
from fastrl.models import Policy, load_policy
from fastrl.models.fused import fused, use_fused
from fastrl.models.liger import use_liger
from fastrl.trainer import train
from tests.helpers.contract import QUESTIONS, Pair, check_sampler, gradients
from tests.helpers.training import TEXT, make_recipe, make_records, steady_rows


def logp_of(policy: Policy, pair: Pair) -> Tensor:
    with torch.no_grad():
        return policy.logprob(pack_row([pair.group(images) for images in QUESTIONS])).logp


# Adapters


def test_adapters_are_on_every_linear_layer_of_the_text_model_and_nowhere_else(pair: Pair) -> None:
    layers = f"{pair.policy.family.part_names['language'][0]}.layers."
    plain = [name for name, module in pair.policy.core.named_modules() if isinstance(module, nn.Linear)]
    policy = load_policy(pair.folder, device="cpu", lora={"rank": 2})
    adapted = [name for name, module in policy.core.named_modules() if hasattr(module, "lora_A")]
    assert adapted == [name for name in plain if name.startswith(layers)]
    assert all(".lora_" in name for name, p in policy.core.named_parameters() if p.requires_grad)


@pytest.mark.gate
@pytest.mark.parametrize("decode", ["eager", "static"])
@pytest.mark.parametrize("targets", [["language"], ["language", "vision", "projector"]], ids=["text", "all parts"])
def test_adapters_train_roll_out_and_are_merged(pair: Pair, tmp_path: Path, targets: list[str], decode: str) -> None:
    policy = load_policy(pair.folder, device="cpu", lora={"rank": 2, "targets": targets})
    torch.testing.assert_close(logp_of(policy, pair), logp_of(pair.policy, pair), rtol=0, atol=pair.tolerance)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.core.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    assert not torch.allclose(logp_of(policy, pair), logp_of(pair.policy, pair), atol=0.1)
    check_sampler(replace(pair, policy=policy), decode)
    batch = pack_row([pair.group(images) for images in QUESTIONS])
    (policy.logprob(batch).logp * batch.per_token["weight"]).sum().backward()
    trained = {name for name, p in policy.core.named_parameters() if p.requires_grad}
    reached = gradients(policy.core)
    assert {policy.family.part_of(name) for name in reached} == set(targets)
    assert all(torch.isfinite(gradient).all() for gradient in reached.values())
    assert set(reached) <= trained
    with policy.reference():
        torch.testing.assert_close(logp_of(policy, pair), logp_of(pair.policy, pair), rtol=0, atol=pair.tolerance)
    policy.save(tmp_path)
    merged = load_policy(tmp_path, device="cpu")
    torch.testing.assert_close(logp_of(merged, pair), logp_of(policy, pair), rtol=0, atol=10 * pair.tolerance)


# A single part


@pytest.mark.gate
@pytest.mark.parametrize("part", ["projector", "vision", "language"])
def test_a_part_trained_alone_has_the_gradients_it_has_among_all(pair: Pair, part: str) -> None:
    others = [word for word in ("vision", "projector", "language") if word != part]
    alone = load_policy(pair.folder, device="cpu", freeze=others)
    batch = pack_row([pair.group(images) for images in QUESTIONS])
    for policy in (alone, pair.policy):
        (policy.logprob(batch).logp * batch.per_token["weight"]).sum().backward()
    got, want = gradients(alone.core), gradients(pair.policy.core)
    assert {alone.family.part_of(name) for name in got} == {part}
    assert set(got) == {name for name in want if alone.family.part_of(name) == part}
    scale = max(float(gradient.norm()) for gradient in want.values())
    for name, gradient in got.items():
        allowed = 10 * pair.tolerance * max(float(want[name].norm()), 1e-3 * scale)
        assert float((gradient - want[name]).norm()) <= allowed, name


# Methods


def list_records() -> list[Record]:
    lists = [RankedList((TEXT[i : i + 4], TEXT[: i + 2], TEXT[i : i + 9]), (0.1, 0.9, 0.4)) for i in range(4)]
    return [replace(r, target={**r.target, "list": one}) for r, one in zip(make_records(4), lists, strict=True)]


def dialogue_records() -> list[Record]:
    turns = (SpokenTurn("a cat", 0.2, "Try again."), SpokenTurn("a red cat", 0.9))
    pictures = [Image.new("RGB", (56 + 28 * i, 56), (40 * i, 90, 200)) for i in range(4)]
    asked = question("caption", prompt="Describe the image.")
    return [Record(f"d{i}", "caption", (p,), asked, {"dialogue": turns}) for i, p in enumerate(pictures)]


def clip_records() -> Any:
    return load_data("scenes:utr?n=4&size=56&frames=3")


RECORDS = {"perception-r1": make_records, "perpo": list_records, "reper": dialogue_records, "utr": clip_records}


@pytest.mark.gate
@pytest.mark.parametrize("method", RECORDS)
def test_every_method_trains_every_family(pair: Pair, tmp_path: Path, method: str) -> None:
    recipe = make_recipe(pair.folder, tmp_path, method={"kind": method}, optim__steps=2, data__prompts_per_step=2)
    summary = train(recipe, records=RECORDS[method](), show=False)
    rows = steady_rows(tmp_path)
    assert len(rows) == 2
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert summary.model is not None
    before, after = (dict(load_policy(f, device="cpu").core.named_parameters()) for f in (pair.folder, summary.model))
    changed = {pair.policy.family.part_of(name) for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"vision", "projector", "language"}


# liger's layers

WITHOUT = {  # kinds of layers that a family has in a form without a liger kernel
    "glm4v": {"rope"},
    "glm4v_moe": {"rope"},
    "glm46v": {"rope"},
    "qwen3_vl_moe": {"swiglu"},
    "qwen3_5": {"rms_norm", "rope"},
    "qwen3_5_moe": {"rms_norm", "rope"},
}


@pytest.fixture
def liger_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """liger's functions by the formulas of its kernels, which run on a CPU."""
    functional = pytest.importorskip("liger_kernel.transformers.functional")

    def rms_norm(x: Tensor, weight: Tensor, eps: float, in_place: bool = True) -> Tensor:
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        half = cos.shape[-1] // 2  # the kernels read the first half of the columns
        cos, sin = (torch.cat([part[..., :half]] * 2, -1)[:, None] for part in (cos, sin))

        def turned(x: Tensor) -> Tensor:
            return torch.cat((-x[..., half:], x[..., :half]), -1)

        return q * cos + turned(q) * sin, k * cos + turned(k) * sin

    monkeypatch.setattr(functional, "liger_rms_norm", rms_norm)
    monkeypatch.setattr(functional, "liger_swiglu", lambda gate, up: nn.functional.silu(gate) * up)
    monkeypatch.setattr(functional, "liger_rope", rope)


def test_liger_switches_only_layers_that_it_computes_alike(
    pair: Pair, liger_formulas: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = logp_of(pair.policy, pair)
    with monkeypatch.context() as as_on_a_gpu:
        as_on_a_gpu.setattr("fastrl_kernels._common.interpreting", lambda: True)
        done = use_liger(pair.policy.core)
    assert set(done) == {"rms_norm", "swiglu", "rope"} - WITHOUT.get(pair.policy.family.model_type, set())
    torch.testing.assert_close(logp_of(pair.policy, pair), want, rtol=pair.tolerance, atol=pair.tolerance)


def test_fused_layers_compute_what_every_family_does(pair: Pair) -> None:
    """On a CPU by the kernels' twins: which layers are switched, and that each computes what its class does."""
    want = logp_of(pair.policy, pair)
    with fused(pair.policy.core):
        got = logp_of(pair.policy, pair)
    torch.testing.assert_close(got, want, rtol=pair.tolerance, atol=pair.tolerance)
    done = use_fused(pair.policy.core)
    assert {"gated", "mlp"} & set(done)
    own = WITHOUT.get(pair.policy.family.model_type, set())
    assert {"rms_norm", "rope"} - set(done) == {"rms_norm", "rope"} & own
