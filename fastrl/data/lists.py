"""Ranked lists: several answers to one prompt with their rewards, one JSON object a line → records for PerPO.

``fastrl build perpo`` writes such files; files from other sources need the same form::

    {"id": "17", "task": "grounding", "images": ["img/17.png"], "prompt": "Output the bounding box of …",
     "answers": ["[{\\"bbox_2d\\": [4, 9, 60, 71]}]", …], "rewards": [0.91, …], "target": {"box": [5, 9, 60, 70]}}

- ``images`` is a list of files, or ``image`` one; all of them come before ``prompt``, a text.
- ``answers`` are in any order, one or more, and ``rewards`` has one finite number for each. Without ``rewards`` (or
  with ``rewards=target``) they are computed from ``target`` when the list is used: ``{"box": …}`` in pixels of the
  original image for grounding, ``{"text": …}`` for OCR.
- ``resized`` (written by the builder) is the [width, height] of each image as the model saw it. Coordinates in the
  answers are only valid at that size, so training with other pixel limits is an error.
- ``task`` names the reward; by default it is derived from the target's key. ``id`` defaults to the line number.

Query keys: ``images`` (folder the image paths start from; default the file's own), ``limit``, ``seed``, ``rewards``
(``auto`` or ``target``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastrl.data import rows
from fastrl.data.records import Dataset, Record, question
from fastrl.data.rows import choice_option, load_rows
from fastrl.data.validate import Row, is_number, short

KEYS = (*rows.KEYS, "rewards")
MAX_ANSWERS = 1024  # per list; the kernel's limit
LARGEST = 1e30  # largest magnitude of a reward, well within float32
_TASK_OF_TARGET = {"box": "grounding", "text": "ocr"}


class RankedList(NamedTuple):
    """The value of ``target["list"]`` in records of this adapter."""

    answers: tuple[str, ...]
    rewards: tuple[float, ...] | None  # None: to be computed from the rest of the target
    resized: tuple[tuple[int, int], ...] | None = None  # (width, height) of the images that the answers refer to


def load(path: str, query: Mapping[str, str]) -> Dataset:
    """Read a file of ranked lists. Raises ``DataError`` for an unreadable file or option."""
    recompute = choice_option(query, "rewards", ("auto", "target"), path) == "target"
    return load_rows(path, query, lambda row: _record(row, recompute))


def ranked_list(record: Record) -> RankedList | None:
    """A record's list, or None."""
    found = record.target.get("list")
    return found if isinstance(found, RankedList) else None


def list_row(record: Record, images: Sequence[str], answers: Sequence[str], rewards: Sequence[float]) -> dict[str, Any]:
    """One line of a list file, best answer first.

    Args:
        record: the prompt as the policy saw it; one user turn of images, then text.
        images: the names of the record's images in the file.
        answers, rewards: one reward for each answer.

    Raises:
        ValueError: the record is not such a prompt.
    """
    order = sorted(range(len(answers)), key=lambda i: -rewards[i])
    kept = {key: record.target[key] for key in ("expression", "box", "text") if key in record.target}
    return {
        "id": record.id,
        "task": record.task,
        "images": list(images),
        "prompt": _prompt_text(record),
        "answers": [answers[i] for i in order],
        "rewards": [rewards[i] for i in order],
        **({"resized": [[v.resized_width, v.resized_height] for v in record.views]} if record.views else {}),
        "target": kept,
    }


def _prompt_text(record: Record) -> str:
    where = record.source or record.id
    if len(record.messages) != 1 or record.messages[0]["role"] != "user":
        raise ValueError(f"{where}: a list needs a prompt of one user turn, but there are {len(record.messages)} turns")
    content = record.messages[0]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    if [p["type"] for p in parts] != ["image"] * len(record.images) + ["text"]:
        raise ValueError(f"{where}: a list needs a prompt of images first, then one text")
    return parts[-1]["text"]


def _record(row: Row, recompute: bool) -> Record | None:
    identity, prompt = row.id(), row.text("prompt")
    images = row.pictures()
    answers = _answers(row)
    target, task = _target(row, images[0][1] if images else None)
    resized = _resized(row, len(images))
    given = None if recompute else row.truth("rewards")
    rewards = _rewards(row, given, answers) if given is not None else None
    if given is None and not any(_TASK_OF_TARGET[key] == task for key in _TASK_OF_TARGET if key in target):
        why = "rewards=target is set" if recompute else "there are no rewards"
        row.fail("missing field", f"{why}, but target has neither a box (grounding) nor a text (ocr) to compute them")
    if row.problems or prompt is None:
        return None
    asked = question(task, images=len(images), prompt=prompt)
    paths = tuple(path for path, _ in images)
    return Record(identity, task, paths, asked, {**target, "list": RankedList(answers, rewards, resized)})


def _answers(row: Row) -> tuple[str, ...]:
    value = row.truth("answers")
    if not isinstance(value, list) or not all(isinstance(a, str) for a in value):
        row.fail("wrong type", f"answers must be a list of strings, got {short(value)}")
    elif not value:
        row.fail("empty list", "answers is an empty list; a list has one answer or more")
    elif len(value) > MAX_ANSWERS:
        row.fail("too many answers", f"{len(value)} answers; a list has at most {MAX_ANSWERS}")
    else:
        return tuple(value)
    return ()


def _rewards(row: Row, value: Any, answers: Sequence[str]) -> tuple[float, ...]:
    if not isinstance(value, list):
        row.fail("wrong type", f"rewards must be a list of numbers, got {short(value)}")
        return ()
    for place, reward in enumerate(value):
        if not is_number(reward):
            row.fail("not a number", f"rewards[{place}] must be a finite number, got {short(reward)}")
        elif abs(reward) > LARGEST:
            row.fail("too large", f"rewards[{place}] must lie within ±{LARGEST:g}, got {short(reward)}")
    if answers and len(value) != len(answers):
        row.fail("different lengths", f"{len(answers)} answers but {len(value)} rewards")
    return () if row.problems else tuple(float(v) for v in value)


def _resized(row: Row, images: int) -> tuple[tuple[int, int], ...] | None:
    value = row.truth("resized")
    if value is None:
        return None
    sizes: list[Any] = value if isinstance(value, list) else [None]
    if len(sizes) != images or not all(isinstance(s, list) and [type(v) for v in s] == [int, int] for s in sizes):
        row.fail("wrong type", f"resized must have one [width, height] for each image, got {short(value)}")
        return None
    return tuple((w, h) for w, h in sizes)


def _target(row: Row, size: tuple[int, int] | None) -> tuple[dict[str, Any], str]:
    """The row's truth with its box checked, and the task."""
    value = row.truth("target", {})
    if not isinstance(value, Mapping):
        row.fail("wrong type", f"target must be an object, got {short(value)}")
        value = {}
    target = dict(value)
    target.pop("list", None)
    if "box" in target and size is not None:
        target["box"] = row.box(target["box"], size, "target.box")
    if "text" in target and not isinstance(target["text"], str):
        row.fail("wrong type", f"target.text must be a string, got {short(target['text'])}")
    task = row.fields.get("task", next((t for key, t in _TASK_OF_TARGET.items() if key in target), "list"))
    if not isinstance(task, str) or not task:
        row.fail("wrong type", f"task must be a name, got {short(task)}")
        task = "list"
    return target, task
