"""What a run asks of the plan, for the device it runs on."""

from __future__ import annotations

import os
from typing import Any

import torch

from fastrl.models.families import family_of
from fastrl.plan.configs import image_limit
from fastrl.plan.estimate import make_plan, room_of
from fastrl.plan.hardware import Gpu, reserve
from fastrl.plan.keep import Keeping, decide_keep, decided_by_recipe
from fastrl.plan.merge import Merging, decide_merge, merge_decided_by_recipe
from fastrl.plan.recompute import with_checkpointing
from fastrl.plan.trace import checkpoint, meta_model
from fastrl.plan.workload import Workload, workload_of
from fastrl.recipe import Recipe


def choose_checkpointing(recipe: Recipe, policy: Any, *, ranks: int) -> Recipe:
    """Checkpoint the policy's layers as the plan chooses, where the recipe leaves that to it (``auto``).

    Args:
        recipe: the run's.
        policy: the loaded ``fastrl.models`` policy, whose layers are not checkpointed yet.
        ranks: data-parallel processes.

    Returns:
        The recipe with what was chosen. On a CPU nothing is checkpointed.
    """
    if recipe.model.gradient_checkpointing != "auto":
        return recipe
    if policy.device.type != "cuda":
        return with_checkpointing(recipe, False, None)
    this = Gpu("this GPU", memory_bytes(policy.device), bandwidth=1.0, flops=1.0)  # no time is asked for
    chosen = make_plan(recipe, this, gpus=ranks).recipe
    checkpoint(policy.core, chosen.model)
    return chosen


def checkpointing_note(recipe: Recipe, chosen: Recipe) -> str:
    """A line for the log where the recipe left checkpointing to the plan, else nothing."""
    if recipe.model.gradient_checkpointing != "auto":
        return ""
    kind, layers = chosen.model.gradient_checkpointing, chosen.model.checkpointed_layers
    some = "" if layers is None else f", model.checkpointed_layers: {layers}"
    return f"model.gradient_checkpointing: auto is {str(kind).lower()}{some}, the fastest that is planned to fit"


def choose_keep(recipe: Recipe, policy: Any) -> Keeping:
    """Whether this run keeps its prompts (see ``fastrl.plan.keep``).

    Args:
        recipe: the run's.
        policy: the loaded ``fastrl.models`` policy.
    """
    decided = decided_by_recipe(recipe)
    if decided is not None:
        return decided
    core, work, room = _asked(recipe, policy)
    return decide_keep(recipe, core, work, room, gpu=policy.device.type == "cuda")


def choose_merge(recipe: Recipe, policy: Any, keeping: Keeping) -> Merging:
    """Whether this run's rollouts sample with merged adapters (see ``fastrl.plan.merge``); arguments as above."""
    decided = merge_decided_by_recipe(recipe)
    if decided is not None:
        return decided
    core, _, room = _asked(recipe, policy)
    return decide_merge(recipe, core, room, keeps=keeping.on)


def _asked(recipe: Recipe, policy: Any) -> tuple[Any, Workload, float]:
    """The policy's model on the meta device, the sizes of a step, and the bytes that the model's state leaves."""
    core = meta_model(policy.core.config.to_dict(), recipe.model, policy.dtype)
    family = family_of(core.config)
    work = workload_of(recipe, family, image_limit=image_limit(recipe.model.path, family))
    memory = memory_bytes(policy.device)
    return core, work, room_of(recipe, core, work, memory - reserve(memory))


def memory_bytes(device: torch.device) -> int:
    """Bytes of a GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
