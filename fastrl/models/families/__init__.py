"""Model families by ``config.model_type``, one file each. ``register`` adds another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from fastrl.answers.styles import add_family
from fastrl.config.contract import faults
from fastrl.config.registry import Registry, nearest
from fastrl.models.families.base import PARTS, Family, Layout, Parts, Placed, Size, VisionFeatures
from fastrl.models.families.glm4v import Glm4V, Glm4VMoe, Glm46V
from fastrl.models.families.internvl import InternVL
from fastrl.models.families.llava import Llava
from fastrl.models.families.llava_next import LlavaNext, LlavaNextVideo, LlavaOnevision
from fastrl.models.families.qwen2_vl import Qwen2_5VL, Qwen2VL
from fastrl.models.families.qwen3_5 import Qwen3_5, Qwen3_5Moe
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
_TEXT = "it reads no pictures; Qwen3.5 (qwen3_5) has the same kind of text layers and reads them"
_GEMMA = (
    "its image tokens attend in both directions and its sliding windows "
    "follow the dialogue, neither of which packed rows support"
)
# Known kinds of models that are not supported, and why.
REFUSED: Mapping[str, str] = {
    "qwen3_next": _TEXT,
    **dict.fromkeys(("gemma3", "gemma3n", "gemma4"), _GEMMA),
}


def register(family: F) -> F:
    """Register a family under its ``model_type``. Also usable as a class decorator.

    Raises:
        TypeError: not a subclass of ``Family``, or a hook is missing, misspelt or has another signature.
        ValueError: another family has that ``model_type``, or the ``style`` is unknown.
    """
    found = _faults(family)
    if found:
        raise TypeError(f"{family!r}: " + "; ".join(found))
    FAMILIES.check(family.model_type, family)
    add_family(family.model_type, family.style, family.end_of_turn)
    FAMILIES.add(family.model_type, family)
    return family


def _faults(family: type[Family]) -> list[str]:
    """Reasons why a class is not a valid family. Extra methods are allowed unless they look like misspelt hooks."""
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
        ValueError: no family has that ``model_type``, or prompts cannot be shared in the config's text layers.
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
    """Published configs of all families, by hub name."""
    return {name: config for family in families().values() for name, config in family.published.items()}


_OURS: tuple[type[Family], ...] = (
    *(Qwen2VL, Qwen2_5VL, Qwen3VL, Qwen3VLMoe, Qwen3_5, Qwen3_5Moe),
    *(Llava, LlavaNext, LlavaNextVideo, LlavaOnevision),
    *(InternVL, Glm4V, Glm4VMoe, Glm46V, SmolVLM),
)
for _family in _OURS:
    register(_family)
