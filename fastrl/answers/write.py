"""Truth → the answer text that a model of a family would write, and checks that a text has exactly that form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastrl.answers.frames import View
from fastrl.answers.styles import style_named
from fastrl.answers.text import plain_answer, without_end_of_turn
from fastrl.answers.tracks import Track, format_tracks, matches_tracks

check_style = style_named
WRITTEN = ("grounding", "counting", "detection", "ocr", "caption", "qa", "trajectory")  # tasks with an answer text


def round_coords(coords: Sequence[float], style: str, view: View) -> tuple[float, ...]:
    """Original pixels → the numbers ``style`` writes: rounded half up, clipped to its frame."""
    return style_named(style).numbers(coords, view)


def format_answer(
    task: str,
    target: Mapping[str, Any],
    style: str = "qwen2_5",
    view: View | None = None,
    *,
    labels: bool | None = None,
) -> str:
    """The answer in ``style`` for ``target`` (a ``Record.target``, in original pixels).

    ``styles.py`` defines the styles. Numbers are rounded to the style's resolution. ``labels``: whether JSON items have
    their label; by default they do for detection and counting but not for grounding. An answer without objects is
    ``[]``. Detection leaves out crowd regions. ``view`` is needed for tasks with coordinates.

    Raises ``ValueError`` for an unknown task or style, a missing view, a task that the style cannot write, and counting
    truth without boxes and points.
    """
    writer = style_named(style)
    if task == "ocr":
        return str(target["text"])
    if task == "caption":
        return str(target["references"][0])
    if task == "qa":
        answer = target["answer"]
        return chr(ord("A") + answer) if isinstance(answer, int) and target.get("choices") else str(answer)
    reason = unwritable(task, target)
    if reason is not None:
        raise ValueError(reason)
    if view is None:
        raise ValueError(f"task {task!r} answers with coordinates: a view is needed")
    if task == "trajectory":
        return format_tracks([as_track(track) for track in target["tracks"]], view)
    coords, names = _truth(task, target)
    if not coords:
        return "[]"
    items = [(writer.numbers(c, view), name) for c, name in zip(coords, names, strict=True)]
    return writer.write(task, items, task != "grounding" if labels is None else labels)


def unwritable(task: str, target: Mapping[str, Any]) -> str | None:
    """Why no family has an answer text for a truth; None: :func:`format_answer` writes it, if the style can."""
    if task not in WRITTEN:
        return f"no answer format for task {task!r}; there is one for {', '.join(WRITTEN)}"
    known = any(target.get(key) is not None for key in ("boxes", "points"))
    if task == "counting" and not known and target.get("count") != 0:
        return "counting truth without boxes and points has no answer text"
    return None


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
        return [], []  # a count of 0
    return list(coords), [str(target.get("label", ""))] * len(coords)


def matches_grounding_format(text: str, style: str = "qwen2", *, loose: bool = False) -> bool:
    """Whether a grounding answer has exactly its style's form, apart from an end-of-turn token.

    ``loose=True`` replicates Perception-R1's released regular expression, whose unescaped pipes make it an alternation
    that passes nearly any text starting with ``<``; the strict form of ``qwen2`` is the pattern it intends.
    """
    writer = style_named(style)
    if loose:
        # The alternatives of "<|object_ref_start|>.*?<|…" each start with one of these literals.
        return text.startswith(("<", ">", "object_ref_start", "object_ref_end", "box_start", "box_end", "im_end"))
    return writer.matches("grounding", without_end_of_turn(text))


def matches_format(task: str, text: str, style: str = "qwen2_5") -> bool:
    """Whether an answer has the form that ``format_answer`` writes for ``task``. Free-text tasks: any visible text."""
    writer = style_named(style)
    body = without_end_of_turn(text)
    if task in ("grounding", "counting", "detection"):
        return writer.matches(task, body)
    if task == "trajectory":
        return matches_tracks(body)
    return bool(plain_answer(body))
