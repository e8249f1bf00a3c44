"""Trajectory evaluation: overlap of whole tracks with the true ones, identities, and the MOT challenge's metrics."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from fastrl.data.records import Record
from fastrl.rewards.track_reading import Tracks, match_tracks, overlaps, read_tracks, true_tracks

FOUND = 0.5  # IoU from which a true box counts as found (the MOT challenge's)


def evaluate_trajectory(records: Sequence[Record], answers: Sequence[str]) -> dict[str, float]:
    """Metrics of trajectory answers; all but ``mota`` (at most 1, unbounded below) are in [0, 1].

    Answer tracks are matched one to one, as a whole, to the true ones of their record by the largest total IoU.

    - ``mean_iou``: a track's mean IoU over all frames with a true box (0 where the answer has none), averaged over all
      true tracks; surplus boxes and tracks do not lower it.
    - ``recall@0.5``: fraction of all true boxes whose matched track has IoU ≥ 0.5 there.
    - ``identity_accuracy``: of the true boxes that *any* track of the answer finds (IoU ≥ 0.5), the fraction found by
      the track that is matched to the subject and has its name. Exchanged identities and wrong names lower it. 0 if
      nothing was found.
    - ``mota`` and ``idf1`` over all clips at IoU 0.5, with py-motmetrics; left out if that is not installed. Identity
      numbers are only labels: they need to be consistent, not equal to the true ones.
    - ``n`` and ``unparsable``, answers without a single box of a track.

    Raises:
        ValueError: a record has no true boxes.
    """
    truth = [true_tracks(record.target) for record in records]
    found = [read_tracks(answer, record) for answer, record in zip(answers, records, strict=True)]
    overlap = overlaps(found, truth)
    ious: list[float] = []
    boxes = covered = seen = right = 0
    for ours, true, iou, pairs in zip(found, truth, overlap, match_tracks(overlap), strict=True):
        of_track = {k: p for p, k in pairs}
        boxes += true.total
        ious += _track_ious(true, iou, of_track)
        for k in range(len(true.boxes)):
            p = of_track.get(k)
            hits = iou[p, k] >= FOUND if p is not None else torch.zeros(iou.shape[2], dtype=torch.bool)
            covered += int(hits.sum())
            seen += int((iou[:, k] >= FOUND).any(0).sum()) if len(iou) else 0
            right += int(hits.sum()) if p is not None and ours.names[p] == true.names[k] else 0
    result = {
        "mean_iou": sum(ious) / len(ious),
        "recall@0.5": covered / boxes,
        "identity_accuracy": right / max(1, seen),
    }
    if importlib.util.find_spec("motmetrics") is not None:
        result |= mot_metrics(found, truth, overlap)
    return {**result, "n": len(answers), "unparsable": sum(not each.boxes for each in found)}


def trajectory_ious(records: Sequence[Record], answers: Sequence[str]) -> list[float]:
    """Each record's mean over its true tracks of what ``evaluate_trajectory`` averages over all; in [0, 1]."""
    truth = [true_tracks(record.target) for record in records]
    overlap = overlaps([read_tracks(answer, record) for answer, record in zip(answers, records, strict=True)], truth)
    found = zip(truth, overlap, match_tracks(overlap), strict=True)
    return [fmean(_track_ious(true, iou, {k: p for p, k in pairs})) for true, iou, pairs in found]


def _track_ious(true: Tracks, iou: Tensor, of_track: Mapping[int, int]) -> list[float]:
    """Each true track's mean IoU over its boxes; 0 where no track of the answer is matched to it."""
    return [
        float(iou[of_track[k], k].sum()) / len(shown) if k in of_track else 0.0 for k, shown in enumerate(true.boxes)
    ]


def mot_metrics(found: Sequence[Tracks], truth: Sequence[Tracks], overlap: Sequence[Tensor]) -> dict[str, float]:
    """``mota`` and ``idf1`` of all clips together, by py-motmetrics, at IoU 0.5.

    Args:
        found, truth: tracks of each answer and of its record.
        overlap: their IoU, as ``track_reading.overlaps`` gives it.
    """
    import motmetrics

    clips = []
    for ours, true, iou in zip(found, truth, overlap, strict=True):
        clip = motmetrics.MOTAccumulator()
        distance = torch.where(iou >= FOUND, 1 - iou, torch.nan)
        for t in sorted({t for tracks in (ours, true) for boxes in tracks.boxes for t in boxes}):
            annotated = [n for n, boxes in enumerate(true.boxes) if t in boxes]
            predicted = [n for n, boxes in enumerate(ours.boxes) if t in boxes]
            inside = t <= iou.shape[2] and bool(annotated) and bool(predicted)
            costs = (
                distance[predicted][:, annotated, t - 1].T.numpy()
                if inside
                else torch.zeros(len(annotated), len(predicted)).numpy()
            )
            clip.update(annotated, predicted, costs, frameid=t)
        clips.append(clip)
    names = [str(n) for n in range(len(clips))]
    table = motmetrics.metrics.create().compute_many(
        clips, metrics=["mota", "idf1"], names=names, generate_overall=True
    )
    return {name: float(table.loc["OVERALL", name]) for name in ("mota", "idf1")}
