"""Which of a run's evaluations is the best, and whether it is time to stop: by one metric whose direction is known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from fastrl.config.registry import nearest

Mode = Literal["max", "min"]

# What a protocol's numbers are better at, by the metric's name, or its last part (object_recall: recall).
DIRECTIONS: Mapping[str, Mode] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                *("acc@0.5", "acc@0.75", "acc@0.95", "recall@0.5", "mean_iou", "accuracy", "identity_accuracy"),
                *("AP", "AP50", "AP75", "f1", "precision", "recall", "bleu", "meteor", "score", "capture"),
                *("mota", "idf1", "reward"),
            ),
            "max",
        ),
        **dict.fromkeys(
            (
                *("edit_distance", "false_facts", "false_captions", "chair_i", "chair_s"),
                *("unparsable", "dropped", "unlabelled", "unknown_label"),
            ),
            "min",
        ),
    }
)
SAMPLED = "sampled/"


def direction(metric: str) -> Mode | None:
    """Whether more or less of a metric is better; None: it is not known."""
    name = metric.rpartition("/")[2]
    parts = (name, name.partition("_")[0], name.rpartition("_")[2])  # accuracy_TYPE; object_recall
    return next((DIRECTIONS[part] for part in parts if part in DIRECTIONS), None)


def check_metric(metric: str, known: Iterable[str], mode: Mode | None) -> Mode:
    """The direction of a metric of those ``known``. Raises ``ValueError``, with what is allowed."""
    names = list(known)
    if metric not in names:
        bare = metric.removeprefix("eval/")
        near = bare if bare in names else nearest(metric, names)
        hint = f"; did you mean {near}?" if near else "."
        raise ValueError(f"eval.metric: no metric {metric!r} here{hint} There are: {', '.join(names)}")
    found = mode or direction(metric)
    if found is None:
        raise ValueError(f"eval.metric: whether more {metric} is better is not known: set eval.mode to max or min")
    return found


@dataclass
class Best:
    """The best value of one metric so far, and for how many evaluations there was none better.

    Args:
        mode: whether more or less is better.
        min_delta: by how much a value has to be better than the best so far.
        patience: after how many evaluations in a row without a better one a run is over; None: never.

    ``step`` and ``value`` are those of the best (None: there is none yet); ``start`` is the value before the first
    step.
    """

    mode: Mode
    min_delta: float = 0.0
    patience: int | None = None
    step: int | None = None
    value: float | None = None
    waited: int = 0
    start: float | None = None

    def take(self, step: int, value: float | None) -> bool:
        """Whether the value of an evaluation after ``step`` is the best so far. One that is not defined never is; that
        of step 0 is only there to compare with, as no checkpoint holds those weights."""
        value = value if value is not None and math.isfinite(value) else None
        if step == 0:
            self.start = value
            return False
        if value is not None and (self.value is None or self._gain(value, self.value) > self.min_delta):
            self.step, self.value, self.waited = step, value, 0
            return True
        self.waited += 1
        return False

    @property
    def over(self) -> bool:
        """Whether the patience is at its end."""
        return self.patience is not None and self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"step": self.step, "value": self.value, "waited": self.waited, "start": self.start}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`. Raises ``KeyError`` and ``TypeError``."""
        self.step, self.value = _maybe(int, state["step"]), _maybe(float, state["value"])
        self.waited, self.start = int(state["waited"]), _maybe(float, state["start"])

    def _gain(self, value: float, other: float) -> float:
        return value - other if self.mode == "max" else other - value


def _maybe(kind: type, value: Any) -> Any:
    return None if value is None else kind(value)
