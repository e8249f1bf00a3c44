"""Boxes as two pairs in parentheses, ``(1,2),(3,4)``: which pairs belong together, and what damage leaves of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from fastrl.answers.items import Item, Items, Parsed
from fastrl.answers.scan import FOUR, GAP, NUMBER, REST, Scanner, finite

PAIR = re.compile(rf"\(\s*+({NUMBER}){GAP}({NUMBER})\s*+(?:\)|\Z)")
BOX = re.compile(rf"\(\s*+{FOUR}{REST}(?:\)|\Z)")
_GROUP = re.compile(  # a pair, or a damaged one
    rf"(?:\([^()\[\]{{}}<>]{{1,200}}+\)?+|(?<![\w.,(\[]){NUMBER}(?:{GAP}{NUMBER})?+\s*+\))"
)
_GROUPS = re.compile(rf"{_GROUP.pattern}(?:(?:\s*+,\s*+|(?<![)\n])){_GROUP.pattern})*+")


@dataclass(frozen=True)
class _Run:
    """Parentheses after one another: two or four numbers each (None: something else), and whether a blank stands
    before each. ``single``: the number of those without four numbers is odd."""

    text: str
    start: int
    groups: list[tuple[float, ...] | None]
    blanks: list[bool]
    single: bool

    @property
    def end(self) -> int:
        return self.start + len(self.text)

    def chunks(self) -> list[tuple[float, ...] | None]:
        """The box of each part between blanks; None: the part is no box."""
        parts: list[list[tuple[float, ...] | None]] = []
        for group, blank in zip(self.groups, self.blanks, strict=True):
            if blank or not parts:
                parts.append([])
            parts[-1].append(group)
        return [_box_of(part) for part in parts]

    def boxes(self) -> list[tuple[float, ...] | None]:
        """Boxes of two pairs, or of four numbers. A single damaged one among pairs that would not come out even
        stands for a whole box."""
        whole = self.single and self.groups.count(None) == 1
        boxes: list[tuple[float, ...] | None] = []
        waiting: list[tuple[float, ...] | None] = []
        for group in self.groups:
            if (group is None and whole) or (group is not None and len(group) == 4):
                boxes += [None] * bool(waiting) + [group]
                waiting = []
            else:
                waiting.append(group)
                if len(waiting) == 2:
                    boxes.append(_box_of(waiting))
                    waiting = []
        return boxes

    @property
    def even(self) -> bool:
        """Nothing is left when two pairs make a box."""
        return not self.single or self.groups.count(None) == 1


def from_pairs(scan: Scanner, max_items: int, points: bool, marked: bool, *, mixed: bool = False) -> Parsed:
    """Boxes as two pairs each. A run of pairs that are not all boxes is points (two between marks are always a box).
    Among them, four numbers are a box, too; ``mixed``: nothing is read unless both occur.

    A model that puts blanks between boxes and none inside them, as in ``(1,2),(3,4), (5,6),(7,8)``, has said which
    pairs belong together, so that damage to one box cannot move the others.
    """
    result = Items(max_items)
    runs = list(islice(_runs(scan, max_items), max_items + 1))
    quads = sum(len(group) == 4 for run in runs for group in run.groups if group is not None)
    if mixed and not quads:
        return Parsed()
    chunks = [run.chunks() for run in runs]
    spaced = _says_with_blanks(runs, chunks, points)
    for run, parts in zip(runs, chunks, strict=True):
        boxes = parts if spaced else run.boxes()
        certain = spaced or (len(run.groups) == 2 and (marked or not points))
        if not certain and (not run.even or any(box is not None and Item(box).inverted for box in boxes)):
            if points:
                return Parsed()  # in one answer all are points
            boxes = [] if all(run.groups) else [None]
        for box in boxes:
            result.add(box, run.text)
        if result.truncated:
            break
    parsed = result.parsed("pairs")
    return Parsed() if mixed and not _one_list(scan, runs, len(parsed) - quads, quads) else parsed


def _one_list(scan: Scanner, runs: list[_Run], pairs: int, quads: int) -> bool:
    """Whether boxes of four numbers are damaged ones of a list of pairs, and not another notation behind some words."""
    between = "".join(scan.text[a.end : b.start] for a, b in pairwise(runs))
    return pairs > quads or (pairs == quads and not any(character.isalpha() for character in between))


def _runs(scan: Scanner, max_items: int) -> Iterator[_Run]:
    """The runs with numbers; the others are prose in parentheses."""
    for run in scan.each(_GROUPS):
        text = run.group()
        scan.visited += len(text)
        groups: list[tuple[float, ...] | None] = []
        blanks: list[bool] = []
        others = end = 0
        for match in _GROUP.finditer(text):
            four = BOX.fullmatch(match.group()) is not None
            others += not four
            if len(groups) <= 2 * max_items + 1:  # what follows is only counted
                groups.append(_numbers_of(match.group(), BOX if four else PAIR))
                blanks.append(text[end : match.start()].strip(",") != "")
            end = match.start() + len(match.group().rstrip(", "))
        if any(groups):
            yield _Run(text, run.start(), groups, blanks, others % 2 == 1)


def _says_with_blanks(runs: list[_Run], chunks: list[list[tuple[float, ...] | None]], points: bool) -> bool:
    """Blanks stand before some pairs and not before others, and half of the parts between them (most of them, if
    they may as well be points) are boxes."""
    gaps = {blank for run in runs for blank in run.blanks[1:]}
    if len(gaps) < 2:
        return False
    boxes = [box is not None and not Item(box).inverted for parts in chunks for box in parts]
    return 2 * sum(boxes) > len(boxes) - (not points)


def _box_of(groups: Sequence[tuple[float, ...] | None]) -> tuple[float, ...] | None:
    """Two pairs, or four numbers."""
    values = [value for group in groups if group is not None for value in group]
    return None if None in groups or len(values) != 4 else tuple(values)


def _numbers_of(group: str, pattern: re.Pattern[str]) -> tuple[float, ...] | None:
    match = pattern.match(group)
    return None if match is None else finite(match.groups())
