"""Reads trajectory answers for reward and metrics: tracks in pixels, matched as a whole to the true tracks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.answers import View, canonical, parse_tracks, resolve_frame, to_original
from fastrl.answers.tracks import MAX_TRACKS
from fastrl.data.dialogues import parse_actions
from fastrl.data.records import Record
from fastrl.rewards.reading import MAX_CHARACTERS, Coords, batches, clamp, view_of
from fastrl_kernels.linear_assignment import linear_assignment
from fastrl_kernels.pairwise_iou import pairwise_iou

CELLS = 1 << 18  # overlaps computed at once; bounds memory


class Tracks(NamedTuple):
    """Tracks of one answer or one truth; item i of every list belongs to track i."""

    names: list[str]
    boxes: list[dict[int, Coords]]  # frame from 1 → (x1, y1, x2, y2) in pixels of the original frame
    actions: list[dict[int, str]]  # frame from 1 → what the subject does in it

    @property
    def total(self) -> int:
        """Number of boxes of all tracks."""
        return sum(len(boxes) for boxes in self.boxes)


def name_key(name: str) -> str:
    """A name or action in the form in which it is compared, without case and extra white space."""
    return canonical(" ".join(name.split())).casefold()


def true_tracks(target: Mapping[str, Any]) -> Tracks:
    """The tracks of a trajectory target.

    Raises:
        ValueError: no track, or one without boxes.
    """
    tracks = target.get("tracks") or ()
    boxes = [{int(t): tuple(map(float, box)) for t, box in track["boxes"].items()} for track in tracks]
    if not boxes or not all(boxes):
        raise ValueError("trajectory truth needs at least one track, each with at least one box")
    names = [name_key(str(track["name"])) for track in tracks]
    spans = [track.get("spans") or () for track in tracks]
    return Tracks(names, boxes, [_by_frame(*each) for each in zip(spans, boxes, strict=True)])


def _by_frame(spans: Sequence[Mapping[str, Any]], boxes: Mapping[int, Coords]) -> dict[int, str]:
    """Actions of the frames that show the subject."""
    return {
        t: name_key(str(span["action"]))
        for span in spans
        for t in range(int(span["first"]), int(span["last"]) + 1)
        if t in boxes
    }


def read_tracks(answer: str, record: Record, frame: str | None = None, max_tracks: int = MAX_TRACKS) -> Tracks:
    """Tracks of a model's answer; never raises, bounded time.

    Two tracks of one identity are kept as two. ``frame`` overrides the record's own; ``auto`` means 0-1000, the frame
    of trajectory text. Without any size, numbers are not converted.
    """
    parsed = parse_tracks(answer[:MAX_CHARACTERS], min(max_tracks, MAX_TRACKS))
    resolved = resolve_frame(parsed, frame or record.frame)
    view = (
        _view(record) if resolved != "original" and (resolved != "resized" or record.views) and parsed.tracks else None
    )

    def pixels(box: Coords) -> Coords:
        return clamp(box if view is None else to_original(clamp(box), resolved, view))

    last = max(true_frames(record.target), 1)
    return Tracks(
        [name_key(track.name) for track in parsed],
        [{t: pixels(box) for t, box in track.boxes.items()} for track in parsed],
        [read_actions(track.text_after, last) for track in parsed],
    )


def true_frames(target: Mapping[str, Any]) -> int:
    """Number of the last frame with a true box."""
    return max((int(t) for track in target.get("tracks") or () for t in track["boxes"]), default=0)


def read_actions(text: str, last: int) -> dict[int, str]:
    """Frame → action of ``It moves left in frames 1-3, then stays in frames 4-6.``, up to frame ``last``.

    The first action given for a frame counts.
    """
    result: dict[int, str] = {}
    for span in parse_actions(text):
        for t in range(span.first, min(span.last, last) + 1):
            result.setdefault(t, name_key(span.action))
    return result


def _view(record: Record) -> View | None:
    """Sizes of the record's frames: its views or pictures, else the size its truth names."""
    size = record.target.get("size")
    if not record.views and size:
        return View.unresized(int(size[0]), int(size[1]))
    return view_of(record)


def table(tracks: Sequence[Tracks], frames: int) -> Tensor:
    """Boxes [B, most tracks (at least 1), frames, 4] float64; all zero (no area) where there is none."""
    most = max([1, *(len(each.boxes) for each in tracks)])
    result = torch.zeros(len(tracks), most, frames, 4, dtype=torch.float64)
    for b, each in enumerate(tracks):
        for n, boxes in enumerate(each.boxes):
            inside = [t for t in boxes if 1 <= t <= frames]
            if inside:
                result[b, n, torch.tensor(inside) - 1] = torch.tensor([boxes[t] for t in inside], dtype=torch.float64)
    return result


def overlaps(found: Sequence[Tracks], truth: Sequence[Tracks]) -> list[Tensor]:
    """IoU [answer's tracks, true tracks, frames] of the boxes of one frame, for each answer.

    ``frames`` is the number of the last frame with a true box. 0 where either gives no box. Computed for all answers
    together.
    """
    lengths = [max(max(boxes) for boxes in each.boxes) for each in truth]
    result = [torch.zeros(0)] * len(found)
    n_found, n_truth = [len(each.boxes) for each in found], [len(each.boxes) for each in truth]
    for batch in batches(n_found, n_truth, max(1, CELLS // max([1, *lengths]))):
        frames = max(lengths[i] for i in batch)
        a, b = table([found[i] for i in batch], frames), table([truth[i] for i in batch], frames)
        iou = pairwise_iou(a[:, :, None, :, None], b[:, None, :, :, None])[..., 0, 0]
        for row, i in enumerate(batch):
            result[i] = iou[row, : n_found[i], : n_truth[i], : lengths[i]]
    return result


def match_tracks(overlap: Sequence[Tensor]) -> list[list[tuple[int, int]]]:
    """For each answer its pairs (answer's track, true track): one to one, with the greatest total IoU over all frames.

    A track is matched as a whole: one that follows first one subject and then another is still one identity. Tracks
    without any overlap stay unmatched.
    """
    result: list[list[tuple[int, int]]] = [[] for _ in overlap]
    n_found, n_truth = [len(each) for each in overlap], [each.shape[1] for each in overlap]
    for batch in batches(n_found, n_truth, CELLS):
        rows, columns = (max(1, *(sizes[i] for i in batch)) for sizes in (n_found, n_truth))
        total = torch.zeros(len(batch), rows, columns, dtype=torch.float64)
        for b, i in enumerate(batch):
            total[b, : n_found[i], : n_truth[i]] = overlap[i].sum(-1)
        counts = [torch.tensor([sizes[i] for i in batch]) for sizes in (n_found, n_truth)]
        match = linear_assignment(total, n_rows=counts[0], n_cols=counts[1], maximize=True).match.tolist()
        for b, i in enumerate(batch):
            result[i] = [(p, k) for p, k in enumerate(match[b][: n_found[i]]) if k >= 0 and total[b, p, k] > 0]
    return result
