"""What ``model.gradient_checkpointing: auto`` chooses from."""

from __future__ import annotations

from collections.abc import Iterator

from fastrl.models.checkpointing import Kind
from fastrl.models.families import family_of
from fastrl.plan.configs import config_of
from fastrl.recipe import Recipe

PARTS = 4  # the layers that are recomputed are tried in so many parts


def checkpointing_choices(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with each choice, the fastest first."""
    given = recipe.model.checkpointed_layers
    yield with_checkpointing(recipe, False, None)
    yield with_checkpointing(recipe, "products", given)
    if given is None:
        layers = family_of(config_of(recipe.model.path)).config.get_text_config().num_hidden_layers
        for part in range(1, PARTS):
            yield with_checkpointing(recipe, True, layers * part // PARTS)
    yield with_checkpointing(recipe, True, given)


def with_checkpointing(recipe: Recipe, kind: Kind, layers: int | None) -> Recipe:
    """The recipe with ``model.gradient_checkpointing`` and ``model.checkpointed_layers`` set."""
    changed = {"gradient_checkpointing": kind, "checkpointed_layers": layers}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=changed)})
