"""Model text → boxes and points. Model output is untrusted: nothing here raises, and time is linear in the text.

How that is kept: number tokens are bounded in length; every pattern is possessive and holds its opening bracket only at
its start, so no character is looked at more than a constant number of times; JSON is read by one scanner with a
bounded stack instead of a recursive decoder; an unterminated string ends the scan.

Spellings, in the order they are tried (the bare three in the order of Perception-R1's released parser):

1. JSON objects with ``bbox_2d`` (Qwen2.5-VL), alone, in a list, fenced, or cut short: complete objects count
2. ``<|box_start|>(x1,y1),(x2,y2)<|box_end|>`` (Qwen2-VL), the reference text before it being its label
3. ``[x1,y1,x2,y2]``   4. ``(x1,y1,x2,y2)``   5. ``(x1,y1),(x2,y2)``
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import overload

from fastrl.answers.text import answer_region, strip_fence, strip_special_tokens

MAX_ITEMS = 1000  # far above what fits a real answer; bounds the matching that follows
MAX_LABEL = 1000  # characters
BOX_KEYS = ("bbox_2d", "bbox", "box")
POINT_KEYS = ("point_2d", "point")
LABEL_KEYS = ("label", "name", "category")
SCORE_KEYS = ("score", "confidence")

# Longer digit runs match nothing, which rejects them: no real coordinate needs them.
_NUMBER = r"[-+]?+(?:[0-9]{1,24}+(?:\.[0-9]{0,40}+)?+|\.[0-9]{1,40}+)(?:[eE][-+]?+[0-9]{1,6}+)?+"
_GAP = r"\s*+,\s*+"
_PAIR = rf"\(\s*+({_NUMBER}){_GAP}({_NUMBER})\s*+\)"
_FOUR = _GAP.join([f"({_NUMBER})"] * 4)
_BARE_BOXES = (
    ("brackets", re.compile(rf"\[\s*+{_FOUR}\s*+\]")),
    ("parens", re.compile(rf"\(\s*+{_FOUR}\s*+\)")),
    ("pairs", re.compile(rf"{_PAIR}\s*+,\s*+{_PAIR}")),
)
_BARE_POINTS = (
    ("brackets", re.compile(rf"\[\s*+({_NUMBER}){_GAP}({_NUMBER})\s*+\]")),
    ("parens", re.compile(_PAIR)),
)
_STRING = r""""(?:[^"\\]++|\\.)*+"|'(?:[^'\\]++|\\.)*+'"""
_NUMBERS = rf"\[\s*+{_NUMBER}(?:{_GAP}{_NUMBER}){{1,7}}+\s*+\]"
_TOKEN = re.compile(
    rf"(?P<open>\{{(?:\s*+\{{)*+)|(?P<close>\}}(?:\s*+\}})*+)"
    rf"|(?P<key>{_STRING})\s*+:\s*+(?:(?P<numbers>{_NUMBERS})|(?P<text>{_STRING})|(?P<number>{_NUMBER}(?=[\s,}}]))|)"
    rf"|(?P<string>{_STRING})|(?P<broken>[\"'])",
    re.DOTALL,
)
_QWEN2_TOKEN = re.compile(r"<\|(object_ref_start|object_ref_end|box_start|box_end)\|>")
_MAX_DEPTH = 32


@dataclass(frozen=True, slots=True)
class Item:
    """One parsed box or point, in the text's own numbers (all finite; corners as written, not sorted)."""

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
    """What a text holds: a sequence of ``Item`` plus how it was written."""

    items: tuple[Item, ...] = ()
    format: str | None = None  # json | qwen2 | brackets | parens | pairs; None: nothing recognised
    decimal: bool = False  # at least one coordinate is written with a decimal point
    dropped: int = 0  # items that looked like boxes and were malformed
    truncated: bool = False  # more than max_items were found
    empty: bool = False  # the answer is an empty JSON list: "there is none", said properly

    @property
    def parsable(self) -> bool:
        """The text holds at least one item, or says properly that there is none."""
        return bool(self.items) or self.empty

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Item, ...]: ...
    def __getitem__(self, index: int | slice) -> Item | tuple[Item, ...]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


def parse_boxes(text: str, max_items: int = MAX_ITEMS) -> Parsed:
    """Boxes of a model's answer, at most ``max_items``, in the order and the numbers they are written in.

    Malformed items (non-finite or huge numbers, strings or booleans as coordinates, wrong length) are left out and
    counted in ``dropped``; those before and after them stay. Inverted corners are returned as written.
    """
    return _parse(text, max_items, points=False)


def parse_points(text: str, max_items: int = MAX_ITEMS) -> Parsed:
    """Points of a model's answer (``item.point``), as ``parse_boxes``; a box stands for its centre.

    Where both readings are possible, as in ``(1,2),(3,4)``, the box is taken: that is how counting answers are written.
    """
    return _parse(text, max_items, points=True)


def _parse(text: str, max_items: int, points: bool) -> Parsed:
    text = answer_region(text)
    parsed = _from_json(text, max_items, points)
    if parsed.items:
        return parsed
    if "<|box_start|>" in text:
        return _from_qwen2(text, max_items, points)
    bare = _from_bare(text, max_items, points)
    if bare.items:
        return bare
    empty = strip_fence(strip_special_tokens(text)).strip()
    is_empty = len(empty) <= 64 and re.fullmatch(r"\[\s*+\]", empty) is not None
    return Parsed(
        format="json" if is_empty or parsed.dropped else None, dropped=parsed.dropped + bare.dropped, empty=is_empty
    )


def _tokens_for(max_items: int) -> int:
    """Tokens worth reading: an item takes about six, the rest is room for objects without coordinates."""
    return 32 * max_items + 1000


def _coords(raw: Sequence[str]) -> tuple[float, ...] | None:
    values = tuple(float(v.strip()) for v in raw)  # \s spans \x1c to \x1f, which float() does not skip
    return values if all(math.isfinite(v) for v in values) else None


def _from_bare(text: str, max_items: int, points: bool) -> Parsed:
    patterns = _BARE_BOXES + _BARE_POINTS if points else _BARE_BOXES
    dropped = 0
    for name, pattern in patterns:
        items: list[Item] = []
        decimal = False
        for match in pattern.finditer(text):
            coords = _coords(match.groups())
            if coords is None:
                dropped += 1
                continue
            if len(items) == max_items:
                return Parsed(tuple(items), name, decimal, dropped, truncated=True)
            items.append(Item(coords))
            decimal = decimal or "." in match.group()
        if items:
            return Parsed(tuple(items), name, decimal, dropped)
    return Parsed(dropped=dropped)


def _from_qwen2(text: str, max_items: int, points: bool) -> Parsed:
    """Boxes between box tokens; the reference text before them is their label."""
    items: list[Item] = []
    decimal, dropped, label = False, 0, None
    found_tokens = islice(_QWEN2_TOKEN.finditer(text), _tokens_for(max_items))
    tokens = [(m.group(1), m.start(), m.end()) for m in found_tokens]
    for i, (kind, _, start) in enumerate(tokens):
        end = tokens[i + 1][1] if i + 1 < len(tokens) else len(text)
        if kind == "object_ref_start":
            label = _clean_label(text[start:end])
        elif kind == "box_start":
            found = _from_bare(text[start:end], max_items - len(items) + 1, points)
            dropped += found.dropped + (not found.items)
            decimal = decimal or found.decimal
            items += [Item(item.coords, label) for item in found.items]
            if len(items) > max_items:
                return Parsed(tuple(items[:max_items]), "qwen2", decimal, dropped, truncated=True)
    if items:
        return Parsed(tuple(items), "qwen2", decimal, dropped)
    # Tokens present but the numbers lie elsewhere: the tokens still say which frame the model writes in.
    bare = _from_bare(text, max_items, points)
    return Parsed(bare.items, "qwen2", bare.decimal, dropped + bare.dropped, bare.truncated)


def _from_json(text: str, max_items: int, points: bool) -> Parsed:
    items: list[Item] = []
    decimal, dropped = False, 0
    for fields in _objects(text, max_tokens=_tokens_for(max_items)):
        item, raw = _item(fields, points)
        if raw is None:
            continue
        if item is None:
            dropped += 1
            continue
        if len(items) == max_items:
            return Parsed(tuple(items), "json", decimal, dropped, truncated=True)
        items.append(item)
        decimal = decimal or "." in raw
    return Parsed(tuple(items), "json" if items else None, decimal, dropped)


def _item(fields: dict[str, str], points: bool) -> tuple[Item | None, str | None]:
    """The item of one JSON object and its coordinates' text; text None: no coordinates; item None: malformed ones."""
    keys = [(k, 4) for k in BOX_KEYS] + [(k, 2) for k in POINT_KEYS if points]
    raw = None
    for key, length in keys:
        if key not in fields:
            continue
        raw = fields[key]
        numbers = raw[1:-1].split(",") if raw.startswith("[") else []
        coords = _coords(numbers) if len(numbers) == length else None
        if coords is not None:
            label = next((_unquote(fields[k]) for k in LABEL_KEYS if fields.get(k, "")[:1] in ('"', "'")), None)
            return Item(coords, label, _score(fields)), raw
    return None, raw


def _score(fields: dict[str, str]) -> float | None:
    for key in SCORE_KEYS:
        raw = fields.get(key, "")
        if raw[:1].isdigit() or raw[:1] in ("-", "+", "."):
            value = float(raw)
            return value if math.isfinite(value) else None
    return None


def _objects(text: str, max_tokens: int) -> Iterator[dict[str, str]]:
    """Each complete JSON object, innermost first, as key → raw text of its value ("" for values of no interest here).

    Outside an object only ``{`` means anything, so an apostrophe in prose does no harm. A string that never ends ends
    the scan: what follows it cannot be told from its inside, and trying again from each quote would be quadratic.
    """
    stack: list[dict[str, str]] = []
    position = 0
    for _ in range(max_tokens):
        if not stack:
            position = text.find("{", position)
            if position < 0:
                return
        match = _TOKEN.search(text, position)
        if match is None or match.lastgroup == "broken":
            return
        position = match.end()
        if match["open"] is not None:
            if len(stack) == _MAX_DEPTH:
                del stack[0]
            stack.append({})  # "{{" is never JSON: a run of openings is one
        elif match["close"] is not None:
            for _ in range(min(match["close"].count("}"), len(stack))):
                yield stack.pop()
        elif match["key"] is not None and stack:
            stack[-1][_unquote(match["key"]) or ""] = match["numbers"] or match["text"] or match["number"] or ""


def _unquote(quoted: str) -> str | None:
    inside = quoted[1:-1][:MAX_LABEL]
    if "\\" in inside:
        body = inside.replace("\\'", "'")
        if quoted[0] == "'":
            body = body.replace('\\"', '"').replace('"', '\\"')
        with contextlib.suppress(ValueError):  # a broken escape: the characters stay as they stand
            inside = json.loads(f'"{body}"', strict=False)
    return _clean_label(inside)


def _clean_label(label: str) -> str | None:
    """Printable, bounded, stripped. Lone surrogates (which no file or terminal can take) become question marks."""
    label = label[:MAX_LABEL].encode("utf-8", "replace").decode("utf-8").strip()
    return label or None
