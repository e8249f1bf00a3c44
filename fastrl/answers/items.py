"""What a text is read as: items with coordinates, and the notation that they were written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

MAX_ITEMS = 1000  # far more than in any real answer; bounds the cost of matching


@dataclass(frozen=True, slots=True)
class Item:
    """One parsed box or point, in the text's own numbers (all finite; x before y; corners as written, not sorted)."""

    coords: tuple[float, ...]  # (x1, y1, x2, y2) or (x, y)
    label: str | None = None
    score: float | None = None

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2); a point is a box without extent."""
        c = self.coords
        return (c[0], c[1], c[-2], c[-1])

    @property
    def point(self) -> tuple[float, float]:
        """(x, y): the point, or the centre of the box."""
        c = self.coords
        return (0.5 * (c[0] + c[-2]), 0.5 * (c[1] + c[-1]))

    @property
    def inverted(self) -> bool:
        """The second corner lies left of or above the first."""
        x1, y1, x2, y2 = self.box
        return x2 < x1 or y2 < y1


@dataclass(frozen=True)
class Parsed(Sequence[Item]):
    """The items of a text as a sequence, with the notation it was written in."""

    items: tuple[Item, ...] = ()
    # json | gemma | qwen2 | internvl | glm | molmo | paligemma | brackets | parens | corners | pairs; None: nothing
    format: str | None = None
    decimal: bool = False  # at least one coordinate is written with a decimal point
    dropped: int = 0  # items that looked like boxes and were malformed
    truncated: bool = False  # more than max_items were found
    empty: bool = False  # the answer is an empty JSON list, which states that there is none

    @property
    def parsable(self) -> bool:
        """Whether the text has at least one item, or is an explicit empty list."""
        return bool(self.items) or self.empty

    @property
    def unlabelled(self) -> int:
        """Number of items without a readable label."""
        return sum(item.label is None for item in self.items)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Item, ...]: ...
    def __getitem__(self, index: int | slice) -> Item | tuple[Item, ...]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


class Items:
    """Collects items up to a bound."""

    def __init__(self, max_items: int) -> None:
        self.items: list[Item] = []
        self.max_items, self.dropped, self.truncated, self.decimal = max_items, 0, False, False

    def add(
        self, coords: tuple[float, ...] | None, raw: str = "", label: str | None = None, score: float | None = None
    ) -> None:
        """Add an item, or count a malformed one (None)."""
        if coords is None:
            self.dropped += 1
        elif len(self.items) == self.max_items:
            self.truncated = True
        else:
            self.items.append(Item(coords, label, score))
            self.decimal = self.decimal or "." in raw

    def parsed(self, format: str) -> Parsed:
        items = tuple(self.items)
        return Parsed(items, format if items else None, self.decimal, self.dropped, self.truncated)
