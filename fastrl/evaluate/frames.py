"""The frame in which answers were read, and its effect on the scores, so that a wrong frame is reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from fastrl.answers import Parsed, View, resolve_frame
from fastrl.data.records import Record
from fastrl.rewards import reward_for
from fastrl.rewards.reading import read_boxes, read_points, view_of

OTHERS = ("original", "resized", "thousand", "unit", "padded_unit")
SLACK = 1.01  # factor on a frame's extent, as models overshoot a little
BETTER = 0.05  # increase of the mean score from which another frame is reported


class FrameReport(NamedTuple):
    """The frame of the coordinates in a set of answers."""

    frame: str  # the frames in which they were read, most frequent first
    changes: int  # number of answers whose score would differ in another plausible frame
    better: tuple[str, float, float] | None  # a better frame, the mean score as read, and the mean score in that frame

    def words(self, guessed: bool) -> list[str]:
        """Messages for the user: which frame was guessed, and whether another one fits better."""
        lines = []
        if guessed and self.frame != "auto":
            lines.append(f"frame: read as {self.frame}, guessed from the answers; set it with --family or --frame")
        if self.better is not None:
            name, old, new = self.better
            lines.append(
                f"frame: read as {self.frame} the answers score {old:.3f} on average, as {name} they would score "
                f"{new:.3f}: set the model with --family, or --frame {name}"
            )
        return lines


def frame_report(task: str, records: Sequence[Record], answers: Sequence[str]) -> FrameReport | None:
    """The effect of the frame on an evaluation; None for tasks whose answers have no boxes and points.

    Each answer is scored again in every plausible frame: its numbers are within the frame's extent, and numbers within
    0 to 1 are only read as fractions of the sides. The score is IoU for grounding, mean IoU and F1 of the matched boxes
    for detection, and for counting the number of objects, which does not depend on the frame.
    """
    if task not in ("grounding", "counting", "detection"):
        return None
    sized = [_sized(record) for record in records]
    read = [read_points(a, 512) if task == "counting" else read_boxes(a, 512) for a in answers]
    names = [_frame(parsed, record) for parsed, record in zip(read, sized, strict=True)]
    used = Counter(name for name, parsed in zip(names, read, strict=True) if parsed.items)
    frame = ", ".join(name for name, _ in used.most_common()) or ", ".join(sorted({r.frame for r in records}))
    if task == "counting":
        return FrameReport(frame, 0, None)
    score = _scorer(task, answers)
    base = score(sized)
    changed = [False] * len(answers)
    best: tuple[str, float, float] | None = None
    for other in OTHERS:
        seen = [_seen_in(record, other) for record in sized]
        open_ = [
            name != other and _plausible(parsed, other, row)
            for name, parsed, row in zip(names, read, seen, strict=True)
        ]
        if not any(open_):
            continue
        again = score(seen)
        changed = [c or (o and abs(a - b) > 1e-6) for c, o, a, b in zip(changed, open_, again, base, strict=True)]
        mixed = [a if o else b for o, a, b in zip(open_, again, base, strict=True)]
        means = (sum(base) / len(base), sum(mixed) / len(mixed))
        if means[1] > means[0] + BETTER and (best is None or means[1] > best[2]):
            best = (other, *means)
    return FrameReport(frame, sum(changed), best)


def _sized(record: Record) -> Record:
    """The record with its sizes filled in."""
    view = view_of(record)
    return record if record.views or view is None else replace(record, views=(view,))


def _frame(parsed: Parsed, record: Record) -> str:
    """The frame of an answer, with ``original`` instead of an equivalent frame: for pixels of a picture that was not
    resized, and for numbers without a known size."""
    frame = resolve_frame(parsed, record.frame)
    if not record.views:
        return "original"
    view = record.views[0]
    same = (view.width, view.height) == (view.resized_width, view.resized_height) and view.canvas is None
    return "original" if frame == "resized" and same else frame


def _seen_in(record: Record, frame: str) -> Record:
    views = record.views
    if frame == "padded_unit" and views and views[0].canvas is None:
        views = (View.padded(views[0].width, views[0].height, 336),)
    return replace(record, frame=frame, views=views)


def _plausible(parsed: Parsed, frame: str, record: Record) -> bool:
    """Whether an answer's numbers are plausible in a frame."""
    if not parsed.items or not record.views:
        return False
    width, height = record.views[0].size(frame)
    numbers = [(v, (width, height)[i % 2]) for item in parsed for i, v in enumerate(item.coords)]
    if not all(0 <= v <= SLACK * side for v, side in numbers):
        return False
    return frame in ("unit", "padded_unit") or any(v > 1 for v, _ in numbers)


def _scorer(task: str, answers: Sequence[str]) -> Callable[[Sequence[Record]], list[float]]:
    reward = reward_for(task, format="none")

    def score(records: Sequence[Record]) -> list[float]:
        components = reward.score(answers, records)
        if task == "grounding":
            return components["iou"]
        return [0.5 * (a + b) for a, b in zip(components["location"], components["f1"], strict=True)]

    return score
