"""Which parameters a pattern of a recipe names: for learning rates, freezing and what is trained beside adapters."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable


def unchanged(name: str) -> str:
    """A model whose parts have no common words."""
    return name


def matches(pattern: str, name: str, alias: Callable[[str], str] = unchanged) -> bool:
    """Whether a pattern names a parameter: a glob over its full name, or a run of whole parts of it.

    ``alias`` gives the same name with the common word for the part it lies in (``vision``, ``projector``,
    ``language``) for a beginning. Patterns that begin with such a word are compared with it too; all others with the
    full name alone, so that ``*proj*`` does not come to mean the projector.
    """
    if _fits(pattern, name):
        return True
    other = alias(name)
    return other != name and pattern.partition(".")[0] == other.partition(".")[0] and _fits(pattern, other)


def _fits(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."
