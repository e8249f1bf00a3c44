"""A registry: names to what they stand for, open to a user's own entries."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping that grows by :meth:`add`. ``noun`` is what an entry is called in messages."""

    def __init__(self, noun: str, entries: Mapping[str, T] | None = None) -> None:
        self.noun = noun
        self._entries: dict[str, T] = dict(entries or {})

    def add(self, name: str, entry: T) -> None:
        """Add an entry; the same one again changes nothing.

        Raises:
            ValueError: the name is empty, no string, or stands for something else already.
        """
        self.check(name, entry)
        self._entries.setdefault(name, entry)

    def check(self, name: str, entry: T) -> None:
        """Raise what :meth:`add` would, and change nothing."""
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"a {self.noun} needs a name, got {name!r}")
        held = self._entries.get(name, entry)
        if held is not entry and held != entry:
            raise ValueError(f"the {self.noun} {name!r} is {called(held)} already, it cannot be {called(entry)} too")

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def nearest(name: object, known: Iterable[str], *, cutoff: float = 0.4) -> str | None:
    """The known name most like ``name``; None where none is alike."""
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)), None)


def called(entry: object) -> str:
    """How a message names a class or function: where it was defined; anything else, what it is."""
    name = getattr(entry, "__qualname__", None)
    return f"{entry.__module__}.{name}" if isinstance(name, str) else str(entry)
