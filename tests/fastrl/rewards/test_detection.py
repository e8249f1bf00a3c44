"""Detection reward against an oracle of the formulas in NumPy and SciPy, and named edge cases."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from fastrl.answers import View, format_answer
from fastrl.data.records import Record
from fastrl.rewards import reward_for
from fastrl.rewards.reading import batches

NAMES = ["cat", "dog", "hot dog"]
Labelled = list[tuple[tuple[float, ...], str]]


def record(truth: Labelled, crowd: list[bool] | None = None, frame: str = "original") -> Record:
    target = {
        "boxes": [list(box) for box, _ in truth],
        "labels": [label for _, label in truth],
        "crowd": crowd or [False] * len(truth),
        "categories": NAMES,
    }
    return Record("a", "detection", (), (), target, views=(View(640, 480, 644, 476),), frame=frame)


def answer(found: Labelled) -> str:
    return json.dumps([{"bbox_2d": list(box), "label": label} for box, label in found])


def iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0.0) * max(h, 0.0)
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / area if inter > 0 else 0.0


def oracle(found: Labelled, truth: Labelled, threshold: float = 0.5) -> dict[str, float]:
    """Components by the formulas, except ``class``, which is ambiguous for ties between equally good matchings."""
    if not found and not truth:
        return {"location": 1.0, "f1": 1.0, "missing": 0.0}
    if not found or not truth:
        return {"location": 0.0, "f1": 0.0, "missing": -1.0 if truth else 0.0}
    quality = np.array([[iou(p, t) for t, _ in truth] for p, _ in found])
    rows, cols = linear_sum_assignment(quality, maximize=True)
    pairs = [q for q in quality[rows, cols] if q > 0]
    hits = sum(q >= threshold for q in pairs)
    return {
        "location": float(np.mean(pairs)) if pairs else 0.0,
        "f1": 2 * hits / (len(found) + len(truth)),
        "missing": (hits - len(truth)) / len(truth),
    }


corner = st.floats(0, 50).map(lambda v: round(v, 3))
side = st.floats(1, 40).map(lambda v: round(v, 3))
box = st.tuples(corner, corner, side, side).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
labelled = st.lists(st.tuples(box, st.sampled_from(NAMES)), max_size=7)


@given(labelled, labelled)
def test_components_equal_the_formulas(found: Labelled, truth: Labelled) -> None:
    got = {name: values[0] for name, values in reward_for("detection")([answer(found)], record(truth)).items()}
    want = oracle(found, truth)
    assert {name: got[name] for name in ("f1", "missing")} == pytest.approx({n: want[n] for n in ("f1", "missing")})
    assert got["location"] == pytest.approx(want["location"], abs=1e-9)
    assert 0.0 <= got["class"] <= 1.0


TWO: Labelled = [((0.0, 0.0, 10.0, 10.0), "cat"), ((20.0, 20.0, 40.0, 40.0), "hot dog")]
POSITIVE = {"location": 1.0, "class": 1.0, "f1": 1.0, "missing": 0.0, "format": 1.0}


def parts(text: str, row: Record, **options: Any) -> dict[str, float]:
    return {name: values[0] for name, values in reward_for("detection", **options)([text], row).items()}


@pytest.mark.parametrize("style", ["qwen2_5", "qwen2"])
def test_the_truth_as_answer_earns_everything(style: str) -> None:
    truth: Labelled = [((64.0, 48.0, 320.0, 240.0), "cat"), ((0.0, 0.0, 160.0, 120.0), "hot dog")]
    row = record(truth, frame="resized" if style == "qwen2_5" else "thousand")
    got = parts(format_answer("detection", row.target, style, row.views[0]), row)
    assert got == pytest.approx(POSITIVE, abs=0.01)
    assert reward_for("detection").total({k: [v] for k, v in got.items()}) == pytest.approx([4.0], abs=0.02)


def test_order_does_not_matter_when_matched_and_does_in_sequence() -> None:
    assert parts(answer(TWO[::-1]), record(TWO)) == POSITIVE
    swapped = parts(answer(TWO[::-1]), record(TWO), matching="sequence")
    assert swapped == {"location": 0.0, "class": 0.0, "f1": 0.0, "missing": -1.0, "format": 1.0}
    assert parts(answer(TWO), record(TWO), matching="sequence") == POSITIVE


def test_duplicates_and_surplus_lower_f1_only() -> None:
    got = parts(answer(TWO + TWO), record(TWO))
    assert got == {**POSITIVE, "f1": pytest.approx(2 * 2 / 6)}


def test_repeats_of_one_hit_are_surplus() -> None:
    assert parts(answer(TWO[:1] * 4), record(TWO[:1])) == {**POSITIVE, "f1": pytest.approx(0.4)}
    many = TWO[:1] * 5000
    assert parts(answer(many), record(many), max_items=5000) == POSITIVE  # ties only: every pair is as good


def test_wrong_labels_cost_the_class_part_and_case_does_not_matter() -> None:
    wrong = [(TWO[0][0], "dog"), (TWO[1][0], " Hot Dog ")]
    assert parts(answer(wrong), record(TWO))["class"] == 0.5
    unlabelled = json.dumps([{"bbox_2d": list(box)} for box, _ in TWO])
    assert parts(unlabelled, record(TWO)) == {**POSITIVE, "class": 0.0, "format": 0.0}


def test_threshold_decides_found_and_missing_not_location() -> None:
    truth: Labelled = [((0.0, 0.0, 10.0, 10.0), "cat")]
    text = answer([((0.0, 0.0, 10.0, 6.0), "cat")])
    assert parts(text, record(truth), threshold=0.5) == {**POSITIVE, "location": pytest.approx(0.6)}
    strict = parts(text, record(truth), threshold=0.75)
    assert strict == {**POSITIVE, "location": pytest.approx(0.6), "f1": 0.0, "missing": -1.0}


def test_nothing_there_and_nothing_said() -> None:
    assert parts("[]", record([])) == POSITIVE
    nothing = {"location": 0.0, "class": 0.0, "f1": 0.0}
    assert parts("I see no objects.", record([])) == {**nothing, "missing": 0.0, "format": 0.0}
    assert parts("[]", record(TWO)) == {**nothing, "missing": -1.0, "format": 1.0}
    assert parts(answer(TWO), record([])) == {**nothing, "missing": 0.0, "format": 1.0}


def test_crowd_regions_are_no_truth() -> None:
    assert parts(answer(TWO[:1]), record(TWO, crowd=[False, True])) == POSITIVE


def test_one_huge_answer_does_not_change_the_others() -> None:
    spam = answer([((float(i), 0.0, i + 5.0, 5.0), "cat") for i in range(512)])
    answers = [answer(TWO), spam, answer(TWO[:1]), "junk"]
    rows = [record(TWO), record(TWO * 40), record(TWO), record(TWO)]
    reward = reward_for("detection")
    together = reward.score(answers, rows)
    for i in range(len(answers)):
        alone = reward.score([answers[i]], [rows[i]])
        assert {name: values[i] for name, values in together.items()} == {name: v[0] for name, v in alone.items()}


def test_max_items_bounds_what_is_read() -> None:
    assert parts(answer(TWO + TWO), record(TWO), max_items=2) == POSITIVE


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold must lie in"):
        reward_for("detection", threshold=threshold)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=30), st.integers(1, 400))
def test_batches_hold_every_problem_once_within_the_budget(sizes: list[tuple[int, int]], cells: int) -> None:
    n_pred, n_truth = [p for p, _ in sizes], [t for _, t in sizes]
    found = list(batches(n_pred, n_truth, cells))
    assert sorted(i for batch in found for i in batch) == list(range(len(sizes)))
    for batch in found:
        padded = len(batch) * max(n_pred[i] for i in batch) * max(n_truth[i] for i in batch)
        assert len(batch) == 1 or padded <= cells
