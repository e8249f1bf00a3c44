"""Changes to a recipe that does not fit, cheapest first, each applied on top of the previous ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastrl.plan.estimate import Plan, make_plan
from fastrl.recipe import Recipe, build_recipe


@dataclass(frozen=True)
class Change:
    """Recipe keys to set in addition to previous changes, their cost, and the resulting plan."""

    keys: dict[str, Any]
    cost: str
    plan: Plan


def advise(plan: Plan, sizes: Mapping[str, Any] | None = None) -> list[Change]:
    """Changes until the recipe fits, in order of cost; those that would not lower the peak are skipped.

    If the last plan still does not fit, no known change is sufficient. ``sizes`` as in ``make_plan``.
    """
    found: list[Change] = []
    current = plan
    for keys, cost in _candidates(plan, found):
        if current.fits:
            break
        recipe = _changed(current.recipe, keys)
        if recipe is None:
            continue
        new = make_plan(recipe, plan.gpu, gpus=plan.gpus, nodes=plan.nodes, efficiency=plan.efficiency, sizes=sizes)
        if new.memory.peak < 0.99 * current.memory.peak:
            found.append(Change(keys, cost, new))
            current = new
    return found


def _candidates(plan: Plan, found: Sequence[Change]) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes and their costs, cheapest first, without those that would have no effect.

    ``found``: the changes accepted so far; the caller appends to it while iterating.
    """
    recipe, work = plan.recipe, plan.workload
    if plan.keeping.on:
        yield {"rollout.keep_prompts": "off"}, "prompts are computed twice; the gradient stays the same"
    if plan.merging.on:
        yield {"rollout.merge_lora": "off"}, "rollouts decode with separate adapters"
    if work.group_tokens < recipe.optim.token_budget:
        yield {"optim.token_budget": work.group_tokens}, "smaller micro-batches; the gradient stays the same"
    if not recipe.model.gradient_checkpointing:
        yield {"model.gradient_checkpointing": "products"}, "norms and activations are computed twice"
    if recipe.model.gradient_checkpointing is not True or recipe.model.checkpointed_layers is not None:
        full = {"model.gradient_checkpointing": True, "model.checkpointed_layers": None}
        yield full, "every layer's forward is computed twice"
    if recipe.optim.states == "fp32" and recipe.engine.kind == "local":
        yield {"optim.states": "8bit"}, "moments are rounded to 8 bits"
    if recipe.engine.kind == "local" and recipe.optim.states != "offload":
        yield {"optim.gradient_release": True, "optim.clip_norm": None}, "gradients are not clipped"
        back = {"optim.gradient_release": False, "optim.clip_norm": recipe.optim.clip_norm}
        taken = bool(found) and found[-1].plan.recipe.optim.gradient_release
        yield (
            {"optim.states": "offload", **(back if taken else {})},
            "the host updates: gradients and weights are copied there and back",
        )
    if not recipe.model.offload_activations:
        yield {"model.offload_activations": True}, "layer inputs are copied to the host and back"
    if recipe.rollout.max_new_tokens > 256 and work.samples and plan.memory.peak == plan.memory.rollout:
        yield {"rollout.max_new_tokens": recipe.rollout.max_new_tokens // 2}, "longer answers are truncated"
    if recipe.model.lora is None:
        yield {"model.lora": {"rank": 16}}, "trains adapters instead of all weights"
    yield {"model.quantize": "4bit"}, "frozen weights are rounded to 4 bits and unpacked for every product"


def _changed(recipe: Recipe, keys: Mapping[str, Any]) -> Recipe | None:
    """The recipe with ``keys`` set; None if they conflict with other keys."""
    values = recipe.model_dump(mode="json")
    for dotted, value in keys.items():
        *sections, leaf = dotted.split(".")
        here = values
        for section in sections:
            here = here[section]
        here[leaf] = value
    try:
        return build_recipe(values)
    except ValueError:
        return None
