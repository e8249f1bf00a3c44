"""Whether a run keeps its prompts from rollout to update (``rollout.keep_prompts``), decided alike by plan and trainer.

``auto`` keeps them where that is exact, the prompts are not short, and what is kept takes at most half of the memory
that weights, gradients and optimizer states leave; the rest is for the activations of a micro-batch. What is kept is
traced on the meta device, for prompts of the planned size. The memory is all that the device has, not what is free, so
that a resumed run decides the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastrl.models.kept import obstacle
from fastrl.plan.hardware import GIB
from fastrl.plan.trace import trace_prompt
from fastrl.plan.workload import Workload
from fastrl.recipe import Recipe

SHARE = 0.5  # of the memory left, for what is kept
# Kept prompts go through the model one by one, others many at once. On two CPU cores a step of 48 prompts of about 40
# tokens takes 1.3 times as long if they are kept, one of prompts of 300 tokens 0.84 times.
FEWEST_TOKENS = 256  # of a planned prompt


class Keeping(NamedTuple):
    """The decision, and why."""

    on: bool
    reason: str

    @property
    def note(self) -> str:
        """A line for the log."""
        return f"prompts are computed {'once' if self.on else 'twice'} per step: {self.reason}"


def decided_by_recipe(recipe: Recipe) -> Keeping | None:
    """The decision where the recipe alone makes it; None: it depends on the model and its device."""
    if recipe.rollout.keep_prompts == "off":
        return Keeping(False, "rollout.keep_prompts: off")
    return Keeping(False, recipe.keep_obstacle) if recipe.keep_obstacle is not None else None


def decide_keep(recipe: Recipe, core: Any, work: Workload, room: float, *, gpu: bool) -> Keeping:
    """Decide for a recipe.

    Args:
        core: the recipe's model on the meta device.
        work: sizes of the prompts.
        room: bytes that weights, gradients and optimizer states leave.
        gpu: trace as on a GPU.

    Raises:
        ValueError: ``rollout.keep_prompts: on``, and the model does not permit it.
    """
    decided = decided_by_recipe(recipe)
    if decided is not None:
        return decided
    wanted, found = recipe.rollout.keep_prompts, obstacle(core)
    if found is not None:
        if wanted == "on":
            raise ValueError(f"rollout.keep_prompts: on trains from the rollout's passes, but {found}")
        return Keeping(False, found)
    if wanted == "on":
        return Keeping(True, "rollout.keep_prompts: on")
    if work.prompt_tokens < FEWEST_TOKENS:
        short = f"prompts of {work.prompt_tokens} tokens, as planned, are read faster together than one by one"
        return Keeping(False, f"{short} (rollout.keep_prompts)")
    kept = work.prompts * trace_prompt(core, work.prompt(), gpu=gpu)
    fits = kept <= SHARE * room
    size = f"keeping them takes {kept / GIB:.2g} of {max(room, 0.0) / GIB:.3g} GiB that the model's state leaves"
    return Keeping(fits, size if fits else f"{size}, more than half")
