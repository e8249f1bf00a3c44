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
    parts = family.parts(core)
    configs = [(parts.language.config, language), (parts.vision.config, vision)]
    before = [(config, config._attn_implementation) for config, name in configs if name is not None]
    try:
        for config, name in configs:
            if name is not None:
                config._attn_implementation = name
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


def set_attention(family: Family, core: Any, *, language: str, vision: str) -> None:
    """For good: also what checkpointing computes again in a backward. The whole model's own forward (and with it
    ``generate``) goes on to attend as it did, masks and padding included."""
    parts = family.parts(core)
    own = parts.language.config._attn_implementation
    if own == language:
        return
    parts.language.config._attn_implementation, parts.vision.config._attn_implementation = language, vision

    @wraps(type(core).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with attention(family, self, language=own):
            return type(self).forward(self, *args, **kwargs)

    core.forward = MethodType(forward, core)
