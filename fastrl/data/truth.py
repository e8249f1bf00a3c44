"""What a truth says, however it is written: the one reader of all adapters, of rows and of other trainers' columns.

A box may be a list, a numpy array out of a Parquet file, JSON text, JSON text in ``<answer>`` tags, or an object with
an entry for it, as the rows of other trainers have it; all mean the same. What is here knows shapes and types; whether
a box lies inside its picture is for ``validate.Row`` to say.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

MAX_CHARACTERS = 1 << 24  # longest text that is parsed as JSON
# Entries of an object, in any case; of several the first that is not null.
BOX_NAMES = ("bbox_2d", "bbox", "box")
POINT_NAMES = ("point_2d", "point", "points")
LABEL_NAMES = ("label", "name", "category", "class", "class_name", "category_name", "ref", "object")
_ANSWER = re.compile(r"\s*(?:<think>.*</think>)?\s*<answer>(.*)</answer>\s*", re.I | re.S)
_FENCE = re.compile(r"\s*```(?:json)?\s(.*)```\s*", re.I | re.S)


class TruthFault(ValueError):
    """What is wrong with a truth: a message that follows the name of its column, and ``kind``, a few words to count
    by."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


# ---- values


def unwrapped(text: str) -> str:
    """The text inside ``<answer>`` tags (a thought may stand before them), or the text itself."""
    match = _ANSWER.fullmatch(text)
    return match.group(1).strip() if match else text


def read_truth(value: Any) -> Any:
    """The value of a truth column.

    JSON text of a list, an object, a number or null (also inside ``<answer>`` tags or a ``json`` fence) gives that
    value, arrays (numpy, torch) give lists; any other text, including broken JSON, is returned unchanged, so that later
    checks name it.
    """
    if isinstance(value, str):
        text = unwrapped(value).strip()
        fenced = _FENCE.fullmatch(text)
        text = fenced.group(1).strip() if fenced else text
        if len(text) > MAX_CHARACTERS or not (text[:1] in ("[", "{", "-") or text[:1].isdigit() or text == "null"):
            return value
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return value
    return plain(value)


def plain(value: Any) -> Any:
    """Arrays and their scalars (numpy, torch), tuples and mappings as lists, numbers and dictionaries."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def whole_number(value: Any) -> int | None:
    """A count: an integer, or a float or text that is one (2.0, "2"); None for anything else."""
    value = read_truth(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return None


def read_id(value: Any) -> str | None:
    """What names a row: a text that is not empty, or a whole number (also as 7.0, which pandas makes of 7 in a column
    with gaps); None for anything else."""
    if isinstance(value, str):
        return value or None
    number = whole_number(value) if is_number(value) else None
    return None if number is None else str(number)


def is_empty(value: Any) -> bool:
    """Whether a table's cell holds nothing: null, NaN (which pandas writes for it), or blanks."""
    return (
        value is None or (isinstance(value, float) and value != value) or (isinstance(value, str) and not value.strip())
    )


def is_number(value: Any) -> bool:
    """A finite int or float; booleans and strings are not numbers."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of a float
        return False


def short(value: Any, limit: int = 80) -> str:
    """``repr`` cut to ``limit`` characters: how every message quotes a value that a user gave."""
    text = repr(value[:limit] if isinstance(value, str | bytes) else value)  # a picture's bytes are not written out
    cut = isinstance(value, str | bytes) and len(value) > limit
    return text if len(text) <= limit and not cut else text[: limit - 1] + "…"


def clipped(text: str, limit: int) -> str:
    """A text with its middle left out where it is longer than ``limit``: of a path, its end says most."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}…{text[len(text) - (limit - limit // 2 - 1) :]}"


def entry(value: Any, names: Sequence[str]) -> Any:
    """The entry of an object under the first of ``names``, in any case, that is not null; None: it has none."""
    if not isinstance(value, Mapping):
        return None
    found = {str(key).casefold(): item for key, item in value.items() if item is not None}
    return next((found[name] for name in names if name in found), None)


# ---- boxes, points, names


def box_value(value: Any) -> Any:
    """What stands for a box, taken out of what is around it: an object with an entry for it, a list of one box."""
    value = read_truth(value)
    if isinstance(value, list) and len(value) == 1:
        value = read_truth(value[0])
    inside = entry(value, BOX_NAMES)
    return value if inside is None else read_truth(inside)


def read_box(value: Any) -> tuple[float, float, float, float]:
    """Four finite numbers. Raises ``TruthFault``."""
    value = box_value(value)
    if not isinstance(value, list) or len(value) != 4:
        raise TruthFault("wrong type", f"must be four numbers [x1, y1, x2, y2], got {short(value)}")
    if not all(is_number(v) for v in value):
        raise TruthFault("not a number", f"must be four finite numbers, got {short(value)}")
    return float(value[0]), float(value[1]), float(value[2]), float(value[3])


def read_points(value: Any) -> list[tuple[float, float]]:
    """Points: ``{"x": [...], "y": [...]}``, a list of ``{"x": ..., "y": ...}``, of ``{"point_2d": [x, y]}`` or of
    pairs. Raises ``TruthFault``."""
    value = read_truth(value)
    pairs: list[Any] = [None]
    if isinstance(value, Mapping):
        xs, ys = entry(value, ("x",)), entry(value, ("y",))
        if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
            raise TruthFault("wrong type", f"must have lists x and y of one length, got {short(value)}")
        pairs = [[x, y] for x, y in zip(xs, ys, strict=True)]
    elif isinstance(value, list):
        pairs = [_pair(item) for item in value]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        message = f"must be {{x: [...], y: [...]}}, or a list of {{x, y}} or [x, y]; got {short(value)}"
        raise TruthFault("wrong type", message)
    for pair in pairs:
        if not all(is_number(v) for v in pair):
            raise TruthFault("not a number", f"must hold points of two finite numbers, got {short(pair)}")
    return [(float(x), float(y)) for x, y in pairs]


def _pair(item: Any) -> Any:
    item = read_truth(item)
    if not isinstance(item, Mapping):
        return item
    inside = entry(item, POINT_NAMES)
    return [entry(item, ("x",)), entry(item, ("y",))] if inside is None else read_truth(inside)


def read_list(value: Any, what: str = "a list") -> list[Any]:
    """A list. Raises ``TruthFault``."""
    value = read_truth(value)
    if not isinstance(value, list):
        raise TruthFault("wrong type", f"must be {what}, got {short(value)}")
    return value


def read_names(value: Any) -> list[str]:
    """A list of texts. Raises ``TruthFault``."""
    names = read_list(value, "a list of names")
    if not all(isinstance(name, str) for name in names):
        raise TruthFault("wrong type", f"must be a list of names, got {short(names)}")
    return names


def read_count(value: Any) -> int:
    """A whole number of at least 0; 2.0 and "2" are 2. Raises ``TruthFault``."""
    number = whole_number(value)
    if number is None or number < 0:
        raise TruthFault("wrong type", f"must be a whole number of at least 0, got {short(value)}")
    return number


# ---- a whole truth in one value


# Of targets that are no single value; what ``Record`` calls them.
_FIELDS = {"counting": ("count", "points", "boxes", "label"), "detection": ("boxes", "labels", "crowd", "categories")}


def fields_of(task: str, value: Any) -> dict[str, Any]:
    """The fields of a target that one value stands for: a box; a number, points or boxes for counting; a list of
    labelled boxes for detection; an object of such fields. What they hold is not checked."""
    value = read_truth(value)
    if task == "grounding":
        inside = value[0] if isinstance(value, list) and len(value) == 1 else value
        label = entry(inside, LABEL_NAMES)
        return {"box": value, **({"expression": label} if isinstance(label, str) and label.strip() else {})}
    if isinstance(value, Mapping):
        own = {name: value[name] for name in _FIELDS.get(task, ()) if value.get(name) is not None}
        if own.keys() - {"label"}:
            return own
        value = value if task == "counting" and entry(value, BOX_NAMES) is None else [value]  # one item
    if task == "counting" and isinstance(value, list | Mapping):
        boxes = isinstance(value, list) and value and all(_is_box(item) for item in value)
        return {"boxes": [box_value(item) for item in value]} if boxes else {"points": value}
    if task == "detection" and isinstance(value, list):
        return {
            "boxes": [box_value(item) for item in value],
            "labels": [entry(item, LABEL_NAMES) for item in value],
        }
    return {{"counting": "count", "detection": "boxes", "trajectory": "tracks"}.get(task, "text"): value}


def _is_box(item: Any) -> bool:
    return entry(item, BOX_NAMES) is not None or (isinstance(item, list) and len(item) == 4)
