"""What a run asks of the plan: the checkpointing that ``auto`` stands for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastrl.models import load_policy
from fastrl.plan import running
from fastrl.plan.configs import config_of
from fastrl.plan.hardware import GIB
from fastrl.plan.running import checkpointing_note, choose_checkpointing
from fastrl.plan.trace import meta_model
from fastrl.recipe import Recipe, load_recipe


def recipe(*changes: str) -> Recipe:
    return load_recipe("perception-r1-counting-tiny", ["rollout.keep_prompts=off", *changes])


def flags(core: Any) -> list[bool]:
    return [m.gradient_checkpointing for m in core.modules() if hasattr(m, "_gradient_checkpointing_func")]


def test_on_a_cpu_nothing_is_checkpointed() -> None:
    auto = recipe("model.gradient_checkpointing=auto")
    policy = load_policy("tiny:perception", device="cpu")
    chosen = choose_checkpointing(auto, policy, ranks=1)
    assert chosen.model.gradient_checkpointing is False
    assert flags(policy.core) == []
    assert auto.model.gradient_checkpointing == "auto"  # what the run writes down
    note = "model.gradient_checkpointing: auto is false, the fastest that is planned to fit"
    assert checkpointing_note(auto, chosen) == note


def test_a_recipe_that_chooses_is_left_alone() -> None:
    chosen = recipe("model.gradient_checkpointing=products")
    assert choose_checkpointing(chosen, None, ranks=1) is chosen
    assert checkpointing_note(chosen, chosen) == ""


@pytest.mark.gate
@pytest.mark.parametrize(("gib", "kind"), [(1.05, True), (100.0, False)])
def test_on_a_gpu_it_is_what_fits(gib: float, kind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = recipe("model.gradient_checkpointing=auto")
    monkeypatch.setattr(running, "memory_bytes", lambda device: int(gib * GIB))
    core = meta_model(config_of("tiny:perception"), auto.model, torch.bfloat16)
    policy: Any = SimpleNamespace(core=core, device=torch.device("cuda"))
    assert flags(core) == []
    chosen = choose_checkpointing(auto, policy, ranks=1)
    assert chosen.model.gradient_checkpointing is kind  # nothing fits into the smaller: the last choice
    assert bool(flags(core)) is kind
    assert all(flags(core))


@pytest.mark.parametrize("wrong", ["product", "1", "[true]"])
def test_another_kind_is_refused_with_those_there_are(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"expected true, false, products or auto \(got") as found:
        recipe(f"model.gradient_checkpointing={wrong}")
    assert str(found.value).count("gradient_checkpointing") == 1


def test_the_number_of_layers_needs_checkpointing() -> None:
    with pytest.raises(ValueError, match=r"model\.checkpointed_layers says how many layers"):
        recipe("model.checkpointed_layers=2")
