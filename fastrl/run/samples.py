"""Sample answers of a step, as rows and as pictures with boxes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastrl.answers import View, parse_boxes, resolve_frame, to_original
from fastrl.data.pictures import open_picture, picture_size
from fastrl.data.records import question_of
from fastrl.data.show import truth_text

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastrl.batch import Completion, PromptGroup
    from fastrl.data.records import Record

SIDE = 448  # longest side of a sample's picture, in pixels
DRAWN = 100_000  # characters of an answer that are searched for boxes
KEPT = 4000  # maximum characters of a truth in the row
TRUTH, ANSWER = "#1a9850", "#d73027"


class Sample(NamedTuple):
    """A sample answer."""

    row: dict[str, Any]  # as in ``samples.jsonl``
    record: Record | None


def sample_table(groups: Sequence[PromptGroup], n: int) -> list[Sample]:
    """Best and worst answer of the first groups, ``n`` at most: id, task, question, truth, answer, rewards, views."""
    found = []
    for group in groups[: max(1, n // 2)]:
        ranked = sorted(group.completions, key=lambda c: -c.scalars.get("reward", 0.0))
        picked: list[Completion] = ranked[:1] if len(ranked) == 1 else [ranked[0], ranked[-1]]
        found += [Sample(_row(completion, group.record), group.record) for completion in picked]
    return found[:n]


def _row(completion: Completion, record: Record | None) -> dict[str, Any]:
    return {
        "id": record.id if record else "",
        "task": record.task if record else "",
        "question": question_of(record.messages) if record else "",
        "truth": truth_text(record)[:KEPT] if record else "",
        "answer": completion.text,
        "reward": completion.scalars.get("reward"),
        "rewards": completion.rewards,
        "frame": record.frame if record else "auto",  # the frame of the answer's coordinates, for drawing with views
        "views": [dataclasses.astuple(view) for view in record.views] if record else [],
    }


def with_picture(sample: Sample) -> dict[str, Any]:
    """The row of a sample plus ``picture``: its first picture with the true and the answer's boxes; None if there is
    none or it can no longer be opened."""
    record = sample.record
    picture = None
    if record is not None and record.images:
        try:
            picture = drawn(record, sample.row["answer"])
        except (OSError, ValueError, OverflowError):  # file deleted since sampling; invalid coordinates
            picture = None
    return {**sample.row, "picture": picture}


def drawn(record: Record, answer: str) -> Image:
    """A record's first picture, its longer side at most :data:`SIDE`, with the true boxes in green and those of the
    answer in red. Raises ``PictureError``."""
    from PIL import ImageDraw

    picture = open_picture(record.images[0]).copy()
    width, height = picture.size
    picture.thumbnail((SIDE, SIDE))
    across, down = picture.width / width, picture.height / height
    draw = ImageDraw.Draw(picture)
    for color, boxes in ((TRUTH, true_boxes(record)), (ANSWER, answer_boxes(record, answer[:DRAWN]))):
        for x1, y1, x2, y2 in boxes:
            left, right = sorted((_within(x1 * across, picture.width), _within(x2 * across, picture.width)))
            top, bottom = sorted((_within(y1 * down, picture.height), _within(y2 * down, picture.height)))
            draw.rectangle((left, top, right, bottom), outline=color, width=2)
    return picture


def true_boxes(record: Record) -> Sequence[Sequence[float]]:
    """The true boxes of a record, in pixels of the original picture; empty for tasks without boxes."""
    return [record.target["box"]] if "box" in record.target else record.target.get("boxes") or []


def answer_boxes(record: Record, answer: str) -> list[tuple[float, ...]]:
    """The boxes of an answer in pixels of the record's first picture."""
    parsed = parse_boxes(answer)
    view = record.views[0] if record.views else View.unresized(*picture_size(record.images[0]))
    frame = resolve_frame(parsed, record.frame)
    return [to_original(item.coords, frame, view) for item in parsed.items if len(item.coords) == 4]


def _within(value: float, size: int) -> float:
    """Clamp a coordinate from an answer to the picture."""
    return min(max(value, 0.0), size - 1.0)
