"""The format reward of answers after a thought."""

from __future__ import annotations

import pytest

from fastrl.data import load_data
from fastrl.rewards import reward_for
from fastrl.rewards.format import thought_out, well_formed

BOX = '[{"bbox_2d": [1, 2, 3, 4]}]'


@pytest.mark.parametrize(
    ("answer", "inner"),
    [
        ("<think>a</think><answer>b</answer>", "b"),
        (" <think>\na\n</think>\n<answer> b </answer>\n", "b"),
        ("<think>a</think><answer>b</answer><|im_end|>", "b"),
        ("<think>a</think><answer></answer>", ""),
        ("<think></think><answer>b</answer>", None),
        ("a</think><answer>b</answer>", None),
        ("<think>a</think>b", None),
        ("<think>a</think><answer>b", None),
        ("<think>a</think><answer>b</answer> c", None),
        ("<think>a<think>b</think><answer>b</answer>", None),
        ("<think>a</think><answer>b</answer><answer>c</answer>", None),
        ("<think><answer>a</think><answer>b</answer>", None),
        ("<answer>b</answer><think>a</think>", None),
        ("b", None),
    ],
)
def test_a_thought_stands_before_an_answer_and_nothing_else(answer: str, inner: str | None) -> None:
    assert thought_out(answer) == inner


def test_the_answer_inside_has_the_exact_form() -> None:
    plain = next(text for text in (BOX, '[{"bbox_2d": [1, 2, 3, 4], "label": "x"}]') if _strict(text))
    assert well_formed("grounding", f"<think>a</think><answer>{plain}</answer>", "resized", "thinking")
    assert not well_formed("grounding", f"<think>a</think><answer>{plain}x</answer>", "resized", "thinking")
    assert not well_formed("grounding", plain, "resized", "thinking")
    assert not well_formed("grounding", f"<think>a</think><answer>{plain}</answer>", "resized", "strict")


def _strict(text: str) -> bool:
    return well_formed("grounding", text, "resized", "strict")


@pytest.mark.parametrize("task", ["grounding", "counting", "detection", "trajectory"])
def test_every_task_with_a_form_takes_it_as_an_option(task: str) -> None:
    reward = reward_for(task, format="thinking")
    record = load_data(f"scenes:{task}?n=1&seed=1&size=84")[0]
    lacking, plain = reward(["<think>a</think>nothing", "nothing"], record)["format"]
    assert lacking == plain <= 0.0


def test_what_is_thought_is_not_paid_and_what_is_answered_is() -> None:
    record = load_data("scenes:grounding?n=1&seed=1&size=84")[0]
    x1, y1, x2, y2 = record.target["box"]
    right, wrong = f'[{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}]}}]', '[{"bbox_2d": [0, 0, 1, 1]}]'
    reward = reward_for("grounding", format="thinking", frame="original")
    paid = reward([f"<think>{t}</think><answer>{a}</answer>" for t, a in ((wrong, right), (right, wrong))], record)
    assert paid["iou"][0] == pytest.approx(1.0)
    assert paid["iou"][1] < 0.2
