"""Notations of model families for boxes and points: their frame, writing, and strict recognition.

There is one object per notation, found by name (``STYLES``) or by the ``model_type`` of a model's config
(``style_of``). Parsing needs no style: ``parse.py`` reads them all. A style also determines the frame of the numbers,
which the text does not show.

If a family has no notation for a task, it gets the closest one that it can learn: JSON for labelled boxes of LLaVA, a
box without extent for a point of a family that only has boxes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import KeysView, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fastrl.answers.frames import View, from_original
from fastrl.answers.parse import parse_boxes
from fastrl.answers.scan import NUMBER, number
from fastrl.answers.text import END_OF_TURN, strip_fence

_REF, _REF_END = "<|object_ref_start|>", "<|object_ref_end|>"
_BOX, _BOX_END = "<|box_start|>", "<|box_end|>"
_GLM, _GLM_END = "<|begin_of_box|>", "<|end_of_box|>"
_GAP = r"\s*+,\s*+"
_LIST_OF_4 = rf"\[\s*+{NUMBER}(?:{_GAP}{NUMBER}){{3}}\s*+\]"
_LIST_OF_2 = rf"\[\s*+{NUMBER}{_GAP}{NUMBER}\s*+\]"
_LISTS = {
    points: re.compile(rf"(?:{one})(?:\s*+,?+\s*+(?:{one}))*+")
    for points, one in ((False, _LIST_OF_4), (True, rf"{_LIST_OF_4}|{_LIST_OF_2}"))
}
_INTERN = re.compile(
    rf"(?:(?:<ref>[^<>]*+</ref>\s*+)?+<box>\s*+\[\s*+{_LIST_OF_4}(?:{_GAP}{_LIST_OF_4})*+\s*+\]\s*+</box>[\s,]*+)++"
)
_LOCS = re.compile(r"(?:<loc[0-9]{4}>){4}+ [^<>;]++(?:;\s*+(?:<loc[0-9]{4}>){4}+ [^<>;]++)*+")
_POINT = re.compile(r"<(points?)((?: [xy][0-9]*+=\"[0-9]{1,3}+(?:\.[0-9]++)?+\")++) alt=\"([^\"<>]*+)\">([^<>]*+)</\1>")


@dataclass(frozen=True)
class Style:
    """One notation. Subclasses write and recognise it; all numbers are in ``frame``.

    Args:
        name: in ``STYLES``.
        frame: of the numbers (see ``frames``).
        steps: resolution per unit of the frame: 1 writes integers, 100 two decimals.
    """

    name: str
    frame: str
    steps: int = 1
    points: ClassVar[bool] = False  # whether points have a notation; otherwise they are boxes without extent
    boxes: ClassVar[bool] = True

    def numbers(self, coords: Sequence[float], view: View) -> tuple[float, ...]:
        """Original pixels → the numbers to write, x before y: rounded half up, clipped to the frame."""
        size = view.size(self.frame)
        values = from_original(coords, self.frame, view)
        rounded = (math.floor(v * self.steps + 0.5) / self.steps for v in values)
        clipped = [min(max(v, 0.0), size[i % 2]) for i, v in enumerate(rounded)]
        return tuple(int(v) for v in clipped) if self.steps == 1 else tuple(clipped)

    def write(self, task: str, items: Sequence[tuple[tuple[float, ...], str]], labels: bool) -> str:
        """The answer with ``items``: numbers (a box or a point) with their label, which is written if ``labels``."""
        raise NotImplementedError

    def matches(self, task: str, text: str) -> bool:
        """Whether a text (without end of turn) is exactly an answer in this notation to a task with coordinates."""
        raise NotImplementedError

    def frame_of(self, task: str) -> str:
        """The frame of an answer to ``task``: trajectories are in 0–1000 for all families."""
        return "thousand" if task == "trajectory" else self.frame


@dataclass(frozen=True)
class JsonStyle(Style):
    """A JSON list of ``{"bbox_2d": [x1, y1, x2, y2], "label": …}`` or ``point_2d``, fenced or not.

    ``y_first`` is Gemma's ``box_2d``: [y1, x1, y2, x2].
    """

    y_first: bool = False
    points: ClassVar[bool] = True

    @property
    def keys(self) -> tuple[str, str | None]:
        """Names of a box and of a point."""
        return ("box_2d", None) if self.y_first else ("bbox_2d", "point_2d")

    def write(self, task: str, items: Sequence[tuple[tuple[float, ...], str]], labels: bool) -> str:
        rows = []
        box, point = self.keys
        for coords, name in items:
            key = point if len(coords) == 2 and point is not None else box
            values = _whole(coords) if key == box else list(coords)
            row: dict[str, Any] = {key or "": [values[i ^ 1] for i in range(len(values))] if self.y_first else values}
            rows.append({**row, "label": name} if labels and name else row)
        return json.dumps(rows, ensure_ascii=False)

    def matches(self, task: str, text: str) -> bool:
        box, point = self.keys
        many = task != "grounding"
        point = point if task == "counting" else None
        return matches_json_boxes(text, box=box, point=point, label=task == "detection", empty=many)


@dataclass(frozen=True)
class Qwen2Style(Style):
    """``<|object_ref_start|>label<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>``, one after another."""

    def write(self, task: str, items: Sequence[tuple[tuple[float, ...], str]], labels: bool) -> str:
        written = []
        for coords, name in items:
            x1, y1, x2, y2 = _whole(coords)
            reference = f"{_REF}{name}{_REF_END}" if name else ""
            written.append(f"{reference}{_BOX}({x1},{y1}),({x2},{y2}){_BOX_END}")
        return "".join(written)

    def matches(self, task: str, text: str) -> bool:
        if task == "grounding":
            return _matches_qwen2_grounding(text)
        return matches_qwen2_boxes(text) or text.strip() == "[]"


@dataclass(frozen=True)
class InternStyle(Style):
    """``<ref>label</ref><box>[[x1, y1, x2, y2]]</box>``, one after another (InternVL)."""

    def write(self, task: str, items: Sequence[tuple[tuple[float, ...], str]], labels: bool) -> str:
        return "".join(
            (f"<ref>{name}</ref>" if name else "") + f"<box>[[{_joined(_whole(coords))}]]</box>"
            for coords, name in items
        )

    def matches(self, task: str, text: str) -> bool:
        text = text.strip()
        if task == "grounding" and text.count("<box>") != 1:
            return False
        return _INTERN.fullmatch(text) is not None or (task != "grounding" and text == "[]")


@dataclass(frozen=True)
class GlmStyle(Style):
    """``<|begin_of_box|>[[x1,y1,x2,y2]]<|end_of_box|>``; labelled boxes as a JSON list between these tokens (GLM)."""

    points: ClassVar[bool] = True

    def write(self, task: str, items: Sequence[tuple[tuple[float, ...], str]], labels: bool) -> str:
        if task == "detection":
            return f"{_GLM}{_JSON_1000.write(task, items, labels)}{_GLM_END}"
        lists = ", ".join(f"[{_joined(coords, ',')}]" for coords, _ in items)
        return f"{_GLM}[{lists}]{_GLM_END}"

    def matches(self, task: str, text: str) -> bool:
        text = text.strip()
        if not (text.startswith(_GLM) and text.endswith(_GLM_END) and text.count(_GLM) == text.count(_GLM_END) == 1):
            return False
        inside = text[len(_GLM) : -len(_GLM_END)].strip()
        if task == "detection":
            return _JSON_1000.matches(task, inside)
        if not (inside.startswith("[") and inside.endswith("]")):
            return False
        return _is_lists(task, inside[1:-1].strip()) or (task != "grounding" and not inside[1:-1].strip())


@dataclass(frozen=True)
class LlavaStyle(Style):
    """``[0.12, 0.34, 0.56, 0.78]``: fractions of the sides, with two decimals; labelled boxes as a JSON list."""

    steps: int = 100
    points: ClassVar[bool] = True

    def write(self, task: str, items: Sequence[tuple[tuple[float, ...], str]], labels: bool) -> str:
        if task == "detection":
            return JsonStyle(self.name, self.frame, self.steps).write(task, items, labels)
        return ", ".join(f"[{', '.join(f'{v:.2f}' for v in coords)}]" for coords, _ in items)

    def matches(self, task: str, text: str) -> bool:
        text = text.strip()
        parsed = parse_boxes(text)
        if any(not 0.0 <= v <= 1.0 for item in parsed for v in item.coords):
            return False
        if task == "detection":
            return JsonStyle(self.name, self.frame).matches(task, text)
        return _is_lists(task, text) or (task != "grounding" and text == "[]")


@dataclass(frozen=True)
class MolmoStyle(Style):
    """``<point x="63.5" y="44.5" alt="label">label</point>``, several as ``<points x1= y1= x2= …>``: per cent.

    Numbers here are fractions of the sides (``unit``), as returned by ``parse_points``. Boxes have no notation.
    """

    steps: int = 1000
    points: ClassVar[bool] = True
    boxes: ClassVar[bool] = False

    def write(self, task: str, items: Sequence[tuple[tuple[float, ...], str]], labels: bool) -> str:
        if task != "counting":
            raise ValueError(f"{self.name} only writes points, so it has no answer format for {task}")
        name = items[0][1].translate(str.maketrans("", "", '"<>'))
        centres = [(0.5 * (c[0] + c[-2]), 0.5 * (c[1] + c[-1])) for c, _ in items]
        many = len(items) > 1
        numbered = ((str(i) if many else "", x, y) for i, (x, y) in enumerate(centres, 1))
        places = " ".join(f'x{i}="{100 * x:.1f}" y{i}="{100 * y:.1f}"' for i, x, y in numbered)
        tag = "points" if many else "point"
        return f'<{tag} {places} alt="{name}">{name}</{tag}>'

    def matches(self, task: str, text: str) -> bool:
        return task == "counting" and (_POINT.fullmatch(text.strip()) is not None or text.strip() == "[]")


@dataclass(frozen=True)
class PaliGemmaStyle(Style):
    """``<locY1><locX1><locY2><locX2> label ; …``: 1024 steps of each side, y first (PaliGemma)."""

    steps: int = 1024

    def numbers(self, coords: Sequence[float], view: View) -> tuple[float, ...]:
        return tuple(min(v, 1023 / 1024) for v in super().numbers(coords, view))

    def write(self, task: str, items: Sequence[tuple[tuple[float, ...], str]], labels: bool) -> str:
        written = []
        for coords, name in items:
            x1, y1, x2, y2 = (round(v * 1024) for v in _whole(coords))
            places = "".join(f"<loc{v:04d}>" for v in (y1, x1, y2, x2))
            written.append(f"{places} {name or 'object'}")
        return " ; ".join(written)

    def matches(self, task: str, text: str) -> bool:
        text = text.strip()
        if task == "grounding" and ";" in text:
            return False
        return _LOCS.fullmatch(text) is not None or (task != "grounding" and text == "[]")


_JSON_1000 = JsonStyle("qwen3", "thousand")
STYLES: dict[str, Style] = {
    style.name: style
    for style in (
        JsonStyle("qwen2_5", "resized"),
        Qwen2Style("qwen2", "thousand"),
        _JSON_1000,
        LlavaStyle("llava1_5", "padded_unit"),
        LlavaStyle("llava_next", "unit"),
        InternStyle("internvl", "thousand"),
        GlmStyle("glm", "thousand"),
        JsonStyle("gemma", "thousand", y_first=True),
        MolmoStyle("molmo", "unit"),
        PaliGemmaStyle("paligemma", "unit"),
    )
}
# config.model_type → the style of its family; registered families are added by add_family
_OF_FAMILY: dict[str, str] = {
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2_5",
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "smolvlm"), "qwen3"),
    "llava": "llava1_5",
    **dict.fromkeys(("llava_next", "llava_onevision", "llava_next_video"), "llava_next"),
    "internvl": "internvl",
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v"), "glm"),
    **dict.fromkeys(("molmo",), "molmo"),
    "paligemma": "paligemma",
    **dict.fromkeys(("gemma3", "gemma3n", "gemma4"), "gemma"),
}
FAMILIES: KeysView[str] = _OF_FAMILY.keys()  # includes families registered later


def style_of(model_type: str) -> Style:
    """The style of a family, by its config's ``model_type``. Raises ``ValueError`` for an unknown one."""
    if model_type not in _OF_FAMILY:
        raise ValueError(f"unknown model family {model_type!r}; known: {', '.join(FAMILIES)}")
    return STYLES[_OF_FAMILY[model_type]]


def add_family(model_type: str, style: str, end_of_turn: str) -> None:
    """Add a family's style and end-of-turn text, for rewards and ``eval --predictions``.

    Raises:
        ValueError: the style is unknown, or the family already has a different one.
    """
    known = _OF_FAMILY.get(model_type, style)
    if style_named(style).name != known:
        raise ValueError(f"model family {model_type!r} already has style {known!r}, got {style!r}")
    _OF_FAMILY[model_type] = style
    if end_of_turn not in END_OF_TURN:
        END_OF_TURN.append(end_of_turn)


STYLE_FRAME = {name: style.frame for name, style in STYLES.items()}


def style_named(name: str) -> Style:
    """The style of that name. Raises ``ValueError`` if there is none."""
    if name not in STYLES:
        raise ValueError(f"unknown answer style {name!r}; allowed: {', '.join(STYLES)}")
    return STYLES[name]


# Helpers


def _whole(coords: Sequence[float]) -> list[float]:
    """A box; a point is a box without extent."""
    return [*coords] if len(coords) == 4 else [*coords, *coords]


def _joined(values: Sequence[float], gap: str = ", ") -> str:
    return gap.join(str(v) for v in values)


def _is_lists(task: str, text: str) -> bool:
    """Bare lists and nothing else: one of four numbers for grounding; counting also has points."""
    found = _LISTS[task == "counting"].fullmatch(text)
    return found is not None and (task != "grounding" or text.count("[") == 1)


def _matches_qwen2_grounding(text: str) -> bool:
    """The pattern that Perception-R1 intends: a reference span and a box span, nothing else."""
    if not text.startswith(_REF):
        return False
    name_end = text.find(_REF_END, len(_REF))
    start = name_end + len(_REF_END)
    if name_end < 0 or not text.startswith(_BOX, start):
        return False
    return text.endswith(_BOX_END) and text.find(_BOX_END, start) == len(text) - len(_BOX_END)


def matches_qwen2_boxes(text: str) -> bool:
    """One or more box spans, each with or without its reference span, separated by nothing but blanks and commas."""
    pieces = text.strip().split(_BOX_END)
    if len(pieces) < 2 or pieces[-1].strip():
        return False
    for piece in pieces[:-1]:
        reference, token, numbers = piece.lstrip(" ,\n").partition(_BOX)
        parsed = parse_boxes(f"{_BOX}{numbers}{_BOX_END}", max_items=2)
        named = reference.startswith(_REF) and reference.endswith(_REF_END)
        if not token or (reference and not named) or len(parsed) != 1 or parsed.dropped:
            return False
    return True


def matches_json_boxes(
    text: str,
    *,
    box: str = "bbox_2d",
    point: str | None = None,
    points: bool = False,
    label: bool = False,
    empty: bool = False,
) -> bool:
    """Whether the text is exactly a JSON list, fenced or not, of objects with ``box`` (or ``point``).

    ``points=True`` is ``point="point_2d"``; ``label=True`` also requires a non-empty string label in each object;
    ``empty=True`` accepts ``[]``.
    """
    body = text.strip()
    if body.startswith("```"):
        if not body.endswith("```") or len(body) < 6:
            return False
        body = strip_fence(body)
    try:
        value = json.loads(body, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, list) or not (value or empty):
        return False
    return all(_is_json_box(item, box, "point_2d" if points else point, label) for item in value)


def _is_json_box(item: Any, box: str, point: str | None, label: bool) -> bool:
    if not isinstance(item, dict):
        return False
    coords = item.get(box)
    length = 4
    if coords is None and point is not None:
        coords, length = item.get(point), 2
    if not isinstance(coords, list) or len(coords) != length:
        return False
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in coords):
        return False
    name = item.get("label")
    if label and not (isinstance(name, str) and name.strip()):
        return False
    try:
        return all(number(str(v)) is not None for v in coords)
    except ValueError:  # an integer too long to print
        return False
