"""The keys of a recipe as ``docs/recipes.md`` lists them, from the sections themselves."""

from __future__ import annotations

from fastrl.methods import METHODS
from fastrl.recipe import key_tables


def tables() -> dict[str, dict[str, tuple[str, str, str]]]:
    """Section heading → key → (default, allowed values, meaning), each as a cell of a Markdown table."""
    own = {m.__name__ for m in METHODS.values() if m.__module__.startswith("fastrl.")}  # not a test's
    found = {}
    for name, keys in key_tables().items():
        kind, _, method = name.partition(": ")
        if not method or method in own:
            heading = f"`{kind}`: {method}" if method else name if " " in name else f"`{name}`"
            found[heading] = {f"`{key.path}`": (key.default, key.allowed, key.meaning) for key in keys}
    return found
