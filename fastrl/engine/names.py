"""Patterns for parameter names in recipes: for learning rates, freezing and modules trained in addition to adapters."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable


def unchanged(name: str) -> str:
    """The alias function of a model whose parts have no names."""
    return name


def matches(pattern: str, name: str, alias: Callable[[str], str] = unchanged) -> bool:
    """Whether a pattern matches a parameter: a glob over its full name, or consecutive components of it.

    ``alias`` replaces the prefix of a name by the name of its part (``vision``, ``projector``, ``language``). Patterns
    that begin with the name of a part are also compared with the alias; all others only with the full name, so that
    ``*proj*`` does not match the projector.
    """
    if _fits(pattern, name):
        return True
    other = alias(name)
    return other != name and pattern.partition(".")[0] == other.partition(".")[0] and _fits(pattern, other)


def _fits(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."
