"""Trajectory reward: position and actions of a subject over all frames, beyond what a single frame could tell.

This reward is not from a paper (Video-UTR trains by likelihood only); its aim is UTR's: text about a video should
require the whole video. Overlap does not ensure that: a box copied from one frame overlaps a slow subject in all
frames. So every component rewards what an answer has *beyond its own best single box*.

Let the subject be shown in n frames. Let a(s, t) in [0, 1] be the quality of the answer's entry for frame s as an entry
for frame t (0 if the answer has none), and b(s, t) the same for the truth's entry for frame s. Then

    c      = Σ_t a(t, t) / n                                                    as if frames were independent pictures
    v      = (Σ_t a(t, t) − max_s Σ_t a(s, t)) / max(n − max_s Σ_t b(s, t), n·still)       what following it has added
    credit = c / n + (1 − 1/n) · max(0, min(c, v))

with s and t over the frames in which answer and truth both have an entry (for b: all n). Consequences:

- The same entry for any one, several or all of the frames: Σ_t a(t, t) = Σ_t a(s, t), so v = 0 and credit = c / n ≤
  1/n. Answers from the first frame, copied boxes and constant boxes are of this kind.
- An answer for j frames: credit ≤ c ≤ j/n. The whole truth: credit 1, if the subject moves enough.
- Limits. A subject that does not move has b(s, t) = 1, so the truth itself is constant and earns 1/n: such clips cannot
  show whether an answer used all frames. If the best single true box does nearly as well (mean above 1 − ``still``), v
  is scaled by ``still`` instead, so that rounding to whole coordinates is not rewarded as motion. No bound is claimed
  for answers with two different entries. A guess can be one: the first frame's
  box, moved on in a random direction at the true speed, earned an ``iou`` of 0.12 on average over 600 clips of six
  frames (``scenes:trajectory?n=600&seed=3&size=84``; a copied box 0.08, the truth 0.91).

The components differ in a: IoU; IoU of at least ``threshold``; the same action.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fastrl.answers import parse_tracks
from fastrl.data.records import Record
from fastrl.rewards.base import Components, Reward
from fastrl.rewards.format import format_scores, without_format
from fastrl.rewards.reading import MAX_CHARACTERS
from fastrl.rewards.track_reading import CELLS, Tracks, match_tracks, overlaps, read_tracks, table, true_tracks
from fastrl_kernels.pairwise_iou import pairwise_iou


class Credit(NamedTuple):
    """Credits of matched pairs of tracks: each [M] float64, in [0, 1]."""

    iou: Tensor
    coverage: Tensor
    order: Tensor


def credit(agreement: Tensor, given: Tensor, ideal: Tensor, shown: Tensor, still: float = 0.05) -> Tensor:
    """The module's formula for M pairs of tracks over T frames.

    Args:
        agreement: a(s, t) [M, T, T] in [0, 1].
        given: [M, T] bool, frames for which the answer has an entry.
        ideal: b(s, t) [M, T, T], the truth against itself.
        shown: [M, T] bool, frames for which the truth has an entry; a pair without any earns 0.
        still: smallest fraction of the frames that the best constant entry must miss for full credit.

    Returns:
        [M] in the dtype of ``agreement``.
    """
    n = shown.sum(-1).to(agreement.dtype)
    both = given & shown
    aligned = (agreement.diagonal(dim1=1, dim2=2) * both).sum(-1)
    gained = aligned - _best_constant(agreement, both)
    possible = torch.maximum(n - _best_constant(ideal, shown), still * n)
    some = n > 0
    n = torch.where(some, n, 1.0)
    independent = aligned / n
    following = torch.minimum(independent, gained / torch.where(some, possible, 1.0)).clamp_min(0.0)
    return torch.where(some, independent / n + (1 - 1 / n) * following, 0.0)


def _best_constant(agreement: Tensor, frames: Tensor) -> Tensor:
    """The highest sum over ``frames`` that a single one of its entries reaches [M]; 0 without any."""
    pairs = frames[:, :, None] & frames[:, None, :]
    return (agreement * pairs).sum(-1).amax(-1)


@dataclass(frozen=True, kw_only=True)
class TrajectoryReward(Reward):
    """Components ``iou``, ``coverage``, ``order`` and ``format``.

    Answer tracks are matched one to one, as wholes, to the true ones by their total IoU. The first three lie in [0, 1];
    each is the sum over true tracks of n · credit (see the module), divided by the number of true entries plus that of
    surplus boxes (of unmatched tracks, or in frames where the subject is not shown). ``iou`` credits overlap,
    ``coverage`` frames with IoU ≥ ``threshold``, ``order`` frames with the right action, at most as much as the boxes
    of that track have earned (so that words alone earn nothing); it is 0 if the truth has no actions.

    ``format`` is 0 for a well-formed answer and −1 otherwise: a bonus would be the same for one frame as for all. So an
    answer from one frame of T earns at most 1/T of every component and of any weighted sum: more exactly, at most the
    fraction of the true boxes that are in that frame, which is 1/T if every subject is shown in all T frames.

    Args:
        threshold: IoU from which a frame counts as covered.
        still: see the module; in (0, 1].
        format: ``strict`` (tracks as ``fastrl.answers.format_tracks`` writes them), ``thinking`` (after a thought) or
            ``none``.
    """

    task: ClassVar[str] = "trajectory"
    parts: ClassVar[tuple[str, ...]] = ("iou", "coverage", "order", "format")

    threshold: float = 0.5
    still: float = 0.05
    format: Literal["strict", "thinking", "none"] = "strict"

    @property
    def absent(self) -> dict[str, str]:
        return without_format(self.format)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("threshold", "still"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"trajectory reward: {name} must lie in (0, 1], got {getattr(self, name)!r}")

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> Components:
        truth = [true_tracks(record.target) for record in records]
        pairs = zip(answers, records, strict=True)
        found = [read_tracks(answer, record, self.frame, self.max_items) for answer, record in pairs]
        overlap = overlaps(found, truth)
        result: Components = {name: [0.0] * len(answers) for name in ("iou", "coverage", "order")}
        entries = [truth[i].total for i in range(len(answers))]
        acts = [sum(map(len, each.actions)) for each in truth]
        surplus = [each.total for each in found]
        matched = [(i, p, k) for i, match in enumerate(match_tracks(overlap)) for p, k in match]
        credits = [part.tolist() for part in self._credits(matched, found, truth)]
        for (i, p, k), *values in zip(matched, *credits, strict=True):
            shown = truth[i].boxes[k]
            surplus[i] -= sum(t in shown for t in found[i].boxes[p])
            for name, value in zip(result, values, strict=True):
                result[name][i] += value * len(truth[i].actions[k] if name == "order" else shown)
        for i in range(len(answers)):
            for name, n in (("iou", entries[i]), ("coverage", entries[i]), ("order", acts[i])):
                result[name][i] /= max(1, n + surplus[i])
        if self.format != "none":
            right = format_scores(self.task, answers, records, self.frame, self.format)
            result["format"] = [value - 1.0 for value in right]
        return result

    def readable(self, answers: Sequence[str], records: Sequence[Record]) -> list[bool]:
        return [parse_tracks(answer[:MAX_CHARACTERS], 1, 1).parsable for answer in answers]

    def diagnose(self, answers: Sequence[str], records: Sequence[Record]) -> dict[str, list[int]]:
        """``unparsable``, and ``dropped``: boxes that are malformed, or a second one for a frame."""
        read = [parse_tracks(answer[:MAX_CHARACTERS]) for answer in answers]
        return {"unparsable": [int(not p.parsable) for p in read], "dropped": [p.dropped for p in read]}

    def _credits(
        self, matched: Sequence[tuple[int, int, int]], found: Sequence[Tracks], truth: Sequence[Tracks]
    ) -> Credit:
        """Credits of the pairs (problem, answer's track, true track), a bounded number of them at a time."""
        pieces: list[Credit] = []
        for chunk in _chunks(matched, [max(truth[i].boxes[k]) for i, _, k in matched]):
            ours = [_one(found[i], p) for i, p, _ in chunk]
            true = [_one(truth[i], k) for i, _, k in chunk]
            pieces.append(self._chunk_credits(ours, true, max(max(each.boxes[0]) for each in true)))
        if not pieces:
            return Credit(*(torch.zeros(0, dtype=torch.float64) for _ in Credit._fields))
        return Credit(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))

    def _chunk_credits(self, found: Sequence[Tracks], truth: Sequence[Tracks], frames: int) -> Credit:
        a, b = table(found, frames)[:, 0], table(truth, frames)[:, 0]
        given, shown = (_frames_of([each.boxes[0] for each in side], frames) for side in (found, truth))
        ours, ideal = pairwise_iou(a, b), pairwise_iou(b, b)
        iou = credit(ours, given, ideal, shown, self.still)
        hits, best = ((each >= self.threshold).double() for each in (ours, ideal))
        coverage = credit(hits, given, best, shown, self.still)
        keys = {action: n for n, action in enumerate(dict.fromkeys(x for t in truth for x in t.actions[0].values()))}
        claimed, true = (_action_ids(side, frames, keys) for side in (found, truth))
        same = (claimed[:, :, None] == true[:, None, :]).double()
        # An action only counts for frames in which the answer has a box.
        order = credit(
            same, given & (claimed != -1), (true[:, :, None] == true[:, None, :]).double(), true != -1, self.still
        )
        return Credit(iou, coverage, torch.minimum(order, torch.maximum(iou, coverage)))


def _one(tracks: Tracks, n: int) -> Tracks:
    return Tracks([tracks.names[n]], [tracks.boxes[n]], [tracks.actions[n]])


def _chunks(matched: Sequence[tuple[int, int, int]], lengths: Sequence[int]) -> list[list[tuple[int, int, int]]]:
    """Runs of pairs whose frame-by-frame matrices, padded to the longest, stay within ``CELLS`` (at least one pair)."""
    chunks: list[list[tuple[int, int, int]]] = []
    longest = 0
    for pair, length in zip(matched, lengths, strict=True):
        longest = max(longest, length)
        if not chunks or (len(chunks[-1]) + 1) * longest * longest > CELLS:
            chunks.append([])
            longest = length
        chunks[-1].append(pair)
    return chunks


def _frames_of(boxes: Sequence[dict[int, tuple[float, ...]]], frames: int) -> Tensor:
    """[M, frames] bool: the frames that have a box."""
    result = torch.zeros(len(boxes), frames, dtype=torch.bool)
    for row, each in zip(result, boxes, strict=True):
        inside = [t - 1 for t in each if 1 <= t <= frames]
        row[inside] = True
    return result


def _action_ids(tracks: Sequence[Tracks], frames: int, keys: dict[str, int]) -> Tensor:
    """[M, frames] int64: the index of each frame's action in ``keys``; −1: no action, −2: one that is never true."""
    result = torch.full((len(tracks), frames), -1, dtype=torch.int64)
    for row, each in zip(result, tracks, strict=True):
        for t, action in each.actions[0].items():
            if 1 <= t <= frames:
                row[t - 1] = keys.get(action, -2)
    return result
