"""A step that trains from the rollout's passes over its prompts, against one that computes them again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.trainer import Run, train
from tests.helpers.training import make_recipe, make_records, steady_rows

Folder = Callable[[str], Path]


@pytest.fixture(autouse=True)
def short_prompts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` judges the small prompts here as if they were long."""
    monkeypatch.setattr("fastrl.plan.keep.FEWEST_TOKENS", 1)


CHANGES: dict[str, dict[str, Any]] = {
    "a group per micro-batch": {"optim__token_budget": 64},
    "one micro-batch": {"optim__token_budget": 100_000},
    "reference": {"method__beta": 0.1},
    "lora and reference": {"method__beta": 0.1, "model__lora": {"rank": 2}},
    "checkpointing": {"model__gradient_checkpointing": True, "model__offload_activations": True},
    "row-local head": {"optim__row_local_head": True},
    "frozen tower": {"model__freeze": ["vision", "projector"]},
    "other prompts for equal rewards": {"method__zero_variance": "resample", "rollout__max_new_tokens": 2},
}


def gradients_of(recipe: Any) -> tuple[Run, dict[str, Tensor], int]:
    """A run after its first step, the gradients of that step, and the patches that its tower has seen."""
    run, captured = Run(recipe, records=make_records()), {}
    step, patches = run.engine.step, []

    def capture() -> Any:
        captured.update({n: p.grad.clone() for n, p in run.policy.model.named_parameters() if p.grad is not None})
        return step()

    run.engine.step = capture  # type: ignore[method-assign]
    run.policy.core.model.visual.register_forward_pre_hook(lambda _m, a: patches.append(len(a[0])))
    run.step(1)
    return run, captured, sum(patches)


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_a_step_is_the_same(tiny_folder: Folder, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = tiny_folder("qwen2_5")
    found = [
        gradients_of(make_recipe(folder, tmp_path, rollout__keep_prompts=keep, **changes)) for keep in ("off", "on")
    ]
    (off, again, twice), (on, once, seen) = found
    assert (off.context.kept is None, on.keeping.on) == (True, True)
    assert again.keys() == once.keys()
    assert again
    scale = max(float(g.norm()) for g in again.values())
    for name, want in again.items():
        allowed = 2e-6 * max(float(want.norm()), 1e-3 * scale)
        assert float((once[name] - want).norm()) <= allowed, name
    kept = on.context.kept
    assert kept is not None
    assert not len(kept)
    reference = "model__lora" not in changes and changes.get("method__beta")  # which has a tower of its own
    if "model__freeze" in changes or "model__lora" in changes:
        assert seen == twice
    elif not reference and changes.get("method__zero_variance") is None:
        assert 2 * seen == twice


def test_two_runs_have_the_same_bits_and_say_that_prompts_are_kept(
    tiny_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = []
    for name in ("a", "b"):
        run = Run(make_recipe(tiny_folder("qwen2_5"), tmp_path / name, optim__token_budget=64), records=make_records())
        assert run.keeping.on, "auto, with enough memory"
        for number in (1, 2):
            run.step(number)
        weights.append({n: p.detach().clone() for n, p in run.policy.core.named_parameters()})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    train(make_recipe(tiny_folder("qwen2_5"), tmp_path / "c", optim__steps=1), records=make_records())
    assert "prompts are computed once per step: keeping them takes" in capsys.readouterr().err
    rows = steady_rows(tmp_path / "c")
    assert rows


def test_several_updates_compute_prompts_again_and_say_so(
    tiny_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, optim__steps=1, optim__updates_per_batch=2)
    train(recipe, records=make_records())
    assert "prompts are computed twice per step: optim.updates_per_batch is above 1" in capsys.readouterr().err


def test_groups_without_different_rewards_are_not_kept(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their graphs are gone before the backward, and a step of such groups alone updates nothing."""
    run = Run(make_recipe(tiny_folder("qwen2_5"), tmp_path, method__zero_variance="drop"), records=make_records())
    kept = run.context.kept
    assert kept is not None
    held: list[tuple[int, int]] = []
    pack = run.updates.pack

    def watched(prepared: Any, records: Any) -> Any:
        held.append((len(kept), len(prepared.groups)))
        return pack(prepared, records)

    monkeypatch.setattr(run.updates, "pack", watched)
    score = run.method._score  # type: ignore[attr-defined]

    def equal_but_for_the_first(groups: Any) -> None:
        score(groups)
        for group in groups[1 - len(held) :]:  # the first step keeps one group, the second none
            for completion in group.completions:
                completion.scalars["reward"] = 0.5

    monkeypatch.setattr(run.method, "_score", equal_but_for_the_first)
    first, _ = run.step(1)
    second, _ = run.step(2)
    assert held == [(1, 1), (0, 0)]
    assert first["grad_norm"] > 0
    assert second["update/skipped"] == 1.0
