"""The families of models, by ``config.model_type``: one file each. ``register`` adds one from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from fastrl.config.contract import faults
from fastrl.config.registry import Registry, nearest
from fastrl.models.families.base import PARTS, Family, Layout, Parts, Placed, Size, VisionFeatures
from fastrl.models.families.glm4v import Glm4V, Glm4VMoe, Glm46V
from fastrl.models.families.internvl import InternVL
from fastrl.models.families.llava import Llava
from fastrl.models.families.llava_next import LlavaNext, LlavaNextVideo, LlavaOnevision
from fastrl.models.families.qwen2_vl import Qwen2_5VL, Qwen2VL
from fastrl.models.families.qwen3_vl import Qwen3VL, Qwen3VLMoe
from fastrl.models.families.smolvlm import SmolVLM

__all__ = [
    "FAMILIES",
    "PARTS",
    "Family",
    "Layout",
    "Parts",
    "Placed",
    "Size",
    "VisionFeatures",
    "families",
    "family_of",
    "published",
    "register",
]

FAMILIES: Registry[type[Family]] = Registry("model family")  # by config.model_type
NEEDED = ("model_type", "style", "end_of_turn", "model_class", "preprocessor", "tokens", "blank", "features")

F = TypeVar("F", bound=type[Family])
_LINEAR = (
    "most of its text layers carry a state from token to token, which attention over a shared prompt would not hand to "
    "the answers"
)
_GEMMA = (
    "its pictures are attended to in both directions and its windows are measured along the dialogue, neither of which "
    "a packed row does"
)
# Families that would run and be wrong, and why.
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_next"), _LINEAR),
    **dict.fromkeys(("gemma3", "gemma3n", "gemma4"), _GEMMA),
}


def register(family: F) -> F:
    """Let a family be found by its ``model_type``. Also a class decorator.

    Raises:
        TypeError: no subclass of ``Family``, or one with a part missing, misspelt or called otherwise.
        ValueError: another family has that ``model_type``.
    """
    found = _faults(family)
    if found:
        raise TypeError(f"{family!r}: " + "; ".join(found))
    FAMILIES.add(family.model_type, family)
    return family


def _faults(family: type[Family]) -> list[str]:
    """What keeps a class from being a family. Helpers of its own are no fault, but for what is like a misspelt hook."""
    if not (isinstance(family, type) and issubclass(family, Family)):
        return faults(family, Family)
    hooks = {*dir(Family), *Family.__annotations__}
    own = [name for name in dir(family) if name not in hooks and not nearest(name, hooks, cutoff=0.8)]
    found = faults(family, Family, own=own)
    return found + [f"{name} is missing" for name in NEEDED if _plain(family, name) is _plain(Family, name)]


def _plain(cls: type, name: str) -> Any:
    value = getattr(cls, name, None)
    return getattr(value, "__func__", value)


def families() -> dict[str, type[Family]]:
    """All registered families by ``model_type``."""
    return {name: FAMILIES[name] for name in sorted(FAMILIES)}


def family_of(config: Any, where: object = "") -> Family:
    """The family of a transformers config or of a ``config.json``'s values.

    Args:
        config: the config.
        where: what it was read from, for messages.

    Raises:
        ValueError: no family of that ``model_type``, or text layers that the family has no shared form for.
    """
    kind = str(config.get("model_type") if isinstance(config, Mapping) else config.model_type)
    prefix = f"{where}: " if where else ""
    if kind not in FAMILIES and kind in REFUSED:
        raise ValueError(f"{prefix}model type {kind!r} is not supported: {REFUSED[kind]}")
    if kind not in FAMILIES:
        raise ValueError(f"{prefix}model type {kind!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[kind](config)
    try:
        family.check()
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None
    return family


def published() -> dict[str, Mapping[str, Any]]:
    """Configs as they are published, of all families, by hub name."""
    return {name: config for family in families().values() for name, config in family.published.items()}


_OURS: tuple[type[Family], ...] = (
    *(Qwen2VL, Qwen2_5VL, Qwen3VL, Qwen3VLMoe),
    *(Llava, LlavaNext, LlavaNextVideo, LlavaOnevision),
    *(InternVL, Glm4V, Glm4VMoe, Glm46V, SmolVLM),
)
for _family in _OURS:
    register(_family)
