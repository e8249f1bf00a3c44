"""Model text → boxes and points. Model output is untrusted: nothing here raises, and time is linear in the text.

One rule for each notation, tried in this order (bare lists in the order of Perception-R1's released parser):

1. entries named as coordinates, in JSON or damaged JSON (``objects.py``): Qwen2.5-VL, Qwen3-VL, Gemma
2. ``<|box_start|>…<|box_end|>`` (Qwen2-VL) and ``<box>…</box>`` (InternVL), with the reference text before them
3. ``<point x="…" y="…">`` (Molmo), ``<loc0001>`` (PaliGemma)
4. ``[x1,y1,x2,y2]``   5. ``(x1,y1,x2,y2)``   6. ``[[x1,y1],[x2,y2]]``   7. ``(x1,y1),(x2,y2)``

docs/answers.md has the whole table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from decimal import Decimal

from fastrl.answers.items import MAX_ITEMS, Items, Parsed
from fastrl.answers.objects import Found, Value, read_objects
from fastrl.answers.pairs import BOX, PAIR, from_pairs
from fastrl.answers.scan import FOUR, GAP, NUMBER, REST, Scanner, clean_label, finite, number
from fastrl.answers.text import answer_region, strip_fence, strip_special_tokens, unescaped

# Names of entries, without case, blanks, "_" and "-"; of several in one object the first valid one is used.
Y_FIRST = "box2d"  # Gemma and Gemini write y before x under this name, in 0-1000
_ANY = ("coordinates", "coordinate", "coords", "position", "location")
BOX_KEYS = (
    "bbox2d",
    Y_FIRST,
    "bbox",
    "box",
    "bboxes",
    "boxes",
    "boundingbox",
    "boundingboxes",
    "bndbox",
    "rect",
    *_ANY,
)
POINT_KEYS = ("point2d", "point", "points", "points2d", "center", "centre", "keypoint", *_ANY)
LABEL_KEYS = (
    *("label", "name", "category", "class", "labels", "classname", "categoryname", "labelname", "object"),
    *("objectname", "objectclass", "objecttype", "objectlabel", "type", "cls", "tag", "ref", "phrase", "entity"),
    *("text", "textcontent", "title", "caption", "description", "desc", "expression", "subject", "item", "kind"),
)
# Further names of labels: class_label, object_category, predicted_class, obj_name, …
_LIKE_LABEL = re.compile(
    r"(?:predicted|pred|detected|gt|main|fine|coarse|item)?+"
    r"(?:(?:label|name|category|class|object|obj|cat|type|tag|entity|instance|thing|species|concept)+(?:text|title|str|string|s)?)"
)
SCORE_KEYS = (
    "score",
    "confidence",
    "confidencescore",
    "conf",
    "probability",
    "prob",
    "certainty",
    "scores",
    "confidences",
)
_CORNERS = (
    ("x0", "y0", "x1", "y1"),  # first, as here x1 is the second corner
    ("x1", "y1", "x2", "y2"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("left", "top", "right", "bottom"),
)
_CORNER_KEYS = frozenset(names[0] for names in _CORNERS)

_OPEN_CORNER = rf"\[\s*+({NUMBER}){GAP}({NUMBER})\s*+"
_CORNER = rf"{_OPEN_CORNER}\]"
_BOXES = (
    ("brackets", re.compile(rf"\[\s*+{FOUR}{REST}(?:\]|\Z)")),
    ("parens", BOX),
    ("corners", re.compile(rf"\[\s*+{_CORNER}{GAP}{_OPEN_CORNER}(?:\]{REST}(?:\]|\Z)|\Z)")),
)
_BOXES_AND_POINTS = tuple(
    (
        name,
        re.compile(rf"{opening}\s*+({NUMBER}){GAP}({NUMBER})(?:{GAP}({NUMBER}){GAP}({NUMBER}){REST}{end}|{close})"),
    )
    for name, opening, end, close in (
        ("brackets", r"\[", r"(?:\]|\Z)", r"\s*+\]"),
        ("parens", r"\(", r"(?:\)|\Z)", r"\s*+\)"),
    )
)
_MARKED = re.compile(r"\A[\[\](),;\s]*+" + r"[\[\](),;\s]++".join([f"({NUMBER})"] * 4) + r"[\[\](),;\s]*+\Z")
_BRACKET_POINT = re.compile(_CORNER)
_MARK = re.compile(
    r"<\|(?P<qwen>object_ref_start|object_ref_end|box_start|box_end)\|>|<(?P<intern>/?(?:ref|box))>", re.IGNORECASE
)
_OPENS = {"object_ref_start": "ref", "ref": "ref", "box_start": "box", "box": "box"}
_POINT_TAG = re.compile(r"<points?+\b(?P<inside>(?:[^<]++|<(?!/?+point))*+)", re.IGNORECASE)  # and the text behind it
_POINT_NUMBER = re.compile(rf"\b([xy])([0-9]{{0,6}}+)\s*+=\s*+[\"'“”]?+\s*+({NUMBER})", re.IGNORECASE)
_ALT = re.compile(r"\balt\s*+=\s*+(?:\"([^\"]*+)|'([^']*+))", re.IGNORECASE)
_LOCS = re.compile(r"(?P<locs>(?:<loc[0-9]{4}>\s*+)++)(?:<seg[0-9]{3}>\s*+)*+(?P<label>[^<;]*+)", re.IGNORECASE)
_LOC = re.compile(r"[0-9]{4}")
_SAYS_Y_FIRST = re.compile(r"(?<![a-z])box[_ -]?2d", re.IGNORECASE)


def parse_boxes(text: str, max_items: int = MAX_ITEMS) -> Parsed:
    """Boxes of a model's answer, at most ``max_items``, in the text's order and numbers.

    Malformed items (non-finite or huge numbers, strings or booleans as coordinates, wrong length) are left out and
    counted in ``dropped``; those before and after them stay. Inverted corners are returned as written.
    """
    return parse_scanned(Scanner(unescaped(answer_region(text))), max_items, points=False)


def parse_points(text: str, max_items: int = MAX_ITEMS) -> Parsed:
    """Points of a model's answer (``item.point``), like ``parse_boxes``; a box gives its centre.

    If both readings are possible, as in ``(1,2),(3,4)``, it is read as boxes if all items are, as in counting answers.
    ``(1,2),(3,4),(5,6)`` is three points.
    """
    return parse_scanned(Scanner(unescaped(answer_region(text))), max_items, points=True)


def parse_scanned(scan: Scanner, max_items: int, *, points: bool) -> Parsed:
    """``parse_boxes`` or ``parse_points`` of an answer region; ``scan.visited`` measures the work done."""
    dropped, keyed = 0, False
    for read in (_from_objects, _from_marks, _from_point_tags, _from_locations, _from_bare):
        scan.position = 0
        parsed = read(scan, max_items, points)
        dropped += parsed.dropped
        keyed = keyed or (read is _from_objects and parsed.dropped > 0)
        if parsed.items or parsed.format in ("qwen2", "internvl"):
            return _special(scan.text, replace(parsed, dropped=dropped))
    empty = strip_fence(strip_special_tokens(scan.text)).strip()
    is_empty = len(empty) <= 64 and re.fullmatch(r"\[\s*+\]", empty) is not None
    return Parsed(format="json" if is_empty or keyed else None, dropped=dropped, empty=is_empty)


def _special(text: str, parsed: Parsed) -> Parsed:
    """Bare lists between GLM's answer tokens are GLM's format; ``box_2d`` entries have y first."""
    if parsed.format in ("brackets", "parens", "corners", "pairs"):
        if _SAYS_Y_FIRST.search(text) is not None:
            return replace(parsed, format="gemma", items=tuple(replace(i, coords=_swapped(i.coords)) for i in parsed))
        if "<|begin_of_box|>" in text:
            return replace(parsed, format="glm")
    return parsed


def _swapped(coords: tuple[float, ...]) -> tuple[float, ...]:
    """y, x, … → x, y, …"""
    return tuple(coords[i ^ 1] for i in range(len(coords)))


# 1. Entries named as coordinates


def _from_objects(scan: Scanner, max_items: int, points: bool) -> Parsed:
    keys = {**dict.fromkeys(BOX_KEYS, 4), **({key: 2 for key in POINT_KEYS if key not in BOX_KEYS} if points else {})}
    wanted = {*keys, *_CORNER_KEYS, *(("x",) if points else ())}
    found, stopped = read_objects(scan, wanted, max_items)
    result = Items(max_items)
    y_first = None
    for entry in found:
        coords, value, key = _coordinates(entry, keys, points)
        if entry.holds and coords == [None]:  # its items are the objects in it
            continue
        if y_first is None and any(c is not None for c in coords):
            y_first = key == Y_FIRST
        for place, each in enumerate(coords):
            if each is not None and key == Y_FIRST:
                each = _swapped(each)
            of = _each_its_own(entry, place, len(coords))
            result.add(each, "." if value.decimal else "", _label(of), _score(of))
    parsed = result.parsed("gemma" if y_first else "json")
    return replace(parsed, truncated=parsed.truncated or (stopped and bool(parsed.items)))


def _coordinates(entry: Found, keys: dict[str, int], points: bool) -> tuple[list[tuple[float, ...] | None], Value, str]:
    """Boxes or points of one object (None: a malformed one), the value they were read from, and its name."""
    values = entry.values
    for key, length in keys.items():
        if key in values:
            lists = _fitting(values[key].lists, key, length, points)
            if any(each is not None for each in lists):
                return lists, values[key], key
    named = [*_CORNERS, *((("x", "y"),) if points else ())]
    for names in named:
        scalars = [values[name].scalar for name in names if name in values]
        if len(scalars) == len(names) and None not in scalars:
            coords = tuple(value for value in scalars if value is not None)
            return [coords], Value(decimal=any(values[name].decimal for name in names)), names[0]
    return [None], Value(), ""


def _fitting(
    lists: Sequence[tuple[float, ...] | None], key: str, length: int, points: bool
) -> list[tuple[float, ...] | None]:
    """Lists of the right length; two corners are one box, and a name that fits both means points where they fit."""
    lengths = {length} if key not in _ANY else {4, 2} if points else {4}
    if length == 4 and not (points and key in _ANY) and len(lists) == 2 and all(n and len(n) == 2 for n in lists):
        first, second = lists
        return [(*(first or ()), *(second or ()))]
    return [each if each is not None and len(each) in lengths else None for each in lists]


def _each_its_own(entry: Found, place: int, n: int) -> Found:
    """The object of one of n boxes under one name: ``{"bboxes": [[…], …], "labels": ["a", …], "scores": [0.5, …]}``."""
    if n == 1:
        return entry
    values = {}
    for key, value in entry.values.items():
        numbers = value.lists[0] if len(value.lists) == 1 else None
        if len(value.texts) > 1:
            value = Value(texts=value.texts[place : place + 1] if len(value.texts) == n else ())
        elif numbers is not None and len(numbers) == n:
            value = Value(scalar=numbers[place])
        values[key] = value
    return Found(values, around=entry.around)


def _label(entry: Found) -> str | None:
    keys = (*LABEL_KEYS, *(key for key in entry.values if _LIKE_LABEL.fullmatch(key)))
    label = next((entry.values[k].text for k in keys if k in entry.values and entry.values[k].text), None)
    return label if label or entry.around is None else _label(entry.around)


def _score(entry: Found) -> float | None:
    for key in SCORE_KEYS:
        if key in entry.values:
            value = entry.values[key]
            return value.scalar if value.text is None else _share(value.text)
    return None


def _share(text: str) -> float | None:
    """A number, or one in per cent as a part of 1."""
    value = number(text.removesuffix("%"))
    return value / 100 if value is not None and text.endswith("%") else value


# 2. and 3. Marks around coordinates


def _from_marks(scan: Scanner, max_items: int, points: bool) -> Parsed:
    """Boxes between box tokens or tags; the reference text before them is their label."""
    result = Items(max_items)
    format: str | None = None
    label: str | None = None
    marks = _marks(scan, 32 * max_items + 1000)
    for i, (kind, style, start, _) in enumerate(marks):
        end = marks[i + 1][3] if i + 1 < len(marks) else len(scan.text)
        if kind == "ref":
            label = clean_label(scan.text[start:end])
        elif kind == "box":
            format = format or style
            inside = Scanner(scan.text[start:end])
            found = _from_bare(inside, max_items - len(result.items) + 1, points, marked=True)
            scan.visited += inside.visited
            result.dropped += found.dropped + (not found.items and not found.dropped)
            result.decimal = result.decimal or found.decimal
            for item in found.items:
                result.add(item.coords, label=label)
            if result.truncated:
                break
    if result.items or format is None:
        return result.parsed(format or "")
    # Marks present but the numbers lie elsewhere: the marks still say which frame the model writes in.
    scan.position = 0
    bare = _from_bare(scan, max_items, points)
    return replace(bare, format=format, dropped=result.dropped + bare.dropped)


def _marks(scan: Scanner, limit: int) -> list[tuple[str, str, int, int]]:
    """(ref, box or a closing, style, end, start) of the first marks of a text."""
    marks: list[tuple[str, str, int, int]] = []
    for match in scan.each(_MARK):
        name = (match["qwen"] or match["intern"]).lower()
        marks.append((_OPENS.get(name, ""), "qwen2" if match["qwen"] else "internvl", match.end(), match.start()))
        if len(marks) == limit:
            break
    return marks


def _from_point_tags(scan: Scanner, max_items: int, points: bool) -> Parsed:
    """Molmo's ``<point x= y= alt=>`` and ``<points x1= y1= x2= …>``: per cent of each side, given as 0-1."""
    result = Items(max_items)
    for tag in scan.each(_POINT_TAG) if points else ():
        alt = _ALT.search(scan.text, tag.start("inside"), tag.end("inside"))
        behind = scan.text[tag.start("inside") : tag.end("inside")].rpartition(">")[2]
        text = behind if alt is None else alt[1] or alt[2] or ""
        axes: dict[str, dict[str, str]] = {"x": {}, "y": {}}
        for match in _POINT_NUMBER.finditer(scan.plain, tag.start("inside"), tag.end("inside")):
            axes[match[1].lower()].setdefault(match[2], match[3])
        scan.visited += 2 * (tag.end("inside") - tag.start("inside"))
        for name in dict.fromkeys([*axes["x"], *axes["y"]]):
            pair = [_per_cent(axes[axis].get(name, "")) for axis in "xy"]
            coords = tuple(value for value in pair if value is not None)
            result.add(coords if len(coords) == 2 else None, ".", clean_label(text))
        if result.truncated:
            break
    return result.parsed("molmo")


def _per_cent(text: str) -> float | None:
    """63.5 → 0.635, as exact as 0.635 can be."""
    return None if number(text) is None else number(str(Decimal(text).scaleb(-2)))


def _from_locations(scan: Scanner, max_items: int, points: bool) -> Parsed:
    """PaliGemma's ``<locY1><locX1><locY2><locX2> label``: 1024 steps of each side, y first; given as 0-1, x first."""
    result = Items(max_items)
    for match in scan.each(_LOCS):
        steps = [int(step) / 1024 for step in _LOC.findall(match["locs"])]
        scan.visited += len(match["locs"])
        label = clean_label(scan.text[match.start("label") : match.end("label")])
        result.add(_swapped(tuple(steps)) if len(steps) == 4 else None, ".", label)
        if result.truncated:
            break
    return result.parsed("paligemma")


# 4. to 7. Numbers alone


def _from_bare(scan: Scanner, max_items: int, points: bool, marked: bool = False) -> Parsed:
    """Parse with the first notation that finds anything. ``marked``: the text is between box marks."""
    dropped = 0
    for read in _bare_readings(points, marked):
        scan.position = 0
        result = read(scan, max_items)
        dropped += result.dropped
        if result.items:
            return replace(result, dropped=dropped)
    return Parsed(dropped=dropped)


def _bare_readings(points: bool, marked: bool) -> Iterator[Callable[[Scanner, int], Parsed]]:
    whole = _BOXES_AND_POINTS if points and not marked else _BOXES
    for name, pattern in whole:
        if name == "parens":
            yield lambda scan, n: from_pairs(scan, n, points, marked, mixed=True)
        if points and not marked:
            yield lambda scan, n, name=name, pattern=pattern: _with_a_box(_each(scan, n, pattern, name))
        else:
            yield lambda scan, n, name=name, pattern=pattern: _each(scan, n, pattern, name)
    yield lambda scan, n: from_pairs(scan, n, points, marked)
    if marked:  # four numbers, whatever became of the commas and brackets
        yield lambda scan, n: _each(scan, n, _MARKED, "brackets")
    if points:
        yield lambda scan, n: _each(scan, n, _BRACKET_POINT, "brackets")
        yield lambda scan, n: _each(scan, n, PAIR, "parens")


def _each(scan: Scanner, max_items: int, pattern: re.Pattern[str], format: str) -> Parsed:
    result = Items(max_items)
    for match in scan.each(pattern):
        result.add(finite(match.groups()), match.group())
        if result.truncated:
            break
    return result.parsed(format)


def _with_a_box(parsed: Parsed) -> Parsed:
    """Boxes with points among them; without any box, another notation."""
    return parsed if any(len(item.coords) == 4 for item in parsed) else Parsed()
