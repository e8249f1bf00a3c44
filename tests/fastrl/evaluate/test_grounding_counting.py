"""Grounding and counting metrics on constructed answers, and on real data with the truth as answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fastrl.answers import View, format_answer
from fastrl.data import load_data
from fastrl.data.records import Record
from fastrl.evaluate import evaluate
from fastrl.rewards import reward_for
from fastrl.rewards.counting import DIAGONAL
from fastrl.rewards.reading import view_of


def grounding(box: tuple[float, ...], name: str = "a") -> Record:
    return Record(name, "grounding", (), (), {"box": box, "expression": "x"}, frame="original")


def counting(count: int) -> Record:
    return Record("a", "counting", (), (), {"label": "dog", "count": count, "points": None, "boxes": None})


def test_grounding_metrics_against_hand_computed_values() -> None:
    answers = ["[0, 0, 10, 10]", "[0, 0, 10, 5]", "[0, 0, 10, 9.5]", "[0, 0, 10, 7.5]", "no box", "[50, 50, 60, 60]"]
    got = evaluate("grounding", [grounding((0, 0, 10, 10))] * 6, answers)
    assert got == {
        "acc@0.5": pytest.approx(4 / 6),  # IoU of exactly the threshold counts
        "acc@0.75": pytest.approx(3 / 6),
        "acc@0.95": pytest.approx(2 / 6),
        "mean_iou": pytest.approx((1 + 0.5 + 0.95 + 0.75) / 6),
        "n": 6,
        "unparsable": 1,
    }


def test_no_epsilon_makes_a_perfect_unit_box_fall_short() -> None:
    tiny = grounding((0.1, 0.1, 0.1 + 2**-14, 0.1 + 2**-14))
    text = (
        f"[{tiny.target['box'][0]!r}, {tiny.target['box'][1]!r}, {tiny.target['box'][2]!r}, {tiny.target['box'][3]!r}]"
    )
    assert evaluate("grounding", [tiny], [text])["mean_iou"] == 1.0


def test_counting_is_exact_and_unparsable_is_wrong_not_zero() -> None:
    box = "<|box_start|>(1,2),(3,4)<|box_end|>"
    records = [counting(2), counting(2), counting(0), counting(0), counting(3)]
    answers = [
        box * 2,
        box * 3,
        "none of them",
        "[]",
        '[{"point_2d": [1, 2]}, {"point_2d": [3, 4]}, {"point_2d": [5, 6]}]',
    ]
    got = evaluate("counting", records, answers)
    assert got == {"accuracy": 3 / 5, "point_distance": None, "unmatched": 0, "n": 5, "unparsable": 1}


def placed(*points: tuple[float, float], size: tuple[int, int] = (1000, 1000), boxes: bool = False) -> Record:
    """A counting record of objects at points of a picture, or of boxes around them; answers are in its pixels."""
    around = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    target = {"label": "dog", "count": len(points), "points": None if boxes else points, "boxes": around}
    return Record("a", "counting", (), (), target, views=(View.unresized(*size),), frame="original")


def pointing(points: Sequence[tuple[float, float]]) -> str:
    return json.dumps([{"point_2d": point} for point in points])


def test_distance_is_the_mean_of_matched_points_then_of_records_as_a_share_of_the_diagonal() -> None:
    records = [
        placed((100, 100), (500, 500), (900, 100)),
        placed((500, 500), boxes=True),
        placed((200, 100), size=(400, 200)),  # the middle: both sides of a picture count as 1000
    ]
    answers = [
        pointing([(900, 200), (100, 300)]),  # the nearest two, 100 and 200 away; one is missing
        pointing([(0, 0), (500, 500)]),  # 0: the nearer one is matched; the other is one too many
        pointing([(200, 200)]),
    ]
    got = evaluate("counting", records, answers)
    each = [150 / DIAGONAL, 0, 500 / DIAGONAL]
    assert got == {
        "accuracy": pytest.approx(1 / 3),
        "point_distance": pytest.approx(sum(each) / 3),
        "unmatched": 0,
        "n": 3,
        "unparsable": 0,
    }


def test_records_without_points_have_no_distance_and_answers_without_are_counted() -> None:
    sizeless = replace(placed((500, 500)), views=())
    records = [placed((500, 500))] * 4 + [placed(), counting(1), sizeless]
    here = pointing([(500, 600)])
    got = evaluate("counting", records, [here, "[]", "I see one.", pointing([(1e9, 500)]), "[]", here, here])
    assert got["unmatched"] == 2  # of the seven, those that say no point where there is one
    assert got["point_distance"] == pytest.approx((100 / DIAGONAL + 1) / 2)  # outside: a diagonal away at most
    assert evaluate("counting", [counting(1), placed()], [here, "[]"])["point_distance"] is None


def test_the_right_number_of_points_in_the_middle_does_not_look_good() -> None:
    scenes = load_data("scenes:counting?n=200&seed=5&difficulty=2&size=84")
    records = [replace(scenes[i], frame="original", views=(View.unresized(84, 84),)) for i in range(len(scenes))]
    truth = [record.target["points"] for record in records]
    middle = [pointing([(42, 42)] * len(points)) for points in truth]
    tenth = [pointing([(x + 8.4 if x < 42 else x - 8.4, y) for x, y in points]) for points in truth]
    rewards = reward_for("counting", format="none").score(middle, records)["points"]
    blind, near = evaluate("counting", records, middle), evaluate("counting", records, tenth)
    assert sum(rewards) / 200 > 0.75  # the reward makes little of it
    assert blind["accuracy"] == near["accuracy"] == 1.0
    assert near["point_distance"] == pytest.approx(100 / DIAGONAL, rel=0.01)  # 0.07; close points may swap
    assert blind["point_distance"] > 2.5 * near["point_distance"]  # type: ignore[operator]


def framed(record: Record, style: str) -> Record:
    """The record as a model of this family sees it."""
    view = view_of(record)
    assert view is not None
    if style == "qwen2":
        return replace(record, views=(view,), frame="thousand")
    view = View(view.width, view.height, max(28, view.width // 28 * 28), max(28, view.height // 28 * 28))
    return replace(record, views=(view,), frame="resized")


@pytest.mark.parametrize("style", ["qwen2_5", "qwen2"])
@pytest.mark.parametrize(
    ("task", "spec"),
    [
        ("grounding", "refexp:{}/refexp/spare/expressions.jsonl?images={}"),
        ("counting", "pixmo:{}/counting/counts.jsonl?images={}"),
    ],
)
def test_the_truth_as_answer_is_perfect_on_real_data(data_dir: Path, task: str, spec: str, style: str) -> None:
    records = [framed(record, style) for record in load_data(spec.format(data_dir, data_dir), skip_bad=True)]
    answers = [format_answer(task, record.target, style, record.views[0]) for record in records]
    got = evaluate(task, records, answers)
    assert got["n"] == len(records) > 100
    assert got["unparsable"] == 0
    if task == "counting":
        assert got["accuracy"] == 1.0
        assert (got["point_distance"] or 0.0) < 0.01  # rounding to whole numbers
        assert got["unmatched"] == 0
    else:  # rounding to whole numbers lowers the IoU of small boxes slightly
        assert got["mean_iou"] > 0.97
        assert got["acc@0.75"] == 1.0


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="unknown task to evaluate 'countng'; did you mean 'counting'"):
        evaluate("countng", [], [])
    with pytest.raises(ValueError, match="2 records but 1 answers"):
        evaluate("counting", [counting(1)] * 2, ["x"])
    with pytest.raises(ValueError, match="no ocr records to evaluate"):
        evaluate("ocr", [], [])
    with pytest.raises(ValueError, match="a: a counting record cannot be evaluated as grounding"):
        evaluate("grounding", [counting(1)], ["x"])
