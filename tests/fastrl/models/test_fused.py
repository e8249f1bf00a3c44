"""The library's pointwise kernels in a model's layers: which are switched, what they compute, and what they save."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrl.models import Policy, load_policy
from fastrl.models.checkpointing import use_checkpointing
from fastrl.models.families import FAMILIES, family_of
from fastrl.models.fused import _replacement, _TwoProducts, fused, fuses, use_fused
from fastrl.plan.trace import meta_model, trace_batch
from fastrl.plan.traffic import traffic
from fastrl.plan.workload import packed
from fastrl.recipe import ModelRecipe
from tests.helpers.groups import picture_batch


@pytest.fixture(params=["qwen2_5", "qwen2"])
def folder(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder(request.param)


def run(policy: Policy) -> tuple[Tensor, dict[str, Tensor]]:
    policy.core.zero_grad()
    logp = policy.logprob(picture_batch(policy).to(policy.device)).logp
    (logp * torch.linspace(-1, 2, len(logp), device=logp.device)).sum().backward()
    return logp.detach(), {n: p.grad.clone() for n, p in policy.core.named_parameters() if p.grad is not None}


def assert_same(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], within: float) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=within, atol=within)
    assert got[1].keys() == want[1].keys()
    scale = max(float(g.norm()) for g in want[1].values())
    for name, gradient in want[1].items():
        allowed = within * max(float(gradient.norm()), 1e-3 * scale)
        assert float((got[1][name] - gradient).norm()) <= allowed, name


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"gradient_checkpointing": "products"}, {"lora": {"rank": 2}}],
    ids=str,
)
def test_log_probs_and_gradients_are_those_of_transformers(folder: Path, options: dict[str, Any]) -> None:
    policy = load_policy(folder, device="cpu", **options)
    for name, parameter in policy.core.named_parameters():  # of adapters, which begin as 0
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    before = [name for name, module in policy.core.named_modules() if "forward" in vars(module)]
    want = run(policy)
    with fused(policy.core):
        assert_same(run(policy), want, 1e-5)
    again = run(policy)
    assert torch.equal(again[0], want[0])
    assert [name for name, module in policy.core.named_modules() if "forward" in vars(module)] == before


@pytest.mark.gate
@pytest.mark.interpreter
def test_interpreted_kernels_give_the_log_probs_and_gradients_of_transformers(folder: Path) -> None:
    policy = load_policy(folder, device="cpu")
    want = run(policy)
    use_fused(policy.core)
    got = run(policy)
    assert any(not torch.equal(got[1][name], want[1][name]) for name in want[1]), "the same bits: nothing was switched"
    assert_same(got, want, 2e-4)


@pytest.mark.gpu
def test_gpu_kernels_are_the_default_and_compute_what_transformers_do(folder: Path) -> None:
    policy = load_policy(folder, device="cuda", dtype=torch.float32)
    got = run(policy)
    assert "forward" in vars(policy.core.model.language_model.norm)
    for module in policy.core.modules():
        if _replacement(module)[0] is not None:
            module.__dict__.pop("forward", None)
    assert_same(got, run(policy), 1e-3)


def test_a_cpu_keeps_torch(folder: Path) -> None:
    core = load_policy(folder, device="cpu").core
    assert not fuses(torch.device("cpu"))
    assert "forward" not in vars(core.model.language_model.norm)


def test_all_layers_are_switched_and_a_copy_calls_its_own(tiny_folder: Callable[[str], Path]) -> None:
    core = load_policy(tiny_folder("qwen2_5"), device="cpu").core
    text, tower = core.model.language_model.layers, core.model.visual.blocks
    done = use_fused(core)
    layers = len(text) + len(tower)
    assert done == {
        "layer": layers,
        "gated": layers,
        "rms_norm": 2 * layers + 2,
        "rope": len(text),
        "tower": len(tower),
    }
    other = copy.deepcopy(core)
    assert other.model.language_model.norm.forward.__self__ is other.model.language_model.norm
    assert use_fused(core) == {}


def test_checkpointed_layers_still_keep_their_inputs_alone(folder: Path) -> None:
    """Transformers checkpoints in the forward that is replaced: saved tensors must not come back."""

    def saved(checkpointing: bool, switched: bool) -> int:
        policy = load_policy(folder, device="cpu")
        if checkpointing:
            use_checkpointing(policy.core)
        if switched:
            use_fused(policy.core)
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            policy.logprob(picture_batch(policy))
        return sum(kept.values())

    assert saved(True, True) <= 1.05 * saved(True, False)


def test_a_layer_with_a_hooked_norm_or_another_dtype_keeps_its_own_code(tiny_folder: Callable[[str], Path]) -> None:
    policy = load_policy(tiny_folder("qwen2_5"), device="cpu")
    want, seen = run(policy), []
    use_fused(policy.core)
    layer = policy.core.model.language_model.layers[0]
    layer.post_attention_layernorm.register_forward_hook(lambda *_: seen.append(1))
    layer.mlp.gate_proj.register_forward_hook(lambda *_: seen.append(2))
    assert_same(run(policy), want, 1e-5)
    assert seen == [1, 2]
    norm = policy.core.model.language_model.norm
    x = torch.randn(2, norm.weight.numel(), dtype=torch.bfloat16)
    assert torch.equal(norm(x), type(norm).forward(norm, x))


def test_two_products_sum_the_gradient_of_their_input() -> None:
    x, a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (4, 5), (7, 5)))
    torch.autograd.gradcheck(lambda *t: tuple(_TwoProducts.apply(*t)), (x, a, b))
    first, second = _TwoProducts.apply(x.detach(), a, b)
    assert [g is not None for g in torch.autograd.grad(first.sum() + second.sum(), [a, b])] == [True, True]


# What is saved, counted

NINTH = {  # Qwen2.5-VL-3B with a ninth of its layers and of its vocabulary
    "text_config": {"num_hidden_layers": 4, "vocab_size": 16896},
    "vision_config": {"depth": 4, "fullatt_block_indexes": [3]},
}


def counted(name: str, change: dict[str, Any], **options: Any) -> tuple[float, float, int]:
    """Bytes that a micro-batch's operators without FLOPs move and that it keeps for the backward, and its FLOPs: a
    prompt of 1,000 tokens, 961 of them of a picture, and 8 answers of 64, as on a GPU."""
    config = next(family.published[name] for family in FAMILIES.values() if name in family.published)
    parts = {key: {**config[key], **values} for key, values in change.items()}
    core = meta_model({**config, **parts}, ModelRecipe(path=name, **options), torch.bfloat16)
    family = family_of(core.config)
    traced = trace_batch(core, packed(family, 39, [family.blank((14 * 62) ** 2)], [(64,) * 8]), gpu=True)
    moved = traced.vision_traffic + traced.forward_traffic + traced.backward_traffic
    return moved, traced.kept, traced.vision_flops + traced.forward_flops + traced.backward_flops


def test_a_micro_batch_moves_about_a_third_of_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    moved, kept, flops = counted("Qwen/Qwen2.5-VL-3B-Instruct", NINTH)
    monkeypatch.setattr("fastrl.models.fused.use_fused", lambda core: None)
    plain, plainly_kept, same = counted("Qwen/Qwen2.5-VL-3B-Instruct", NINTH)
    assert flops == same
    assert moved < 0.345 * plain
    assert kept < 0.75 * plainly_kept


# Before the layers were fused, by the same count: benchmarks/NOTES.md.
BEFORE = {
    ("Qwen/Qwen2.5-VL-3B-Instruct", False): (194.4e9, 1 / 3),
    ("Qwen/Qwen2.5-VL-3B-Instruct", True): (245.1e9, 1 / 3),
}


@pytest.mark.gate
@pytest.mark.parametrize(("name", "checkpointing"), BEFORE)
def test_a_published_model_moves_a_third_of_what_it_did(name: str, checkpointing: bool) -> None:
    before, share = BEFORE[name, checkpointing]
    moved, _, _ = counted(name, {}, gradient_checkpointing=checkpointing)
    assert moved <= share * before


@pytest.mark.parametrize("change", [NINTH, pytest.param({}, marks=pytest.mark.gate)], ids=["ninth", "whole"])
def test_few_bytes_remain_in_the_gather_of_shared_keys(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than 5 % would not pay for kernels of attention that read a prompt's keys in place; two kernels a layer."""
    gathers = {torch.ops.fastrl.gather_rows, torch.ops.fastrl.sum_copies}
    found: list[int] = []

    def noted(func: Any, args: Any, kwargs: Any, out: Any) -> int:
        moved = traffic(func, args, kwargs, out)
        if func._overloadpacket in gathers:
            found.append(moved)
        return moved

    monkeypatch.setattr("fastrl.plan.ledger.traffic", noted)
    moved, _, _ = counted("Qwen/Qwen2.5-VL-3B-Instruct", change)
    layers = change.get("text_config", {}).get("num_hidden_layers", 36)
    rows, gathered = 1000 + 8 * 64, 1000 + 8 * 1064
    keys, tables = 2 * 2 * 128 * 2 * (rows + gathered), 8 * (2 * gathered + rows + 1)
    assert len(found) == 2 * layers
    assert sum(found) == layers * (2 * keys + tables + 8 * (gathered + rows + 1))
    assert sum(found) < 0.02 * moved
