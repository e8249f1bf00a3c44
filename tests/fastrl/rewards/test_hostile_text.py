"""For any model output, a reward is finite, in its documented range, fast, and raises nothing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fuzz_answers import fuzz
from fastrl.answers import View
from fastrl.data.records import Record
from fastrl.rewards import Reward, reward_for

VIEW = (View(640, 480, 644, 476),)
BOXES = [[10.0, 20.0, 200.0, 300.0], [300.0, 300.0, 400.0, 400.0]]
TARGETS = {
    "grounding": {"box": (10.0, 20.0, 200.0, 300.0), "expression": "the dog"},
    "counting": {"label": "dog", "count": 2, "points": [(5.0, 5.0), (600.0, 400.0)], "boxes": None},
    "detection": {"boxes": BOXES, "labels": ["dog", "cat"], "crowd": [False, False], "categories": ["cat", "dog"]},
    "ocr": {"text": "hello world"},
    "trajectory": {
        "tracks": [
            {
                "id": 1,
                "name": "dog",
                "boxes": {1: (10.0, 20.0, 200.0, 300.0), 3: (20.0, 20.0, 210.0, 300.0)},
                "spans": [{"action": "runs", "first": 1, "last": 3}],
            }
        ],
        "frames": 3,
    },
}
VARIANTS: list[Reward] = [
    reward_for("grounding"),
    reward_for("grounding", metric="graded", format="loose"),
    reward_for("counting", exact_bonus=1.0),
    reward_for("counting", score_by="precursor"),
    reward_for("detection"),
    reward_for("detection", matching="sequence"),
    reward_for("ocr"),
    reward_for("trajectory"),
]
LOWEST = {"missing": -1.0, "points": -1.0, "iou": -1.0, "trajectory/format": -1.0, "trajectory/iou": 0.0}

SYNTAX = [
    '[{"bbox_2d": [',
    "]",
    "}",
    "{",
    ", ",
    '"',
    "\\",
    "\n",
    '"label": "dog"',
    "```json",
    "[]",
    "<answer>",
    "</think>",
]
TOKENS = ["<|box_start|>", "<|box_end|>", "<|object_ref_start|>", "<|object_ref_end|>"]
NUMBERS = [
    "1, 2, 3, 4",
    "(1,2),(3,4)",
    "(600,400),(610,410)",
    "[10,20,200,300]",
    "nan",
    "inf",
    "1e400",
    "-0.0",
    "1e-320",
]
TRACKS = ["Track1: dog", "<Id1>", "Frame1:[1,2,3,4];", "Frame3:[10,20,200,300];", "</Id1>", " It runs in frames 1-99"]
ODD = ["9" * 30, "\ud800", "\x00", "字", "٣"]
pieces = st.sampled_from([*SYNTAX, *TOKENS, *NUMBERS, *TRACKS, *ODD])
hostile = st.one_of(st.text(max_size=60), st.lists(pieces, max_size=14).map("".join))


def check(reward: Reward, answers: list[str], frame: str = "auto") -> None:
    row = Record("a", reward.task, (), (), TARGETS[reward.task], views=VIEW, frame=frame)
    components = reward(answers, row)
    assert set(components) <= set(reward.parts)
    for name, values in components.items():
        assert len(values) == len(answers)
        for value in values:
            assert isinstance(value, float)
            assert math.isfinite(value)
            assert LOWEST.get(f"{reward.task}/{name}", LOWEST.get(name, 0.0)) <= value <= 1.0
    assert len(reward.readable(answers, [row] * len(answers))) == len(answers)


@pytest.mark.parametrize("reward", VARIANTS, ids=[f"{r.task}-{i}" for i, r in enumerate(VARIANTS)])
@given(
    answers=st.lists(hostile, min_size=1, max_size=4), frame=st.sampled_from(["auto", "thousand", "resized", "unit"])
)
def test_any_text_gives_finite_components_in_range(reward: Reward, answers: list[str], frame: str) -> None:
    check(reward, answers, frame)


def test_five_thousand_random_answers_raise_nowhere() -> None:
    """The same generator as in benchmarks/results/fuzz_answers.json: formats and rewards alternate."""
    assert fuzz(5000, seed=1, turns=True) > 100_000


HUGE = {
    "a million brackets": "[" * 1_000_000,
    "a million braces": "{" * 1_000_000,
    "ten megabytes of words": "x y " * 2_500_000,
    "ten megabytes of digits": "9" * 10_000_000,
    "half-open pairs": "(1," * 500_000,
    "open objects": '{"a":[' * 500_000,
    "box tokens": "<|box_start|>" * 500_000,
    "a hundred thousand boxes": "<|box_start|>(1,2),(3,4)<|box_end|>" * 100_000,
    "valid JSON": "[" + ",".join(['{"bbox_2d": [1, 2, 300, 400], "label": "dog"}'] * 100_000) + "]",
    "quotes": '"' * 3_000_000,
    "fences": "```json\n" * 500_000,
    "open tracks": "Track1: a<Id1>" * 200_000,
    "a track of a hundred thousand frames": "<Id1>" + "".join(f"Frame{t}:[1,2,3,4];" for t in range(100_000)),
    "tracks without end": "<Id1>Frame1:[1,2,3,4];" * 100_000,
    "actions": "<Id1>Frame1:[1,2,3,4];</Id1>" + " It runs in frames 1-999999," * 100_000,
}


@pytest.mark.gate
@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE.keys())
def test_huge_answers_are_scored_and_not_raised(text: str) -> None:
    # Quadratic parsing or matching of any of these would not finish within the test run.
    for reward in (VARIANTS[0], VARIANTS[2], VARIANTS[4], VARIANTS[6], VARIANTS[7]):
        check(reward, [text])
