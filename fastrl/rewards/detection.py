"""Detection reward: optimal match, then location, class, F1, missing (Perception-R1; its weights are unpublished)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastrl.answers import Parsed, canonical
from fastrl.data.records import Record
from fastrl.rewards.base import Components, Reward
from fastrl.rewards.format import format_scores, without_format
from fastrl.rewards.reading import Coords, batches, pad, read_boxes, to_pixels
from fastrl_kernels.detection_reward import detection_reward

Labelled = tuple[list[Coords], list[str]]  # boxes in one unit, and a normalised label for each


def label_key(label: str | None) -> str:
    """A label in the form in which it is compared: without case, outer white space and differences of composition."""
    return "" if label is None else canonical(label).strip().casefold()


def label_counts(parsed: Parsed, target: Any) -> tuple[int, int]:
    """Number of boxes without a readable label, and of boxes whose label is not a category of the record."""
    known = {label_key(name) for name in (*(target.get("categories") or ()), *target["labels"])}
    keys = [label_key(item.label) for item in parsed if item.label is not None]
    return parsed.unlabelled, sum(key not in known for key in keys)


def true_boxes(target: Any) -> Labelled:
    """Boxes (original pixels) and label keys of a detection target, without crowd regions, which are not single
    objects."""
    crowd = target.get("crowd") or [False] * len(target["boxes"])
    kept = [i for i, is_crowd in enumerate(crowd) if not is_crowd]
    return [tuple(map(float, target["boxes"][i])) for i in kept], [label_key(target["labels"][i]) for i in kept]


@dataclass(frozen=True, kw_only=True)
class DetectionReward(Reward):
    """Components ``location``, ``class``, ``f1``, ``missing`` and ``format``.

    Predictions and truths are matched one to one across categories. ``location`` is the mean IoU and ``class`` the
    fraction of equal labels over matched pairs that overlap; ``f1`` counts the pairs with IoU ≥ ``threshold`` (surplus
    and duplicate boxes lower its precision). These are in [0, 1]. ``missing`` is minus the fraction of truths without
    such a pair, in [−1, 0]. If there is no truth, an explicit empty list earns 1 on each positive component, and any
    other text without boxes 0.

    Args:
        matching: ``optimal`` (largest total IoU), or ``sequence`` (the i-th box with the i-th truth: the paper's
            ablation without reward matching).
        threshold: IoU from which a pair counts as found.
        format: ``strict`` (1 for the model family's exact form, else 0), ``thinking`` (that after a
            thought, see ``fastrl.rewards.format.well_formed``) or ``none``.
    """

    task: ClassVar[str] = "detection"
    parts: ClassVar[tuple[str, ...]] = ("location", "class", "f1", "missing", "format")

    matching: Literal["optimal", "sequence"] = "optimal"
    threshold: float = 0.5
    format: Literal["strict", "thinking", "none"] = "strict"

    @property
    def absent(self) -> dict[str, str]:
        return without_format(self.format)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"detection reward: threshold must lie in (0, 1], got {self.threshold!r}")

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> Components:
        predicted: list[Labelled] = []
        honest_empty = []  # explicit empty lists, as opposed to unparsable text
        for answer, record in zip(answers, records, strict=True):
            parsed = read_boxes(answer, self.max_items)
            predicted.append((to_pixels(parsed, record, self.frame), [label_key(item.label) for item in parsed]))
            honest_empty.append(parsed.parsable)
        result = self._match(predicted, [true_boxes(record.target) for record in records])
        for name in ("location", "class", "f1"):
            result[name] = [value if ok else 0.0 for value, ok in zip(result[name], honest_empty, strict=True)]
        if self.format != "none":
            result["format"] = format_scores(self.task, answers, records, self.frame, self.format)
        return result

    def readable(self, answers: Sequence[str], records: Sequence[Record]) -> list[bool]:
        return [read_boxes(answer, 1).parsable for answer in answers]

    def diagnose(self, answers: Sequence[str], records: Sequence[Record]) -> dict[str, list[int]]:
        """``unparsable``, ``dropped`` (malformed items), and of the parsed boxes ``unlabelled`` and ``unknown_label``
        (a label that is not a category of the record), which earn nothing for ``class``."""
        read = [read_boxes(answer, self.max_items) for answer in answers]
        labels = [label_counts(parsed, record.target) for parsed, record in zip(read, records, strict=True)]
        return {
            "unparsable": [int(not parsed.parsable) for parsed in read],
            "dropped": [parsed.dropped for parsed in read],
            "unlabelled": [missing for missing, _ in labels],
            "unknown_label": [wrong for _, wrong in labels],
        }

    def _match(self, predicted: Sequence[Labelled], truth: Sequence[Labelled]) -> Components:
        result: Components = {name: [0.0] * len(predicted) for name in ("location", "class", "f1", "missing")}
        for batch in batches([len(boxes) for boxes, _ in predicted], [len(boxes) for boxes, _ in truth]):
            a, b = pad([predicted[i][0] for i in batch], 4), pad([truth[i][0] for i in batch], 4)
            keys = [(predicted[i][1], truth[i][1]) for i in batch]
            scored = detection_reward(
                a.values,
                b.values,
                a.counts,
                b.counts,
                pred_label=_label_ids(keys, 0, a.values.shape[1]),
                gt_label=_label_ids(keys, 1, b.values.shape[1]),
                matching=self.matching,
                threshold=self.threshold,
            )
            parts = (scored.location, scored.label, scored.f1, scored.missing)
            for name, values in zip(("location", "class", "f1", "missing"), parts, strict=True):
                for i, value in zip(batch, values.tolist(), strict=True):
                    result[name][i] = value
        return result


def _label_ids(keys: Sequence[tuple[list[str], list[str]]], side: int, width: int) -> Tensor:
    """Labels of one side as ids [B, width]: within a problem, equal keys of both sides get equal ids."""
    ids = torch.full((len(keys), width), -1, dtype=torch.int64)
    for i, both in enumerate(keys):
        table = {key: n for n, key in enumerate(dict.fromkeys([*both[1], *both[0]]))}
        if both[side]:
            ids[i, : len(both[side])] = torch.tensor([table[key] for key in both[side]])
    return ids
