"""fastrl rewards under other trainers' calling conventions: TRL's ``reward_funcs`` and verl's ``compute_score``.

Both pass loose values (dataset columns, a ground truth, extra info) instead of a ``Record``; :func:`record_from`
converts them. An error in the *truth* raises and names the column; nothing in an *answer* ever raises.

A truth may be a list, an array, or JSON text (also in ``<answer>`` tags). Under TRL a row of another task gives None,
which TRL leaves out of the sum.

Coordinates: if the row has the image's size (``width``/``height``, or a PIL image in ``image``/``images``), the truth
is in pixels of that image and the answer's frame is determined as elsewhere in fastrl (``frame``,
``resized_width``/``resized_height``, or the ``family`` of the model: a column, or an option of the reward). Without a
size, answer and truth are compared number by number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fastrl.answers import FAMILIES, FRAMES, View, style_of
from fastrl.data.records import Record
from fastrl.data.truth import (
    TruthFault,
    fields_of,
    plain,
    read_box,
    read_count,
    read_list,
    read_names,
    read_points,
    read_truth,
)
from fastrl.rewards.base import Reward, unknown

T = TypeVar("T")
# Accepted names of columns, by the field of the target that they fill. The first name is fastrl's own.
_ALIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "grounding": {"box": ("box", "bbox", "bbox_2d", "solution"), "expression": ("expression", "normal_caption")},
    "counting": {"count": ("count",), "points": ("points",), "boxes": ("boxes",), "label": ("label",)},
    "detection": {
        "boxes": ("boxes", "bboxes"),
        "labels": ("labels", "names"),
        "crowd": ("crowd",),
        "categories": ("categories",),
    },
    "ocr": {"text": ("text",)},
    "trajectory": {"tracks": ("tracks",), "frames": ("frames",), "size": ("size",)},
}
_TEXTS = ("expression", "label", "text")  # text fields of the target, which are not parsed as JSON
# Columns that only rows of one task have. (``boxes`` and ``label`` belong to two tasks.)
_OWN: dict[str, tuple[str, ...]] = {
    "grounding": _ALIASES["grounding"]["box"],
    "counting": ("count", "points"),
    "detection": ("labels", "names", "bboxes"),
    "ocr": ("text",),
    "trajectory": ("tracks",),
    "caption": ("references",),
    "qa": ("answer", "choices"),
}
_WHOLE = ("target", "ground_truth")  # columns that may hold the whole truth as a mapping, a value or its JSON text


def answer_text(completion: Any) -> str:
    """Text of one completion: a string, or a conversation (its last message's text parts, joined)."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping):
        content = completion.get("content")
        if content is None or isinstance(content, str):
            return content or ""
        return "".join(str(part.get("text") or "") if isinstance(part, Mapping) else str(part) for part in content)
    if isinstance(completion, Sequence):
        return answer_text(completion[-1]) if completion else ""
    raise TypeError(f"completion: expected a string or a list of chat messages, got {type(completion).__name__}")


def _told(what: str, read: Callable[[Any], T], value: Any) -> T:
    try:
        return read(value)
    except TruthFault as fault:
        raise ValueError(f"{what} {fault}") from None


def _boxes(value: Any) -> list[tuple[float, ...]]:
    return [read_box(box) for box in read_list(value)]


def _need(target: Mapping[str, Any], task: str, name: str, where: str) -> Any:
    if target.get(name) is None:
        names = " or ".join(repr(alias) for alias in _ALIASES[task][name])
        raise ValueError(f"{where}: the {task} reward needs the truth in {names}; this row has {sorted(target)}")
    return target[name]


def _check_target(task: str, target: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The target with checked types for the reward of ``task``."""
    if task == "ocr":
        text = _need(target, task, "text", where)
        if not isinstance(text, str):
            raise ValueError(f"{where}: 'text' must be a string, got {text!r:.80}")
        return {"text": text}
    if task == "grounding":
        box = _told(f"{where}: 'box'", read_box, _need(target, task, "box", where))
        return {"box": box, "expression": target.get("expression") or ""}
    if task == "detection":
        boxes = _told(f"{where}: 'boxes'", _boxes, _need(target, task, "boxes", where))
        labels = _told(f"{where}: 'labels'", read_names, _need(target, task, "labels", where))
        crowd = [bool(c) for c in _told(f"{where}: 'crowd'", read_list, target.get("crowd") or [False] * len(boxes))]
        if not len(boxes) == len(labels) == len(crowd):
            raise ValueError(f"{where}: {len(boxes)} boxes, {len(labels)} labels and {len(crowd)} crowd flags")
        categories = _told(f"{where}: 'categories'", read_names, target.get("categories") or sorted(set(labels)))
        return {"boxes": boxes, "labels": labels, "crowd": crowd, "categories": categories}
    if task == "trajectory":
        tracks = _told(f"{where}: 'tracks'", read_list, _need(target, task, "tracks", where))
        return {**target, "tracks": [_track(track, f"{where}: track {i}") for i, track in enumerate(tracks, 1)]}
    points, boxes, count = target.get("points"), target.get("boxes"), target.get("count")
    points = None if points is None else _told(f"{where}: 'points'", read_points, points)
    boxes = None if boxes is None else _told(f"{where}: 'boxes'", _boxes, boxes)
    if count is None:
        places = points if points is not None else boxes
        if places is None:
            raise ValueError(f"{where}: the counting reward needs 'points', 'boxes' or 'count'; has {sorted(target)}")
        count = len(places)
    number = _told(f"{where}: 'count'", read_count, count)
    return {"label": target.get("label") or "", "count": number, "points": points, "boxes": boxes}


def _track(track: Any, where: str) -> dict[str, Any]:
    """One true track, with boxes by frame number (JSON and Parquet make strings of those; null: no box)."""
    track = read_truth(track)
    given = [read_truth(track.get(name)) for name in ("boxes", "spans")] if isinstance(track, Mapping) else [None, None]
    boxes, spans = given[0], _told(f"{where}: 'spans'", read_list, given[1] or [])
    if not isinstance(boxes, Mapping) or not boxes or not all(str(t).isdecimal() for t in boxes):
        raise ValueError(f"{where}: needs 'boxes' {{frame from 1: [x1, y1, x2, y2]}}, got {track!r:.80}")
    for span in spans:
        if not isinstance(span, Mapping) or not all(isinstance(span.get(k), int) for k in ("first", "last")):
            raise ValueError(f"{where}: a span needs 'action', 'first' and 'last', got {span!r:.80}")
    read = {int(t): _told(f"{where}: frame {t}", read_box, box) for t, box in boxes.items() if box is not None}
    return {"id": track.get("id", 0), "name": track.get("name") or "", "boxes": read, "spans": list(spans)}


def _size(row: Mapping[str, Any], where: str) -> View | None:
    """Original and resized size of the row's image in pixels; None if the row does not have them."""
    width, height = row.get("width"), row.get("height")
    if width is None or height is None:
        images = row.get("images") or row.get("image")
        image: Any = images[0] if isinstance(images, list) and images else images
        if image is None or isinstance(image, str) or not hasattr(image, "size"):
            return None
        width, height = image.size
    given = {"width": width, "height": height}
    given |= {f"resized_{name}": row.get(f"resized_{name}") or value for name, value in given.items()}
    sides = {name: _told(f"{where}: {name!r}", read_count, value) for name, value in given.items()}
    if min(sides.values()) < 1:
        raise ValueError(f"{where}: the sides of a picture must be 1 pixel or more, got {given}")
    return View(sides["width"], sides["height"], sides["resized_width"], sides["resized_height"])


def _styled(record: Record, family: Any, where: str) -> Record:
    """The record with frame, style and padding of the answering family, unless its row names a frame."""
    if family is None:
        return record
    if family not in FAMILIES:
        raise ValueError(f"{where}: " + unknown("family", family, FAMILIES))
    style = style_of(family)
    frame = style.frame_of(record.task) if record.frame == "auto" else record.frame
    return replace(record, frame=frame, style=style.name)


def _padded(record: Record) -> Record:
    """The record with its picture padded to a square if coordinates refer to that."""
    if record.frame != "padded_unit" or not record.views or record.views[0].canvas is not None:
        return record
    view = record.views[0]
    return replace(record, views=(View.padded(view.width, view.height, max(view.width, view.height)),))


def record_from(task: str, row: Mapping[str, Any], where: str = "row", family: str | None = None) -> Record:
    """One row of loose columns as a ``Record``; ``family``: default if the row names none.

    The truth is looked for in the columns of its own names (``box``, ``count``, ``points``, ``boxes``, ``labels``,
    ``text``; also ``bbox``, ``solution``, …), then in ``target`` or ``ground_truth``: a mapping of such names, or one
    value or JSON text that stands for it (``fastrl.data.truth.fields_of``).

    Raises:
        ValueError: there is no truth for ``task``, or it has the wrong type or length; the message has ``where``.
    """
    if task not in _ALIASES:
        raise ValueError(f"{where}: " + unknown("task", task, _ALIASES))
    row = {key: value if key in ("image", "images") else plain(value) for key, value in row.items()}
    fields = {**row, **_whole(task, row, where)}
    target = {}
    for name, aliases in _ALIASES[task].items():
        found = next((fields[alias] for alias in aliases if fields.get(alias) is not None), None)
        if found is not None:
            target[name] = found if name in _TEXTS else read_truth(found)
    frame = row.get("frame") or "auto"
    if frame not in FRAMES:
        raise ValueError(f"{where}: " + unknown("frame", frame, FRAMES))
    view = _size(row, where)
    record = Record(
        id=str(row.get("id", where)),
        task=task,
        images=(),
        messages=(),
        target=_check_target(task, target, where),
        source=where,
        views=() if view is None else (view,),
        frame=frame,
    )
    return _padded(_styled(record, row.get("family") or family, where))


def _whole(task: str, row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The fields that a row's one column for the whole truth stands for; none where it has no such column."""
    names = [name for aliases in _ALIASES[task].values() for name in aliases]
    columns = _WHOLE if any(row.get(name) is not None for name in names) else (*_WHOLE, "solution")
    truth = next((row[name] for name in columns if row.get(name) is not None), None)
    if isinstance(truth, str) and task != "ocr":
        truth = read_truth(truth)
        if isinstance(truth, str):
            raise ValueError(f"{where}: ground truth is not JSON: {truth[:60]!r}")
    if truth is None or (isinstance(truth, Mapping) and any(truth.get(name) is not None for name in names)):
        return truth or {}
    return {"text": truth} if task == "ocr" else fields_of(task, truth)


def is_of_another_task(task: str, row: Mapping[str, Any]) -> bool:
    """Whether a row of a mixed data set belongs to another task.

    This is decided by its ``task`` column; without one, by having columns of another task and none of this one. A row
    without any truth does not count as another task: it is an error later.
    """
    named = row.get("task")
    if isinstance(named, str) and named in _OWN:
        return named != task
    given = {name for name, value in row.items() if value is not None}
    if any(row.get(name) is not None for name in _WHOLE) or given & set(_OWN[task]):
        return False
    others = {other for other, columns in _OWN.items() if other != task and given & set(columns)}
    if task == "counting" and "boxes" in given and "detection" not in others:
        return False
    return bool(others)


def trl_rewards(
    reward: Reward,
    *,
    completions: Sequence[Any],
    prompts: Sequence[Any] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """The weighted sum per completion, with the signature of TRL's reward functions (all rows of a step at once).

    ``columns`` are the dataset's columns, one value per completion; values that are not lists of that length (the
    trainer's state, callbacks) are ignored. Rows of another task (see :func:`is_of_another_task`) give None. Each
    component's mean, and the means of the counts that explain a ``class`` of 0, go to ``log_metric`` if TRL passes it.
    """
    n = len(completions)
    rows = {name: values for name, values in columns.items() if isinstance(values, list | tuple) and len(values) == n}
    each = [{name: values[i] for name, values in rows.items()} for i in range(n)]
    own = [i for i in range(n) if not is_of_another_task(reward.task, each[i])]
    records = [record_from(reward.task, each[i], f"row {i}", reward.family) for i in own]
    answers = [answer_text(completions[i]) for i in own]
    components = reward.score(answers, records)
    if log_metric is not None and own:
        labels = {k: v for k, v in reward.diagnose(answers, records).items() if k in ("unlabelled", "unknown_label")}
        for name, values in [*components.items(), *labels.items()]:
            log_metric(f"{reward.task}/{name}", math.fsum(values) / len(own))
    result: list[float | None] = [None] * n
    for i, value in zip(own, reward.total(components), strict=True):
        result[i] = value
    return result


def verl_score(
    reward: Reward,
    *,
    solution_str: str,
    ground_truth: Any,
    data_source: str = "",
    extra_info: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, float]:
    """``{"score": weighted sum, component: value, …}`` for one answer, called as verl calls ``compute_score``.

    ``ground_truth`` is the target as a mapping, its JSON text, or the bare box, count or text; sizes and frame come
    from ``extra_info``. verl decodes without special tokens, so give ``frame`` or ``family`` for models that answer in
    0–1000. ``options`` (verl's ``reward_kwargs``) override the reward's own; other arguments from verl (``reward_…``)
    are ignored.

    Raises:
        ValueError: an option is unknown, or the truth is missing or malformed.
    """
    options = {name: value for name, value in options.items() if not name.startswith("reward_")}
    for name in options:
        if name not in reward.options():
            raise ValueError(f"{reward.task} reward: " + unknown("option", name, reward.options()))
    reward = replace(reward, **options)
    row = {**(extra_info or {}), "ground_truth": ground_truth}
    record = record_from(reward.task, row, f"{data_source or 'row'} {row.get('index', '')}".strip(), reward.family)
    components = reward.score([solution_str], [record])
    return {"score": reward.total(components)[0], **{name: values[0] for name, values in components.items()}}


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None, **options: Any
) -> float:
    """verl's entry point for mixed tasks: set ``custom_reward_function`` to this file and this name.

    The task is ``extra_info["task"]``, else the part of ``data_source`` before the first "/" (``grounding/refcoco``).
    ``options`` as in :func:`verl_score`. Only the weighted sum is returned, because verl needs the same keys from every
    row of a batch.
    """
    from fastrl.rewards import reward_for

    task = (extra_info or {}).get("task") or data_source.split("/")[0]
    call = {"data_source": data_source, "solution_str": solution_str, "ground_truth": ground_truth}
    return verl_score(reward_for(task), **call, extra_info=extra_info, **options)["score"]
