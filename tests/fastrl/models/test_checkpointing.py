"""Checkpointing of every kind: the same gradients, no product computed twice where products are kept, and less kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.batch import PackedBatch, pack_row
from fastrl.models import Policy, load_policy
from fastrl.models.flops import flop_counter
from tests.helpers.families import build_family
from tests.helpers.groups import group, picture

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = build_family(tmp_path_factory.mktemp(model_type), model_type)
        return made[model_type]

    return of


def batch_of(policy: Policy) -> PackedBatch:
    seen = group(policy, [picture(120, 90, 1)], "Compare.", [5, 1, 9, 3], seed=10)
    return pack_row([seen, group(policy, [], "No picture here.", [4, 20, 2], seed=11)])


def trained(policy: Policy, batch: PackedBatch) -> tuple[dict[str, Tensor], int, int]:
    """Gradients, FLOPs of forward and backward, and bytes that autograd and checkpoints keep after the forward."""
    policy.core.train()
    with torch.profiler.profile(profile_memory=True) as profile:
        logp = policy.logprob(batch).logp
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    kept = sum(event.nbytes() for event in results.events() if event.name() == "[memory]")
    policy.core.zero_grad()
    with flop_counter() as counter:
        (policy.logprob(batch).logp ** 2).sum().backward()
    del logp
    grads = {name: p.grad.clone() for name, p in policy.core.named_parameters() if p.grad is not None}
    return grads, counter.get_total_flops(), kept


OPTIONS: list[dict[str, Any]] = [
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": "products"},
    {"gradient_checkpointing": "products", "offload_activations": True},
    {"gradient_checkpointing": True, "checkpointed_layers": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradients_are_the_same_bits(folder: Callable[[str], Path], model_type: str, options: dict[str, Any]) -> None:
    """The second forward makes the numbers of the first. Products that are kept are not computed again."""
    plain, recomputing = (load_policy(folder(model_type), device="cpu", **more) for more in ({}, options))
    batch = batch_of(plain)
    expected, flops, kept = trained(plain, batch)
    found, spent, left = trained(recomputing, batch)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert left < kept
    assert spent == flops if options["gradient_checkpointing"] == "products" else spent > flops


def test_the_first_layers_are_checkpointed(folder: Callable[[str], Path]) -> None:
    """More layers, less memory and more work; none and all are the ends. The vision tower's always are."""
    path, made = folder("qwen2_5_vl"), []
    for count in (0, 1, None):
        policy = load_policy(path, device="cpu", gradient_checkpointing=True, checkpointed_layers=count)
        layers = policy.family.layers(policy.core)
        flags = [layer.gradient_checkpointing for layer in layers]
        assert flags == [number < (len(layers) if count is None else count) for number in range(len(layers))]
        made.append(trained(policy, batch_of(policy))[1:])
    assert made[0][0] < made[1][0] < made[2][0]
    assert made[0][1] > made[1][1] > made[2][1]


def test_lora_keeps_its_products_too(folder: Callable[[str], Path]) -> None:
    lora = {"lora": {"rank": 4}}
    plain, kept = (
        load_policy(folder("qwen2_5_vl"), device="cpu", **lora, **more)
        for more in ({}, {"gradient_checkpointing": "products"})
    )
    with torch.no_grad():
        for name, parameter in plain.core.named_parameters():
            if "lora_B" in name:  # begins at zero, which would hide the gradient of lora_A
                parameter.normal_(std=0.1)
    kept.core.load_state_dict(plain.core.state_dict())
    plain.core.enable_input_require_grads()  # as checkpointing does
    batch = batch_of(plain)
    (expected, flops, before), (found, spent, after) = trained(plain, batch), trained(kept, batch)
    assert spent == flops
    assert after < before
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
