"""Which attention function a model's language and vision layers call: the one place where that is changed.

Ours are registered with transformers by name and without a mask function, so that no family builds a mask for them:
what a token may see travels in keywords (``fastrl_segments``, ``fastrl_cache``, ``fastrl_probe``).
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
    """Let transformers find attention functions under these names."""
    from transformers import AttentionInterface

    for name, function in functions.items():
        AttentionInterface.register(name, function)


@contextmanager
def attention(family: Family, core: Any, *, language: str | None = None, vision: str | None = None) -> Iterator[None]:
    """Inside, the layers of a part call the function of that name; None: as before."""
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
    """For good: also what checkpointing computes again in a backward. The whole model's own forward (and with it
    ``generate``) goes on to attend as it did, masks and padding included."""
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
    """Configs whose attention is to change, and its name. A tower without a config of its own has no attention."""
    parts = family.parts(core)
    wanted = [(getattr(parts.vision, "config", None), vision), (parts.language.config, language)]
    return [(config, name) for config, name in wanted if config is not None and name is not None]
