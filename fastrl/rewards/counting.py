"""Counting reward: predicted points against true ones under an optimal matching (Perception-R1, Eqs. 3 to 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fastrl.answers import Parsed
from fastrl.answers.frames import Frame
from fastrl.data.records import Record
from fastrl.rewards.base import Components, Reward
from fastrl.rewards.format import format_scores, without_format
from fastrl.rewards.reading import LIMIT, Coords, batches, pad, read_points, to_pixels, to_thousand, view_of
from fastrl_kernels.detection_reward import detection_reward

DIAGONAL = 1000.0 * math.sqrt(2.0)  # of an image in 0–1000 coordinates
ANYWHERE = 4 * LIMIT  # a scale with which points are matched at any distance
NEEDS = "needs true points or boxes, but this record has only a count"


def true_points(record: Record) -> list[Coords] | None:
    """The record's points, or centres of its boxes, in original pixels; None if it has neither."""
    points, boxes = record.target.get("points"), record.target.get("boxes")
    if points is not None:
        return [(float(x), float(y)) for x, y in points]
    if boxes is not None:
        return [(0.5 * (b[0] + b[2]), 0.5 * (b[1] + b[3])) for b in boxes]
    return [] if record.target.get("count") == 0 else None


def matched_distances(
    predicted: Sequence[Sequence[Coords]], truth: Sequence[Sequence[Coords]], scale: float
) -> list[list[float]]:
    """L2 distances of the matched pairs of each problem; one-to-one, with the largest total of 1 − d / ``scale``.

    Only pairs with d < ``scale`` are matched. All in 0–1000 coordinates.
    """
    result: list[list[float]] = [[] for _ in predicted]
    for batch in batches([len(p) for p in predicted], [len(t) for t in truth]):
        a, b = pad([predicted[i] for i in batch], 2), pad([truth[i] for i in batch], 2)
        match = detection_reward(
            a.values, b.values, a.counts, b.counts, metric="point", threshold=0.0, scale=scale
        ).match.tolist()
        for i, row in zip(batch, match, strict=True):
            pairs = [(predicted[i][p], truth[i][t]) for p, t in enumerate(row) if t >= 0]
            result[i] = [math.dist(p, t) for p, t in pairs]
    return result


def point_distances(
    answers: Sequence[str], records: Sequence[Record], *, frame: Frame | None = None, max_items: int = 512
) -> list[float | None]:
    """Mean distance of each answer's matched points from the true ones, a share of the picture's diagonal, in [0, 1].

    The points (or centres of boxes) are matched one-to-one at the smallest total distance, as many pairs as the shorter
    list has. Distances are taken in 0–1000 coordinates, in which both sides of a picture count alike, and divided by
    their diagonal, 1000 √2; a point outside the picture is at most a diagonal away. Missing points cost nothing
    and surplus ones even offer more to choose from: say the exact count beside it.

    Args:
        answers: texts, ``answers[i]`` to ``records[i]``.
        records: counting records with points or boxes.
        frame: what the answers' coordinates mean; None: each record's own.
        max_items: points read from one answer.

    Returns:
        One distance per answer; None where nothing is matched: the answer or the record has no points.

    Raises:
        ValueError: a record has only a count.
    """
    read = [read_points(answer, max_items) for answer in answers]
    predicted, truth = _in_thousand(read, records, frame)
    return [
        math.fsum(min(d / DIAGONAL, 1.0) for d in distances) / len(distances) if distances else None
        for distances in matched_distances(predicted, truth, ANYWHERE)
    ]


@dataclass(frozen=True, kw_only=True)
class CountingReward(Reward):
    """Components ``points``, ``count`` (with ``exact_bonus``) and ``format``.

    Boxes of an answer count as their centres. All distances are in 0–1000 coordinates of the image.

    Args:
        score_by: ``matched``: Σ over matched pairs of ``max(0, 1 − d / (1000 √2))``, divided by the larger of the two
            numbers of points, in [0, 1] (missing and surplus points both cost). ``precursor``: the development
            repository's, ``1 − (d / 1000) · √2`` as written there, averaged over the matched pairs only, in [−1, 1].
            ``count``: 1 for the exact number, else 0 (needs no true points).
        exact_bonus: value of component ``count`` for an answer with the exact number, 0 for any other.
        format: ``strict`` (1 for the model family's exact form, else 0), ``thinking`` (that after a
            thought, see ``fastrl.rewards.format.well_formed``) or ``none``.

    With ``score_by="precursor"``, ``exact_bonus=1`` and weights format 0.25, count 0.55 and points 0.7 this is the
    development repository's combined reward.
    """

    task: ClassVar[str] = "counting"
    parts: ClassVar[tuple[str, ...]] = ("points", "count", "format")

    score_by: Literal["matched", "precursor", "count"] = "matched"
    exact_bonus: float = 0.0
    format: Literal["strict", "thinking", "none"] = "strict"

    @property
    def absent(self) -> dict[str, str]:
        return without_format(self.format) | ({} if self.exact_bonus else {"count": "exact_bonus=0"})

    def misfit(self, record: Record) -> str | None:
        if self.score_by == "count" or true_points(record) is not None:
            return None
        return f"counting reward score_by={self.score_by!r} {NEEDS}; use score_by='count'"

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> Components:
        read = [read_points(answer, self.max_items) for answer in answers]
        exact = [_exact(parsed, record) for parsed, record in zip(read, records, strict=True)]
        points = exact if self.score_by == "count" else self._points(read, records)
        result = {"points": points}
        if self.exact_bonus:
            result["count"] = [self.exact_bonus * value for value in exact]
        if self.format != "none":
            result["format"] = format_scores(self.task, answers, records, self.frame, self.format)
        return result

    def readable(self, answers: Sequence[str], records: Sequence[Record]) -> list[bool]:
        return [read_points(answer, self.max_items).parsable for answer in answers]

    def diagnose(self, answers: Sequence[str], records: Sequence[Record]) -> dict[str, list[int]]:
        """``unparsable``, and ``dropped``: malformed items."""
        read = [read_points(answer, self.max_items) for answer in answers]
        return {"unparsable": [int(not p.parsable) for p in read], "dropped": [p.dropped for p in read]}

    def _points(self, read: Sequence[Parsed], records: Sequence[Record]) -> list[float]:
        for record in records:
            if (why := self.misfit(record)) is not None:
                raise ValueError(f"{record.source or record.id}: {why}")
        predicted, truth = _in_thousand(read, records, self.frame)
        distances = matched_distances(predicted, truth, ANYWHERE if self.score_by == "precursor" else DIAGONAL)
        return [
            self._pair_scores(d, parsed, len(p), len(t))
            for d, parsed, p, t in zip(distances, read, predicted, truth, strict=True)
        ]

    def _pair_scores(self, distances: Sequence[float], parsed: Parsed, n_pred: int, n_truth: int) -> float:
        if not n_pred and not n_truth:
            return float(parsed.parsable)  # an explicit empty list is correct, unparsable text is not
        if not distances:
            return 0.0
        if self.score_by == "precursor":
            return math.fsum(max(-1.0, 1.0 - d / 1000.0 * math.sqrt(2.0)) for d in distances) / len(distances)
        return math.fsum(1.0 - d / DIAGONAL for d in distances) / max(n_pred, n_truth)


def exact_counts(answers: Sequence[str], records: Sequence[Record], *, max_items: int = 512) -> list[float]:
    """1 for each answer with as many points or boxes as there are objects, else 0; an unparsable or cut-off answer is
    wrong even if there is none."""
    read = (read_points(answer, max_items) for answer in answers)
    return [_exact(parsed, record) for parsed, record in zip(read, records, strict=True)]


def _in_thousand(
    read: Sequence[Parsed], records: Sequence[Record], frame: Frame | None
) -> tuple[list[list[Coords]], list[list[Coords]]]:
    """Points of each answer and of its record, in 0–1000 coordinates."""
    predicted, truth = [], []
    for parsed, record in zip(read, records, strict=True):
        known = true_points(record)
        if known is None:
            raise ValueError(f"{record.source or record.id}: matching points {NEEDS}")
        view = view_of(record)
        predicted.append(to_thousand(to_pixels(parsed, record, frame, boxes=False), view))
        truth.append(to_thousand(known, view))
    return predicted, truth


def _exact(parsed: Parsed, record: Record) -> float:
    count = record.target.get("count")
    if count is None:
        count = len(true_points(record) or ())
    return float(parsed.parsable and not parsed.truncated and len(parsed) == count)
