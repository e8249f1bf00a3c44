"""The work of a record before it is encoded: from its text's length and its pictures' headers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from fastrl.data.pictures import picture_size
from fastrl.methods import method_for

if TYPE_CHECKING:
    from fastrl.data.records import Record
    from fastrl.models.load import Policy
    from fastrl.recipe import Recipe

CHARACTERS = 4  # of a token of text
TRAINED = 3  # a forward, and a backward that costs two


class Costs(NamedTuple):
    """Multiply-adds of a step for one token of a prompt, and for one row of the vision tower."""

    token: float
    patch: float


def costs_of(recipe: Recipe, policy: Policy) -> Costs:
    """One for each weight in every pass. The quadratic part of attention is left out.

    Answers are left out, too: their number and length are the same for every prompt as far as anyone knows before, and
    ranks have equally many prompts.
    """
    method, parts = method_for(recipe.method), policy.family.parts(policy.core)
    recomputed = recipe.model.gradient_checkpointing is True
    passes = recipe.optim.updates_per_batch * (TRAINED + recomputed)
    passes += method.samples + method.reads_reference(recipe.method)
    weights = [sum(p.numel() for p in part.parameters()) for part in (parts.language, parts.vision)]
    return Costs(weights[0] * passes, weights[1] * (passes if policy.trains_vision else 1))


class RecordWork:
    """The work of records for a model; call it with one.

    Args:
        policy: has the family and the preprocessor, which know the sizes of pictures.
        costs: of a token and of a row.
    """

    def __init__(self, policy: Policy, costs: Costs) -> None:
        self._family, self._preprocessor, self._costs = policy.family, policy.preprocessor, costs
        self._sizes: dict[int, Any] = {}

    def __call__(self, record: Record) -> float:
        """In multiply-adds. Raises ``PictureError`` if a picture has no readable header."""
        tokens = sum(map(characters, record.messages)) / CHARACTERS
        patches = 0
        for image in record.images:
            size = self._size(self._preprocessor.area(picture_size(image)))
            tokens, patches = tokens + size.tokens, patches + size.patches
        return tokens * self._costs.token + patches * self._costs.patch

    def _size(self, area: int) -> Any:
        if area not in self._sizes:
            self._sizes[area] = self._family.sizes(area)
        return self._sizes[area]


def characters(message: Mapping[str, Any]) -> int:
    """Length of a message's text."""
    content = message["content"]
    return len(content) if isinstance(content, str) else sum(len(part.get("text", "")) for part in content)
