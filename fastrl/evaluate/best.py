"""Select the best evaluation of a run by one metric, and decide on early stopping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from fastrl.config.registry import nearest

Mode = Literal["max", "min"]

# Direction of the protocols' metrics, by full name or by first or last part (object_recall: recall).
DIRECTIONS: Mapping[str, Mode] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                *("acc@0.5", "acc@0.75", "acc@0.95", "recall@0.5", "mean_iou", "accuracy", "identity_accuracy"),
                *("AP", "AP50", "AP75", "f1", "precision", "recall", "bleu", "meteor", "score"),
                *("mota", "idf1", "reward"),
            ),
            "max",
        ),
        **dict.fromkeys(
            (
                *("edit_distance", "point_distance", "false_facts", "false_captions", "chair_i", "chair_s"),
                *("unparsable", "unmatched", "dropped", "unlabelled", "unknown_label"),
            ),
            "min",
        ),
    }
)
SAMPLED = "sampled/"


def direction(metric: str) -> Mode | None:
    """Whether a metric is to be maximised or minimised; None if unknown."""
    name = metric.rpartition("/")[2]
    parts = (name, name.partition("_")[0], name.rpartition("_")[2])  # accuracy_TYPE; object_recall
    return next((DIRECTIONS[part] for part in parts if part in DIRECTIONS), None)


def check_metric(metric: str, known: Iterable[str], mode: Mode | None) -> Mode:
    """The direction of a metric. Raises ``ValueError``, which lists what is allowed, if it is not in ``known``."""
    names = list(known)
    if metric not in names:
        bare = metric.removeprefix("eval/")
        near = bare if bare in names else nearest(metric, names)
        hint = f"; did you mean {near}?" if near else "."
        raise ValueError(f"eval.metric: no metric {metric!r} here{hint} There are: {', '.join(names)}")
    found = mode or direction(metric)
    if found is None:
        raise ValueError(f"eval.metric: the direction of {metric} is not known: set eval.mode to max or min")
    return found


@dataclass
class Best:
    """The best value of one metric so far, and the number of evaluations since.

    Args:
        mode: whether the metric is maximised or minimised.
        min_delta: a new best must improve on the previous one by more than this.
        patience: consecutive evaluations without improvement after which training stops; None: no limit.

    ``step`` and ``value`` belong to the best (None: none yet); ``start`` is the value before the first step.
    """

    mode: Mode
    min_delta: float = 0.0
    patience: int | None = None
    step: int | None = None
    value: float | None = None
    waited: int = 0
    start: float | None = None

    def take(self, step: int, value: float | None) -> bool:
        """Record the value of an evaluation after ``step``; return whether it is the best so far.

        An undefined value never is. The value of step 0 is only a baseline, as no checkpoint has those weights.
        """
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
        """Whether the patience is exhausted."""
        return self.patience is not None and self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"step": self.step, "value": self.value, "waited": self.waited, "start": self.start}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state`. Raises ``KeyError`` or ``TypeError`` if it is malformed."""
        self.step, self.value = _maybe(int, state["step"]), _maybe(float, state["value"])
        self.waited, self.start = int(state["waited"]), _maybe(float, state["start"])

    def _gain(self, value: float, other: float) -> float:
        return value - other if self.mode == "max" else other - value


def _maybe(kind: type, value: Any) -> Any:
    return None if value is None else kind(value)
