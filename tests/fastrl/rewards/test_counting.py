"""Counting reward against brute-force optimal matching, and against the precursor in the development repository."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrl.answers import View
from fastrl.data.records import Record
from fastrl.rewards import reward_for
from fastrl.rewards.counting import point_distances

Points = list[tuple[float, float]]


def record(points: Points | None, boxes: Any = None, count: int | None = None, frame: str = "thousand") -> Record:
    n = count if count is not None else len(points if points is not None else boxes)
    target = {"label": "dog", "count": n, "points": points, "boxes": boxes}
    return Record("a", "counting", (), (), target, views=(View(2000, 500, 1988, 504),), frame=frame)


def in_pixels(points: Points) -> Points:
    """0–1000 → pixels of the 2000×500 image."""
    return [(x * 2.0, y * 0.5) for x, y in points]


def as_boxes(points: Points) -> str:
    """Qwen2-VL boxes whose centres are the points."""
    return "".join(f"<|box_start|>({x - 1},{y - 2}),({x + 1},{y + 2})<|box_end|>" for x, y in points) or "[]"


def best_score(predicted: Points, truth: Points) -> float:
    """Σ (1 − d / (1000 √2)) under the best one-to-one matching, divided by the larger number of points."""
    if not predicted or not truth:
        return 1.0 if not predicted and not truth else 0.0
    small, large = sorted([predicted, truth], key=len)
    best = max(
        sum(1 - math.dist(a, b) / (1000 * math.sqrt(2)) for a, b in zip(small, chosen, strict=True))
        for chosen in itertools.permutations(large, len(small))
    )
    return best / len(large)


coordinates = st.integers(2, 998).map(float)
points_of_image = st.lists(st.tuples(coordinates, coordinates), max_size=5)


@given(points_of_image, points_of_image)
def test_points_equal_the_best_of_all_matchings(predicted: Points, truth: Points) -> None:
    got = reward_for("counting")([as_boxes(predicted)], record(in_pixels(truth)))["points"][0]
    assert got == pytest.approx(best_score(predicted, truth), abs=1e-9)


@given(st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=5), points_of_image)
def test_distances_are_those_of_the_nearest_matching(truth: Points, predicted: Points) -> None:
    (got,) = point_distances([as_boxes(predicted)], [record(in_pixels(truth))])
    small, large = sorted([predicted, truth], key=len)
    totals = [
        sum(math.dist(a, b) for a, b in zip(small, chosen, strict=True))
        for chosen in itertools.permutations(large, len(small))
    ]
    want = min(totals) / len(small) / (1000 * math.sqrt(2)) if small else None
    assert got == pytest.approx(want, abs=1e-6)


def test_a_distance_needs_points_on_both_sides() -> None:
    answers = ["[]", "There are none.", as_boxes([(500, 500)]), as_boxes([(500, 500)])]
    records = [record([(1000.0, 250.0)]), record([(1000.0, 250.0)]), record([]), record([(1000.0, 250.0)])]
    assert point_distances(answers, records) == [None, None, None, 0.0]
    with pytest.raises(ValueError, match="a: matching points needs true points or boxes, but this record has only a"):
        point_distances(["[]"], [record(None, count=2)])


def test_distance_is_measured_in_thousandths_of_each_side() -> None:
    row = record([(1000.0, 250.0)])  # the middle of 2000 × 500
    points = reward_for("counting")([as_boxes([(500, 500)]), as_boxes([(800, 900)])], row)["points"]
    assert points == pytest.approx([1.0, 1 - 500 / (1000 * math.sqrt(2))])


def test_missing_and_surplus_points_cost_the_same() -> None:
    truth: Points = [(100, 100), (500, 500), (900, 900)]
    row = record(in_pixels(truth))
    answers = [as_boxes(truth), as_boxes(truth[:2]), as_boxes([*truth, (5, 5)]), as_boxes(truth * 2)]
    assert reward_for("counting")(answers, row)["points"] == pytest.approx([1.0, 2 / 3, 3 / 4, 1 / 2])


def test_points_and_boxes_and_frames_are_read_alike() -> None:
    row = record([(1000.0, 250.0)], frame="auto")
    answers = [
        '[{"point_2d": [994, 252]}]',
        '[{"bbox_2d": [984, 242, 1004, 262], "label": "dog"}]',
        as_boxes([(500, 500)]),
    ]
    assert reward_for("counting")(answers, row)["points"] == pytest.approx([1.0, 1.0, 1.0])


def test_true_boxes_stand_for_their_centres() -> None:
    row = record(None, boxes=[[900.0, 200.0, 1100.0, 300.0]])
    assert reward_for("counting")([as_boxes([(500, 500)])], row)["points"] == pytest.approx([1.0])


def test_zero_objects_need_an_explicit_empty_answer() -> None:
    reward = reward_for("counting", exact_bonus=1.0)
    got = reward(["[]", "There are none.", as_boxes([(5, 5)])], record([]))
    assert got["points"] == [1.0, 0.0, 0.0]
    assert got["count"] == [1.0, 0.0, 0.0]
    assert reward.readable(["[]", "There are none."], [record([])] * 2) == [True, False]


def test_precursor_keeps_the_formula_as_written_and_ignores_surplus() -> None:
    row = record(in_pixels([(100, 100)]))
    reward = reward_for("counting", score_by="precursor")
    near = 1 - 50 / 1000 * math.sqrt(2)
    answers = [as_boxes([(100, 150)]), as_boxes([(100, 150), (900, 900)]), as_boxes([(998, 998)]), "nothing"]
    far = 1 - math.dist((998, 998), (100, 100)) / 1000 * math.sqrt(2)
    assert reward(answers, row)["points"] == pytest.approx([near, near, far, 0.0])


def test_combined_precursor_is_a_choice_of_weights() -> None:
    weights = {"format": 0.25, "count": 0.55, "points": 0.7}
    reward = reward_for("counting", score_by="precursor", exact_bonus=1.0, weights=weights)
    parts = reward([as_boxes([(100, 100)])], record(in_pixels([(100, 100)])))
    assert reward.total(parts) == pytest.approx([0.25 + 0.25 + 0.7 + 0.3])


def test_exact_bonus_and_count_only() -> None:
    row = record(None, count=2)
    answers = [as_boxes([(5, 5), (9, 9)]), as_boxes([(5, 5)]), "two"]
    assert reward_for("counting", score_by="count")(answers, row)["points"] == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="use score_by='count'"):
        reward_for("counting")(answers, row)


def test_an_answer_cut_at_max_items_is_never_the_exact_count() -> None:
    reward = reward_for("counting", score_by="count", max_items=3)
    assert reward([as_boxes([(5, 5)] * 3), as_boxes([(5, 5)] * 9)], record(None, count=3))["points"] == [1.0, 0.0]


def test_points_far_outside_the_image_score_zero_but_count_as_surplus() -> None:
    row = record(in_pixels([(100, 100)]))
    answer = as_boxes([(100, 100)]) + "<|box_start|>(1e300,1e300),(1e300,1e300)<|box_end|>"
    assert reward_for("counting")([answer], row)["points"] == pytest.approx([0.5])


def test_a_box_with_its_corners_the_wrong_way_round_is_none() -> None:
    row = record(in_pixels([(50.0, 50.0)]))
    found = reward_for("counting", exact_bonus=1.0)(["<|box_start|>(60,60),(40,40)<|box_end|>"], row)
    assert (found["points"], found["count"]) == ([0.0], [0.0])
    both = "<|box_start|>(60,60),(40,40)<|box_end|><|box_start|>(40,40),(60,60)<|box_end|>"
    assert reward_for("counting")([both], row)["points"] == [1.0]
    assert reward_for("counting").readable([both, both[: len(both) // 2]], [row] * 2) == [True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exact_bonus": "abc"}, "counting reward: exact_bonus must be a finite number, got 'abc'"),
        ({"exact_bonus": math.nan}, "exact_bonus must be a finite number, got nan"),
        ({"exact_bonus": True}, "exact_bonus must be a finite number, got True"),
        ({"max_items": 2.5}, "max_items must be a whole number, got 2.5"),
    ],
)
def test_an_option_of_the_wrong_type_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward_for("counting", **options)


def test_a_record_without_points_does_not_fit() -> None:
    counted = record(None, count=2)
    assert "has only a count" in str(reward_for("counting").misfit(counted))
    assert reward_for("counting", score_by="count").misfit(counted) is None
    assert reward_for("counting").misfit(record([(1.0, 2.0)])) is None
