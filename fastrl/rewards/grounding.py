"""Grounding reward: overlap of the first box of an answer with the true one (Perception-R1, §3.3 and released code)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fastrl.answers import Parsed
from fastrl.data.records import Record
from fastrl.rewards.base import Components, Reward
from fastrl.rewards.format import FormatCheck, format_scores, well_formed, without_format
from fastrl.rewards.reading import Coords, pad, read_boxes, to_pixels
from fastrl_kernels.pairwise_iou import pairwise_iou

UNREADABLE, INVERTED, APART = -1.0, -0.6, -0.2  # the graded metric's values below IoU²


def box_iou(predicted: Sequence[Coords | None], truth: Sequence[Coords]) -> list[float]:
    """IoU of ``predicted[i]`` and ``truth[i]`` (xyxy, one unit), 0 for no box and for boxes without area."""
    given = [i for i, box in enumerate(predicted) if box is not None]
    result = [0.0] * len(predicted)
    if given:
        a = pad([[box] for box in predicted if box is not None], 4).values
        b = pad([[tuple(truth[i])] for i in given], 4).values
        for i, value in zip(given, pairwise_iou(a, b).flatten().tolist(), strict=True):
            result[i] = value
    return result


@dataclass(frozen=True, kw_only=True)
class GroundingReward(Reward):
    """Components ``iou`` and ``format``.

    ``iou`` is that of the first box of the answer, in [0, 1]; no box, or one with inverted corners, gives 0. There is
    no epsilon in the denominator: a perfect box scores exactly 1.

    Args:
        metric: ``iou`` (the paper), ``iou_squared`` (its released code), or ``graded`` (the development repository's
            earlier form, in [−1, 1]: −1 unreadable or malformed, −0.6 inverted corners, −0.2 no overlap, else IoU²).
        format: ``strict`` (1 for the model family's exact form, else 0), ``loose`` (the released code's unescaped
            pattern, for replication), ``thinking`` (the exact form after a thought, see
            ``fastrl.rewards.format.well_formed``) or ``none`` (no such component).
    """

    task: ClassVar[str] = "grounding"
    parts: ClassVar[tuple[str, ...]] = ("iou", "format")

    metric: Literal["iou", "iou_squared", "graded"] = "iou"
    format: FormatCheck = "strict"

    @property
    def absent(self) -> dict[str, str]:
        return without_format(self.format)

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> Components:
        read = [read_boxes(answer, 1) for answer in answers]
        boxes = [self._box(parsed, record) for parsed, record in zip(read, records, strict=True)]
        values = box_iou(boxes, [record.target["box"] for record in records])
        if self.metric != "iou":
            values = [value * value for value in values]
        if self.metric == "graded":
            values = [self._graded(*each) for each in zip(values, read, answers, records, strict=True)]
        result = {"iou": values}
        if self.format != "none":
            result["format"] = format_scores(self.task, answers, records, self.frame, self.format)
        return result

    def readable(self, answers: Sequence[str], records: Sequence[Record]) -> list[bool]:
        return [bool(read_boxes(answer, 1).items) for answer in answers]

    def diagnose(self, answers: Sequence[str], records: Sequence[Record]) -> dict[str, list[int]]:
        """``unparsable``, and ``dropped``: malformed items before the one that counts."""
        read = [read_boxes(answer, 1) for answer in answers]
        return {"unparsable": [int(not p.items) for p in read], "dropped": [p.dropped for p in read]}

    def _box(self, parsed: Parsed, record: Record) -> Coords | None:
        if not parsed.items or parsed.items[0].inverted:
            return None
        return to_pixels(parsed, record, self.frame)[0]

    def _graded(self, squared: float, parsed: Parsed, answer: str, record: Record) -> float:
        check: FormatCheck = "strict" if self.format == "none" else self.format
        if not parsed.items or not well_formed(self.task, answer, self.frame or record.frame, check):
            return UNREADABLE
        if parsed.items[0].inverted:
            return INVERTED
        return squared if squared > 0.0 else APART
