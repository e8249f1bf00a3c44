"""Grounding reward: IoU, IoU² and the graded form against manually computed values, in every frame and format."""

from __future__ import annotations

from typing import Any

import pytest

from fastrl.answers import View
from fastrl.data.records import Record
from fastrl.rewards import reward_for

VIEW = View(640, 480, 644, 476)


def record(box: tuple[float, ...] = (64.0, 48.0, 320.0, 240.0), **fields: Any) -> Record:
    return Record("a", "grounding", (), (), {"box": box, "expression": "the dog"}, views=(VIEW,), **fields)


def iou_of(answer: str, row: Record, **options: Any) -> float:
    return reward_for("grounding", **options)([answer], row)["iou"][0]


QWEN2 = "<|object_ref_start|>the dog<|object_ref_end|><|box_start|>(100,100),(500,500)<|box_end|>"


@pytest.mark.parametrize(
    ("answer", "frame"),
    [
        ("[64, 48, 320, 240]", "original"),
        ('[{"bbox_2d": [64, 48, 320, 240]}]', "original"),
        ('```json\n[{"bbox_2d": [64.4, 47.6, 322.0, 238.0], "label": "x"}]\n```', "auto"),
        ("[64.4, 47.6, 322.0, 238.0]", "resized"),
        (QWEN2, "auto"),
        (QWEN2 + "<|im_end|>", "thousand"),
        ("(0.1, 0.1, 0.5, 0.5)", "auto"),
        ("(0.1, 0.1), (0.5, 0.5)", "unit"),
    ],
)
def test_the_true_box_scores_one_in_every_frame_and_spelling(answer: str, frame: str) -> None:
    assert iou_of(answer, record(frame=frame)) == pytest.approx(1.0, abs=1e-12)


def test_perfect_box_scores_exactly_one_without_epsilon() -> None:
    assert iou_of("[64, 48, 320, 240]", record(frame="original")) == 1.0
    tiny = record((0.0, 0.0, 1e-3, 1e-3), frame="original")
    assert iou_of("[0, 0, 0.001, 0.001]", tiny) == 1.0


def test_iou_and_its_square_against_hand_computed_values() -> None:
    row = record((0.0, 0.0, 10.0, 10.0), frame="original")
    answers = ["[5, 0, 15, 10]", "[0, 0, 10, 5]", "[20, 20, 30, 30]", "[10, 0, 20, 10]"]
    plain = reward_for("grounding")(answers, row)["iou"]
    assert plain == pytest.approx([1 / 3, 1 / 2, 0.0, 0.0], abs=1e-12)
    squared = reward_for("grounding", metric="iou_squared")(answers, row)["iou"]
    assert squared == pytest.approx([1 / 9, 1 / 4, 0.0, 0.0], abs=1e-12)


def test_graded_metric_orders_the_ways_to_fail() -> None:
    good = '[{"bbox_2d": [0, 0, 10, 5]}]'
    cases = {
        "no box at all": -1.0,
        "text around it [0, 0, 10, 5]": -1.0,
        '[{"bbox_2d": [10, 5, 0, 0]}]': -0.6,
        '[{"bbox_2d": [20, 20, 30, 30]}]': -0.2,
        good: 0.25,
    }
    row = record((0.0, 0.0, 10.0, 10.0), frame="original")
    assert reward_for("grounding", metric="graded")(list(cases), row)["iou"] == pytest.approx(list(cases.values()))


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "nothing",
        "[1, 2, 3]",
        "[320, 240, 64, 48]",
        "[64, 240, 320, 48]",
        "[64, 48, 64, 48]",
        "[nan, 1, 2, 3]",
        "[1e999, 0, 1, 1]",
        "[1e300, 0, 1e301, 1]",
        "[64, 48, 320, 1" + "0" * 500 + "]",
    ],
)
def test_unreadable_inverted_empty_and_non_finite_boxes_score_zero(answer: str) -> None:
    assert iou_of(answer, record(frame="original")) == 0.0


def test_the_first_box_counts() -> None:
    assert iou_of("[64, 48, 320, 240] or [0, 0, 1, 1]", record(frame="original")) == 1.0
    assert iou_of("[0, 0, 1, 1] or [64, 48, 320, 240]", record(frame="original")) == 0.0


def test_frame_option_overrides_the_record() -> None:
    row = record(frame="original")
    assert iou_of("[100, 100, 500, 500]", row, frame="thousand") == pytest.approx(1.0)
    assert iou_of("[100, 100, 500, 500]", row) < 0.5


def test_without_views_the_image_file_gives_the_size(tmp_path: Any) -> None:
    from PIL import Image

    path = tmp_path / "a.png"
    Image.new("RGB", (640, 480)).save(path)
    target = {"box": (64.0, 48.0, 320.0, 240.0), "expression": "x"}
    assert iou_of(QWEN2, Record("a", "grounding", (path,), (), target)) == pytest.approx(1.0)
    with Image.open(path) as image:
        assert iou_of(QWEN2, Record("a", "grounding", (image,), (), target)) == pytest.approx(1.0)


def test_a_record_without_any_size_compares_number_by_number() -> None:
    row = Record("a", "grounding", (), (), {"box": (100, 100, 500, 500), "expression": "x"})
    assert iou_of(QWEN2, row) == 1.0


@pytest.mark.parametrize(
    ("answer", "frame", "strict", "loose"),
    [
        (QWEN2, "thousand", 1.0, 1.0),
        (QWEN2 + "<|im_end|>", "auto", 1.0, 1.0),
        (QWEN2, "resized", 0.0, 1.0),
        ('[{"bbox_2d": [1, 2, 3, 4]}]', "resized", 1.0, 0.0),
        ('[{"bbox_2d": [1, 2, 3, 4]}]', "thousand", 0.0, 0.0),
        ('[{"bbox_2d": [1, 2, 3, 4]}]', "auto", 1.0, 0.0),
        ("<p>hello", "thousand", 0.0, 1.0),
        ("(1,2),(3,4)", "auto", 0.0, 0.0),
        ("", "auto", 0.0, 0.0),
    ],
)
def test_strict_format_escapes_what_the_released_pattern_did_not(
    answer: str, frame: str, strict: float, loose: float
) -> None:
    row = record(frame=frame)
    assert reward_for("grounding")([answer], row)["format"] == [strict]
    assert reward_for("grounding", format="loose")([answer], row)["format"] == [loose]
    assert "format" not in reward_for("grounding", format="none")([answer], row)


def test_many_records_in_one_call_equal_one_by_one() -> None:
    rows = [record((0.0, 0.0, 10.0 + i, 10.0), frame="original") for i in range(5)]
    answers = [f"[0, 0, 10, {5 + i}]" if i != 2 else "none" for i in range(5)]
    reward = reward_for("grounding")
    single = [reward([a], r)["iou"][0] for a, r in zip(answers, rows, strict=True)]
    assert reward.score(answers, rows)["iou"] == single
    assert reward.readable(answers, rows) == [True, True, False, True, True]
    assert reward.score([], []) == {"iou": [], "format": []}
