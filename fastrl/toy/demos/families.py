"""Which small model a demo uses, that of its method's default recipe or the LLaVA one, and at which learning rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fastrl.models.families.llava import Llava
from fastrl.models.families.qwen2_vl import Qwen2_5VL
from fastrl.rewards.base import unknown

DEFAULT = Qwen2_5VL.model_type
# model type -> how the names of its small recipes end
RECIPES: Mapping[str, str] = {DEFAULT: "tiny", Llava.model_type: f"{Llava.model_type}-tiny"}


def recipe_for(stem: str, family: str | None) -> str:
    """The name of a demo's recipe for a model type (None: the default, Qwen2.5-VL).

    Raises:
        ValueError: no small model of that type.
    """
    family = family or DEFAULT
    if family not in RECIPES:
        raise ValueError(unknown("family of small models", family, RECIPES))
    return f"{stem}-{RECIPES[family]}"


def rates_of(
    chosen: Mapping[str, Mapping[str, float]], family: str | None, kinds: Iterable[str], rate: float
) -> Mapping[str, float]:
    """Learning rate of each kind that a demo compares, on the small model of a family (None: the default).

    ``chosen`` has the rates by family; where nothing was chosen for one, all kinds train at ``rate`` and cannot be
    compared with each other.
    """
    return chosen.get(family or DEFAULT) or dict.fromkeys(kinds, rate)
