"""Row layouts of other trainers: each is recognised by its columns and read into the same structure.

- **EasyR1**: ``images, problem, answer``
- **verl**: ``prompt`` (messages), ``images``, ``reward_model.ground_truth``; also ``data_source``, ``extra_info``
- **ms-swift**: ``messages, images``, and ``objects`` (``ref``, ``bbox``, ``bbox_type``), ``solution``, or the last turn
- **TRL**: ``prompt`` (text or messages), ``image`` or ``images``, ``solution``
- **VLM-R1 and LLaVA**: ``image, conversations`` (``from``, ``value``); the last ``gpt`` turn is the truth
- **Perception-R1 (PR1)**: ``image, problem``, ``solution`` or ``normalized_solution``

``<image>`` in a text marks the place of a picture; without it, the pictures come first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from fastrl.data.truth import read_truth
from fastrl.data.validate import Row, short

ROLES = MappingProxyType(
    {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
)
_TAG = re.compile(r"<image>\n?")
_OBJECT = re.compile(r"<ref-object>|<bbox>")
_BOX_TYPES = MappingProxyType({"real": "original", "norm1": "unit", "norm1000": "thousand"})


class Turn(NamedTuple):
    """One message; in its parts a picture is None."""

    role: str
    parts: tuple[str | None, ...]

    @property
    def text(self) -> str:
        """Its words."""
        return "".join(part for part in self.parts if part is not None).strip()


class Asked(NamedTuple):
    """A row read from any layout: the prompt, the truth, and their frame and task."""

    turns: list[Turn]
    truth: Any
    frame: str | None = None  # of the truth's coordinates, if the layout states it
    task: str | None = None  # if the layout states it


class Layout(NamedTuple):
    """A row layout."""

    name: str
    columns: tuple[str, ...]  # recognised if all of these are present
    read: Callable[[Row], Asked | None]  # None: see the row's problems


def recognise(columns: Collection[str]) -> Layout | None:
    """The first layout whose columns are all there."""
    return next((layout for layout in LAYOUTS if all(name in columns for name in layout.columns)), None)


def _easy_r1(row: Row) -> Asked | None:
    asked = row.text("problem")
    return None if asked is None else Asked([_turn("user", asked)], _needed(row, "answer"))


def _pr1(row: Row) -> Asked | None:
    asked = row.text("problem")
    scaled = row.fields.get("solution") is None and row.fields.get("normalized_solution") is not None
    truth = _needed(row, "normalized_solution" if scaled else "solution")
    return None if asked is None else Asked([_turn("user", asked)], truth, "thousand" if scaled else None)


def _trl(row: Row) -> Asked | None:
    turns = _turns(row, "prompt")
    return None if turns is None else Asked(turns, _needed(row, "solution"))


def _verl(row: Row) -> Asked | None:
    turns, model = _turns(row, "prompt"), row.truth("reward_model")
    if not isinstance(model, Mapping) or "ground_truth" not in model:
        row.fail("missing field", f"reward_model must have a ground_truth, got {short(model)}")
        return None
    extra = row.truth("extra_info", {})
    task = extra.get("task") if isinstance(extra, Mapping) else None
    source = str(row.fields.get("data_source") or "")
    return None if turns is None else Asked(turns, model["ground_truth"], task=task or source.split("/")[0] or None)


def _conversations(row: Row) -> Asked | None:
    turns = _turns(row, "conversations", "from", "value")
    if turns is None:
        return None
    if row.fields.get("solution") is not None:
        return Asked(_before_answer(turns), row.fields["solution"])
    return _last_turn(row, turns, "conversations")


def _swift(row: Row) -> Asked | None:
    turns, objects = _turns(row, "messages"), row.truth("objects")
    if turns is None:
        return None
    if objects is not None:
        return _with_objects(row, turns, objects)
    if row.fields.get("solution") is not None:
        return Asked(_before_answer(turns), row.fields["solution"])
    return _last_turn(row, turns, "messages")


LAYOUTS: tuple[Layout, ...] = (
    Layout("verl", ("prompt", "reward_model"), _verl),
    Layout("ms-swift", ("messages",), _swift),
    Layout("VLM-R1 or LLaVA conversations", ("conversations",), _conversations),
    Layout("TRL", ("prompt", "solution"), _trl),
    Layout("EasyR1", ("problem", "answer"), _easy_r1),
    Layout("Perception-R1", ("problem", "solution"), _pr1),
    Layout("Perception-R1", ("problem", "normalized_solution"), _pr1),
)


# ---- turns


def _needed(row: Row, name: str) -> Any:
    if name not in row.fields:
        row.fail("missing field", f"no {name}: it is the truth of this row")
    return row.fields.get(name)


def _turn(role: str, text: str) -> Turn:
    """A text whose ``<image>`` tags are pictures."""
    parts: list[str | None] = []
    for number, piece in enumerate(_TAG.split(text)):
        if number:
            parts.append(None)
        if piece:
            parts.append(piece)
    return Turn(role, tuple(parts))


def _turns(row: Row, name: str, role: str = "role", content: str = "content") -> list[Turn] | None:
    """The messages of a column: a list of them, or the text of one user turn."""
    value = row.fields.get(name)
    value = read_truth(value) if isinstance(value, str) and value.lstrip().startswith("[{") else value
    if isinstance(value, str) and value.strip():
        return [_turn("user", value.strip())]
    if not isinstance(value, list) or not value:
        row.fail("wrong type", f"{name} must be a list of messages or a text, got {short(value)}")
        return None
    turns = []
    for place, entry in enumerate(value):
        who = ROLES.get(str(entry.get(role))) if isinstance(entry, Mapping) else None
        parts = _parts(entry.get(content)) if isinstance(entry, Mapping) else None
        if who is None or parts is None:
            row.fail("wrong type", f"{name}[{place}] must have {role} and {content}, got {short(entry)}")
            return None
        turns.append(Turn(who, parts))
    return turns


def _parts(content: Any) -> tuple[str | None, ...] | None:
    """Texts and pictures (None) of a message's content: a text with tags, or a list of typed parts."""
    if not isinstance(content, list):
        value = "" if content is None else content
        text = value if isinstance(value, str) else repr(value)  # a truth may stand here as a list or a number
        return _turn("", text.strip()).parts
    if content and all(isinstance(v, int | float) for v in content):
        return (repr(content),)
    parts: list[str | None] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            parts.append(None)
        elif kind == "text" and isinstance(part.get("text"), str):
            parts += _turn("", part["text"]).parts
        else:
            return None
    return tuple(parts)


def _before_answer(turns: list[Turn]) -> list[Turn]:
    """The prompt: the turns without an answer at the end."""
    return turns[:-1] if turns[-1].role == "assistant" else turns


def _last_turn(row: Row, turns: list[Turn], name: str) -> Asked | None:
    if turns[-1].role != "assistant" or len(turns) < 2:
        row.fail("missing field", f"{name} must end with the answer (the truth), or the row must have a solution")
        return None
    return Asked(turns[:-1], turns[-1].text)


# ---- ms-swift's objects


def _with_objects(row: Row, turns: list[Turn], objects: Any) -> Asked | None:
    """The prompt with its placeholders filled in; the truth is the boxes that the prompt does not use."""
    refs, boxes = (objects.get(key) for key in ("ref", "bbox")) if isinstance(objects, Mapping) else (None, None)
    refs = [] if refs is None else refs
    if not isinstance(refs, list) or not isinstance(boxes, list) or not all(isinstance(r, str) for r in refs):
        row.fail("wrong type", f"objects must have lists ref (texts) and bbox, got {short(objects)}")
        return None
    kind = objects.get("bbox_type") or "real"
    if not isinstance(kind, str) or kind not in _BOX_TYPES:
        row.fail("wrong type", f"objects.bbox_type must be one of {', '.join(_BOX_TYPES)}, got {short(kind)}")
        return None
    prompt = _before_answer(turns)
    left = {"<ref-object>": [*refs], "<bbox>": [*boxes]}
    filled = []
    for turn in prompt:
        parts = tuple(part if part is None else _fill(row, part, left) for part in turn.parts)
        filled.append(Turn(turn.role, parts))
    if row.problems:
        return None
    truth = left["<bbox>"]
    if not truth and prompt is not turns and turns[-1].text:  # boxes are in the question: it asks for a text
        return Asked(filled, turns[-1].text)
    # One name for all boxes, or one for each; those left by the prompt come first in the answer.
    names = left["<ref-object>"] if len(left["<ref-object>"]) == len(truth) else refs
    names = [*names] * len(truth) if len(names) == 1 else names
    if names and len(names) != len(truth):
        row.fail("different lengths", f"objects has {len(truth)} boxes for the answer and {len(names)} names")
        return None
    items = [
        {"bbox": box, **({"label": name} if names else {})} for box, name in zip(truth, names or truth, strict=True)
    ]
    return Asked(filled, items[0] if len(items) == 1 else items, _BOX_TYPES[kind])


def _fill(row: Row, text: str, left: Mapping[str, list[Any]]) -> str:
    def value(match: re.Match[str]) -> str:
        if not left[match.group()]:
            row.fail("different lengths", f"the prompt has more {match.group()} than objects fill")
            return ""
        return str(left[match.group()].pop(0))

    return _OBJECT.sub(value, text)


def content_of(turns: Sequence[Turn], images: int) -> tuple[Mapping[str, Any], ...] | None:
    """Turns as a record's messages; None if their number of pictures is not ``images``."""
    places = sum(part is None for turn in turns for part in turn.parts)
    if places not in (0, images):
        return None
    messages = []
    missing = images if places == 0 else 0  # the pictures of a prompt that does not place them come first
    for turn in turns:
        parts: list[Mapping[str, Any]] = []
        if turn.role == "user":
            parts += [{"type": "image"}] * missing
            missing = 0
        parts += [{"type": "image"} if part is None else {"type": "text", "text": part} for part in turn.parts]
        messages.append({"role": turn.role, "content": parts})
    return tuple(messages)
