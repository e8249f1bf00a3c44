"""Whether rollouts sample with merged adapters (``rollout.merge_lora``), decided alike by plan and trainer.

By the memory that the device has, not what is free, so that a resumed run decides the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastrl.models.merged import merged_bytes
from fastrl.plan.hardware import GIB
from fastrl.plan.keep import SHARE
from fastrl.recipe import Recipe


class Merging(NamedTuple):
    """The decision, and why."""

    on: bool
    reason: str

    @property
    def note(self) -> str:
        """A line for the log."""
        return f"rollouts sample with {'merged' if self.on else 'separate'} adapters: {self.reason}"


def merge_decided_by_recipe(recipe: Recipe) -> Merging | None:
    """The decision where the recipe alone makes it; None: it depends on the model and its device."""
    if recipe.rollout.merge_lora == "off":
        return Merging(False, "rollout.merge_lora: off")
    obstacle = recipe.merge_obstacle
    if obstacle is not None:
        return Merging(False, obstacle)
    return Merging(True, "rollout.merge_lora: on") if recipe.rollout.merge_lora == "on" else None


def decide_merge(recipe: Recipe, core: Any, room: float, *, keeps: bool) -> Merging:
    """Decide for a recipe.

    Args:
        core: the recipe's model, on any device.
        room: bytes that weights, gradients and optimizer states leave.
        keeps: whether prompts are kept, which may take their share of the room.
    """
    decided = merge_decided_by_recipe(recipe)
    if decided is not None:
        return decided
    size, left = merged_bytes(core), room * (1 - SHARE) if keeps else room
    text = f"the merged copy takes {size / GIB:.2g} of {max(left, 0.0) / GIB:.3g} GiB that are left"
    return Merging(True, text) if size <= SHARE * left else Merging(False, f"{text}, more than half")
