"""What a truth column says, however it is written: the one reader of all adapters.

A box may be a list, a numpy array out of a Parquet file, JSON text, or JSON text in ``<answer>`` tags, as the rows of
other trainers have it; all mean the same.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

MAX_CHARACTERS = 1 << 24  # of text that is looked at as JSON
_ANSWER = re.compile(r"\s*(?:<think>.*</think>)?\s*<answer>(.*)</answer>\s*", re.I | re.S)
_FENCE = re.compile(r"\s*```(?:json)?\s(.*)```\s*", re.I | re.S)


def unwrapped(text: str) -> str:
    """The text inside ``<answer>`` tags (a thought may stand before them), or the text itself."""
    match = _ANSWER.fullmatch(text)
    return match.group(1).strip() if match else text


def read_truth(value: Any) -> Any:
    """The value that a truth column holds.

    JSON text of a list, an object, a number or null (also inside ``<answer>`` tags or a ``json`` fence) gives that
    value, arrays (numpy, torch) give lists; any other text, broken JSON among it, comes back as it is, for a check to
    name.
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
