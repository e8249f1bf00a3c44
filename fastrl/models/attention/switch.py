"""Sets which attention function a model's language and vision layers call; nothing else changes that.

Our functions are registered with transformers by name and without a mask function, so no model builds a mask for them:
what a token attends to is passed in keywords (``fastrl_segments``, ``fastrl_cache``, ``fastrl_probe``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastrl.models.families import Family


def register(**functions: Callable[..., Any]) -> None:
    """Register attention functions with transformers under these names."""
    from transformers import AttentionInterface

    for name, function in functions.items():
        AttentionInterface.register(name, function)


@contextmanager
def attention(family: Family, core: Any, *, language: str | None = None, vision: str | None = None) -> Iterator[None]:
    """Make the layers of a part call the attention function of that name during a block; None: leave them unchanged."""
    configs = _named(family, core, language, vision)
    before = [(config, config._attn_implementation) for config, _ in configs]
    try:
        for config, name in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


def set_attention(family: Family, core: Any, *, language: str, vision: str) -> None:
    """Change the attention functions permanently, so that checkpointing recomputes layers with the same ones.

    The whole model's own forward (and so ``generate``) keeps its previous attention, masks and padding included.
    """
    own = family.parts(core).language.config._attn_implementation
    if own == language:
        return
    for config, name in _named(family, core, language, vision):
        config._attn_implementation = name

    @wraps(type(core).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with attention(family, self, language=own):
            return type(self).forward(self, *args, **kwargs)

    core.forward = MethodType(forward, core)


def _named(family: Family, core: Any, language: str | None, vision: str | None) -> list[tuple[Any, str]]:
    """Configs to change, each with its new function's name. A tower without a config of its own has no attention."""
    parts = family.parts(core)
    wanted = [(getattr(parts.vision, "config", None), vision), (parts.language.config, language)]
    return [(config, name) for config, name in wanted if config is not None and name is not None]
