"""Checks of records that a user's code made: ids, messages, pictures, and the truth by its task.

What a target holds is documented by ``Record``. Boxes and points have to lie in the first picture, in pixels, as those
of every row; fields of a user's own are not looked at, nor are targets of a task of the user's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastrl.data.pictures import Picture
from fastrl.data.records import Record
from fastrl.data.truth import read_list, read_names
from fastrl.data.validate import ImageFolder, Problem, Row, short

ROLES = ("system", "user", "assistant")
_OTHERWISE = frozenset({"list", "dialogue"})  # target keys of ranked answers and dialogues, which need no truth


def problems_of(record: Record, images: ImageFolder, where: str) -> list[Problem]:
    """What is wrong with a record, which is called ``where`` in messages; empty: nothing."""
    row = Row({}, where, 0, images)
    if not isinstance(record.id, str) or not record.id:
        row.fail("wrong type", f"id must be a non-empty string, got {short(record.id)}")
    if not isinstance(record.target, Mapping):
        row.fail("wrong type", f"target must be a mapping, got {short(record.target)}")
    places = _image_places(row, record.messages)
    size = _first_size(row, record.images)
    if row.problems:
        return row.problems
    if places != len(record.images):
        row.fail("image places", f"{len(record.images)} images, but the messages have {places} image places")
    if record.task in _TARGETS and not _OTHERWISE & set(record.target):
        _TARGETS[record.task](_Target(row, record.target, size))
    return row.problems


def _image_places(row: Row, messages: Any) -> int:
    """The number of places for pictures in chat messages, whose form is checked."""
    if not isinstance(messages, list | tuple) or not messages:
        row.fail("bad messages", f"messages must be a list of one or more turns, got {short(messages)}")
        return 0
    places = 0
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            roles = ", ".join(ROLES)
            row.fail("bad messages", f"turn {number} must have a role ({roles}) and a content, got {short(message)}")
            continue
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list | tuple) or not all(_is_part(part) for part in parts):
            allowed = 'a text, or a list of {"type": "image"} and {"type": "text", "text": …}'
            row.fail("bad messages", f"the content of turn {number} must be {allowed}; got {short(content)}")
            continue
        places += sum(part["type"] == "image" for part in parts)
    return places


def _is_part(part: Any) -> bool:
    if not isinstance(part, Mapping):
        return False
    return part.get("type") == "image" or (part.get("type") == "text" and isinstance(part.get("text"), str))


def _first_size(row: Row, images: Any) -> tuple[int, int] | None:
    """(width, height) of the first picture; all are checked."""
    if not isinstance(images, list | tuple):
        row.fail("wrong type", f"images must be a tuple, got {type(images).__name__}")
        return None
    sizes: list[tuple[int, int]] = []
    for number, image in enumerate(images):
        if not (isinstance(image, str | Path | Picture) or hasattr(image, "getexif")):
            message = f"image {number} must be a path or a PIL image, got {type(image).__name__} {short(image)}"
            row.fail("wrong type", message)
            continue
        path = isinstance(image, str | Path)
        header = row.images.header(Path(image)) if path else row.images.check(image, row.where)
        if isinstance(header, str):
            row.fail("missing image" if "not found" in header else "bad image", header)
        else:
            sizes.append(header.size)
    return sizes[0] if sizes else None


class _Target:
    """The target of one record, read field by field."""

    def __init__(self, row: Row, fields: Mapping[str, Any], size: tuple[int, int] | None) -> None:
        self.row, self.fields, self.size = row, fields, size

    def given(self, name: str, *, needed: bool = False) -> Any:
        """A field, None if it is missing, which is a problem if it is needed."""
        value = self.fields.get(name)
        if value is None and needed:
            has = ", ".join(map(str, self.fields)) or "none"
            message = (
                f"target has no {short(name)}; its keys: {has} (truth of another kind makes a task of another name)"
            )
            self.row.fail("missing field", message)
        return value

    def text(self, name: str) -> None:
        value = self.given(name, needed=True)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            self.row.fail("wrong type", f"{name} must be a text that is not empty, got {short(value)}")

    def boxes(self, name: str, boxes: Any) -> int:
        """The number of boxes in a list, each of which is checked."""
        found = self.row.parse(name, lambda value: read_list(_listed(value), "a list of boxes"), boxes) or []
        for number, box in enumerate(found):
            self.box(f"{name}[{number}]", box)
        return len(found)

    def box(self, name: str, box: Any) -> None:
        if self.size is None:
            self.row.fail("missing image", f"{name} needs the picture that it is on")
        elif isinstance(box, str | Mapping):  # rewards read numbers alone
            self.row.fail("wrong type", f"{name} must be four numbers (x1, y1, x2, y2), got {short(box)}")
        else:
            self.row.box(list(box) if isinstance(box, tuple) else box, self.size, name)


def _listed(value: Any) -> Any:
    return [list(v) if isinstance(v, tuple) else v for v in value] if isinstance(value, list | tuple) else value


def _grounding(target: _Target) -> None:
    box = target.given("box", needed=True)
    if box is not None:
        target.box("box", box)


def _counting(target: _Target) -> None:
    count, points, boxes = (target.given(name) for name in ("count", "points", "boxes"))
    row, found = Row({"count": count}, target.row.where, 0, target.row.images), None
    if count is None and points is None and boxes is None:
        target.given("count", needed=True)
    number = row.count("count") if count is not None else None
    target.row.problems += row.problems
    if boxes is not None:
        found = target.boxes("boxes", boxes)
    if points is not None and target.size is not None:
        places = target.row.points(_listed(points), target.size)
        found = len(places) if places is not None else found
    if number is not None and found is not None and number != found and not target.row.problems:
        target.row.fail("count and points differ", f"count is {number}, but {found} are given")


def _detection(target: _Target) -> None:
    boxes, labels = target.given("boxes", needed=True), target.given("labels", needed=True)
    if boxes is None or labels is None:
        return
    number = target.boxes("boxes", boxes)
    names = target.row.parse("labels", lambda value: read_names(_listed(value)), labels)
    for name, has in (("labels", names), ("crowd", target.given("crowd"))):
        if has is not None and len(has) != number:
            target.row.fail("different lengths", f"{len(has)} {name} for {number} boxes")
    if target.given("categories") is not None:
        target.row.parse("categories", lambda value: read_names(_listed(value)), target.given("categories"))


def _ocr(target: _Target) -> None:
    target.text("text")


def _caption(target: _Target) -> None:
    references = target.given("references", needed=True)
    if references is not None:
        target.row.parse("references", lambda value: read_names(_listed(value)), references)


def _qa(target: _Target) -> None:
    target.given("answer", needed=True)


def _trajectory(target: _Target) -> None:
    if target.given("answer") is None:
        target.given("tracks", needed=True)


_TARGETS: Mapping[str, Callable[[_Target], None]] = MappingProxyType(
    {
        "grounding": _grounding,
        "counting": _counting,
        "detection": _detection,
        "ocr": _ocr,
        "caption": _caption,
        "qa": _qa,
        "trajectory": _trajectory,
    }
)
