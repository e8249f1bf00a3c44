"""The best evaluation of a run: the metric, its direction, and when patience is exhausted."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrl.data import load_data
from fastrl.data.records import Record
from fastrl.evaluate import evaluate
from fastrl.evaluate.best import Best, Mode, check_metric, direction

QUESTIONS = [
    Record("a", "qa", (), (), {"choices": ["x", "y"], "answer": 1, "type": "CW"}),
    Record("b", "qa", (), (), {"answer": "yes"}),
]


@pytest.mark.parametrize("task", ["grounding", "counting", "detection", "ocr", "caption", "trajectory", "qa"])
def test_the_direction_of_every_metric_of_a_protocol_is_known(task: str) -> None:
    """The truth as answer scores better than an empty answer."""
    records = QUESTIONS if task == "qa" else list(load_data(f"scenes:{task}?n=2"))
    for name, nothing in evaluate(task, records, [""] * len(records)).items():
        if name in ("n", "yes_rate"):
            assert direction(name) is None
        else:
            assert nothing is not None or name == "point_distance"  # an answer without a point has none
            assert direction(f"sampled/{task}/{name}") == direction(name) == ("min" if _is_error(name) else "max")


def _is_error(name: str) -> bool:
    """Metrics that count errors."""
    words = ("distance", "false", "chair", "unparsable", "unmatched", "dropped", "unlabelled", "unknown")
    return any(word in name for word in words)


@pytest.mark.parametrize(
    ("metric", "mode", "message"),
    [
        ("acc", None, "no metric 'acc' here; did you mean accuracy"),
        ("eval/accuracy", None, "did you mean accuracy"),
        ("zzz", None, r"There are: accuracy, yes_rate, sampled/accuracy$"),
        ("yes_rate", None, "the direction of yes_rate is not known: set eval.mode"),
    ],
)
def test_a_metric_that_cannot_decide_is_refused(metric: str, mode: Mode | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_metric(metric, ["accuracy", "yes_rate", "sampled/accuracy"], mode)


def test_a_mode_that_is_given_counts() -> None:
    assert check_metric("accuracy", ["accuracy"], None) == "max"
    assert check_metric("accuracy", ["accuracy"], "min") == "min"
    assert check_metric("yes_rate", ["yes_rate"], "min") == "min"


values = st.one_of(st.none(), st.just(math.nan), st.floats(-10, 10))


@given(series=st.lists(values, max_size=12), mode=st.sampled_from(["max", "min"]), delta=st.floats(0, 3))
def test_the_best_is_the_last_that_was_better_by_more_than_the_least_gain(
    series: list[float | None], mode: Any, delta: float
) -> None:
    best, sign = Best(mode, delta, patience=3), 1 if mode == "max" else -1
    assert not best.take(0, 100.0 * sign)  # of weights that are in no checkpoint
    expected: tuple[int, float] | None = None
    waited = 0
    for step, value in enumerate(series, start=1):
        known = value is not None and math.isfinite(value)
        better = known and (expected is None or sign * value - sign * expected[1] > delta)
        expected, waited = ((step, value), 0) if better else (expected, waited + 1)
        assert best.take(step, value) == better
        assert best.over == (waited >= 3)
        again = Best(mode, delta, patience=3)
        again.load(best.state())
        assert again == best
    assert (best.step, best.value) == (expected or (None, None))
    assert best.start == 100.0 * sign


def test_without_patience_it_is_never_over() -> None:
    best = Best("max")
    for step in range(1, 100):
        best.take(step, 0.0)
    assert not best.over
    assert (best.step, best.waited) == (1, 98)
