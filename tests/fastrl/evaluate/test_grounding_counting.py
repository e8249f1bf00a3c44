"""Grounding and counting metrics on constructed answers, and on real data with the truth as answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastrl.answers import View, format_answer
from fastrl.data import load_data
from fastrl.data.records import Record
from fastrl.evaluate import evaluate
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
    assert got == {"accuracy": 3 / 5, "n": 5, "unparsable": 1}


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
