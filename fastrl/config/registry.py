"""A registry of named entries to which users can add their own."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping extended by :meth:`add`. ``noun`` names an entry in messages."""

    def __init__(self, noun: str, entries: Mapping[str, T] | None = None) -> None:
        self.noun = noun
        self._entries: dict[str, T] = dict(entries or {})

    def add(self, name: str, entry: T) -> None:
        """Add an entry; adding the same one again has no effect.

        Raises:
            ValueError: the name is empty, not a string, or belongs to another entry.
        """
        self.check(name, entry)
        self._entries.setdefault(name, entry)

    def check(self, name: str, entry: T) -> None:
        """Raise the error that :meth:`add` would raise, without adding."""
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"a {self.noun} needs a name, got {name!r}")
        held = self._entries.get(name, entry)
        if held is not entry and held != entry:
            raise ValueError(f"the {self.noun} {name!r} is already {called(held)} and cannot also be {called(entry)}")

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def nearest(name: object, known: Iterable[str], *, cutoff: float = 0.4) -> str | None:
    """The known name most similar to ``name``; None if no name is similar."""
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)), None)


def called(entry: object) -> str:
    """How messages name an entry: a class or function by its full name, anything else by its string."""
    name = getattr(entry, "__qualname__", None)
    return f"{entry.__module__}.{name}" if isinstance(name, str) else str(entry)
