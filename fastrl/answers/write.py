"""Truth → the text a real model of a family would answer with, and checks that a text has exactly that form."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastrl.answers.frames import STYLE_FRAME, View, from_original
from fastrl.answers.parse import parse_boxes
from fastrl.answers.scan import number
from fastrl.answers.text import strip_fence
from fastrl.answers.tracks import Track, format_tracks, matches_tracks

STYLES = tuple(STYLE_FRAME)
END_OF_TURN = "<|im_end|>"
_REF, _REF_END = "<|object_ref_start|>", "<|object_ref_end|>"
_BOX, _BOX_END = "<|box_start|>", "<|box_end|>"


def check_style(style: str) -> None:
    """Raise ``ValueError`` unless ``style`` is one of ``STYLES``."""
    if style not in STYLES:
        raise ValueError(f"unknown answer style {style!r}; allowed: {', '.join(STYLES)}")


def round_coords(coords: Sequence[float], style: str, view: View) -> tuple[int, ...]:
    """Original pixels → the integers ``style`` writes: rounded half up, clipped to the image."""
    frame = STYLE_FRAME[style]
    size = view.size(frame)
    values = from_original(coords, frame, view)
    return tuple(min(max(math.floor(v + 0.5), 0), int(size[i % 2])) for i, v in enumerate(values))


def format_answer(
    task: str,
    target: Mapping[str, Any],
    style: str = "qwen2_5",
    view: View | None = None,
    *,
    labels: bool | None = None,
) -> str:
    """The text a model of family ``style`` would give for ``target`` (a ``Record.target``: original pixels).

    ``qwen2_5``: a JSON list of ``{"bbox_2d": [x1, y1, x2, y2], "label": ...}`` (or ``point_2d``) in integer pixels of
    the resized image. ``qwen2``: reference and box tokens, 0-1000; a point is a box without extent. ``labels`` says
    whether JSON items carry their label; by default detection and counting do and grounding does not. Nothing there to
    answer with is ``[]``. Detection leaves crowd regions out. ``view`` is needed wherever there are coordinates.

    Raises ``ValueError`` for an unknown task or style, a missing view, and counting truth without boxes and points.
    """
    check_style(style)
    if task == "ocr":
        return str(target["text"])
    if task == "caption":
        return str(target["references"][0])
    if task == "qa":
        answer = target["answer"]
        return chr(ord("A") + answer) if isinstance(answer, int) and target.get("choices") else str(answer)
    if task not in ("grounding", "counting", "detection", "trajectory"):
        raise ValueError(f"no answer format for task {task!r}")
    if view is None:
        raise ValueError(f"task {task!r} answers with coordinates: a view is needed")
    if task == "trajectory":
        return format_tracks([as_track(track) for track in target["tracks"]], view)
    coords, names = _truth(task, target)
    if not coords:
        return "[]"
    if style == "qwen2":
        return "".join(_qwen2_item(round_coords(c, style, view), name) for c, name in zip(coords, names, strict=True))
    show = task != "grounding" if labels is None else labels
    items = []
    for c, name in zip(coords, names, strict=True):
        item: dict[str, Any] = {"point_2d" if len(c) == 2 else "bbox_2d": list(round_coords(c, style, view))}
        if show and name:
            item["label"] = name
        items.append(item)
    return json.dumps(items, ensure_ascii=False)


def as_track(track: Track | Mapping[str, Any]) -> Track:
    """A ``Track`` from itself or from ``{"id", "name", "boxes": {frame: box}}``."""
    if isinstance(track, Track):
        return track
    return Track(int(track["id"]), str(track["name"]), {int(f): tuple(b) for f, b in track["boxes"].items()})


def _truth(task: str, target: Mapping[str, Any]) -> tuple[list[Sequence[float]], list[str]]:
    if task == "grounding":
        return [target["box"]], [str(target.get("expression", ""))]
    if task == "detection":
        crowd = target.get("crowd") or [False] * len(target["boxes"])
        kept = [i for i, is_crowd in enumerate(crowd) if not is_crowd]
        return [target["boxes"][i] for i in kept], [target["labels"][i] for i in kept]
    coords = target.get("boxes")
    if coords is None:
        coords = target.get("points")
    if coords is None:
        if target.get("count") == 0:
            return [], []
        raise ValueError("counting truth without boxes and points has no answer text")
    return list(coords), [str(target.get("label", ""))] * len(coords)


def _qwen2_item(coords: Sequence[int], name: str) -> str:
    x1, y1, x2, y2 = coords if len(coords) == 4 else (*coords, *coords)
    reference = f"{_REF}{name}{_REF_END}" if name else ""
    return f"{reference}{_BOX}({x1},{y1}),({x2},{y2}){_BOX_END}"


def matches_grounding_format(text: str, style: str = "qwen2", *, loose: bool = False) -> bool:
    """Whether a grounding answer has its family's form and nothing else.

    ``qwen2``: ``<|object_ref_start|>…<|object_ref_end|><|box_start|>…<|box_end|>``, then ``<|im_end|>`` where the
    end of turn was kept. This is the pattern Perception-R1 intends. ``loose=True`` replicates its released regular
    expression, whose unescaped pipes make it an alternation that passes nearly any text starting with ``<``.
    ``qwen2_5``: a JSON list (fenced or not) of objects that each hold one ``bbox_2d`` of four finite numbers.
    """
    check_style(style)
    if loose:
        # The alternatives of "<|object_ref_start|>.*?<|…": each holds one of these literals at its start.
        return text.startswith(("<", ">", "object_ref_start", "object_ref_end", "box_start", "box_end", "im_end"))
    text = text.removesuffix(END_OF_TURN)
    if style == "qwen2_5":
        return matches_json_boxes(text)
    if not text.startswith(_REF):
        return False
    name_end = text.find(_REF_END, len(_REF))
    start = name_end + len(_REF_END)
    if name_end < 0 or not text.startswith(_BOX, start):
        return False
    return text.endswith(_BOX_END) and text.find(_BOX_END, start) == len(text) - len(_BOX_END)


def matches_format(task: str, text: str, style: str = "qwen2_5") -> bool:
    """Whether an answer has the form ``format_answer`` writes for ``task``. Free-text tasks: any visible text."""
    check_style(style)
    body = text.removesuffix(END_OF_TURN)
    if task == "grounding":
        return matches_grounding_format(text, style)
    if task in ("counting", "detection"):
        if style == "qwen2_5":
            return matches_json_boxes(body, points=task == "counting", label=task == "detection", empty=True)
        return matches_qwen2_boxes(body) or body.strip() == "[]"
    if task == "trajectory":
        return matches_tracks(body)
    return bool(body.strip())


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


def matches_json_boxes(text: str, *, points: bool = False, label: bool = False, empty: bool = False) -> bool:
    """A JSON list, fenced or not, of objects with ``bbox_2d`` (with ``points`` also ``point_2d``), nothing around it.

    ``label=True`` also asks each object for a non-empty string label; ``empty=True`` lets ``[]`` pass.
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
    return all(_is_json_box(item, points, label) for item in value)


def _is_json_box(item: Any, points: bool, label: bool) -> bool:
    if not isinstance(item, dict):
        return False
    coords = item.get("bbox_2d")
    length = 4
    if coords is None and points:
        coords, length = item.get("point_2d"), 2
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
