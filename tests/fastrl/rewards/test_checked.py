"""An invalid reward is reported with record, component and answer, before advantages are computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fastrl.data.records import Record
from fastrl.rewards import Reward, reward_for
from fastrl.rewards.checked import RewardError, checked_scores

ANSWERS = ["good", "bad", "fine"]
ROWS = [Record(f"r{i}", "grounding", (), (), {}, source=f"d.jsonl:{i}") for i in range(3)]


class Own(Reward):
    """A user's reward that returns ``values`` of an answer."""

    task = "own"
    parts = ("a", "b")

    def __init__(self, values: Callable[[str], Any]) -> None:
        super().__init__()
        object.__setattr__(self, "values", values)

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> Any:
        given = [self.values(answer) for answer in answers]  # type: ignore[attr-defined]
        return {name: [value[i] for value in given] for i, name in enumerate(self.parts)}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "component 'b' is nan: rewards must lie within .*and finite"),
        (math.inf, "component 'b' is inf"),
        (1e300, r"component 'b' is 1e\+300: .* within ±1e\+09, beyond which advantages overflow or vanish"),
        (-1e300, r"component 'b' is -1e\+300"),
        (10**400, "component 'b' is 1000"),
        pytest.param(10**5000, "component 'b' is an integer of 16610 bits", id="huge"),
        ("1.0", "component 'b' must be a number, got str '1.0'"),
        (torch.tensor(1.0), r"component 'b' must be a number, got Tensor tensor\(1"),
        ([1.0], "component 'b' must be a number, got list"),
    ],
)
def test_a_value_that_is_no_reward_is_named(value: Any, message: str) -> None:
    reward = Own(lambda answer: (0.5, value if answer == "bad" else 1.0))
    with pytest.raises(RewardError, match=r"own_reward: record 'r1' \(d.jsonl:1\), answer 'bad': " + message):
        checked_scores(reward, ANSWERS, ROWS)


def test_an_answer_that_no_component_speaks_of_is_named_and_one_of_several_may_be_silent() -> None:
    with pytest.raises(RewardError, match=r"record 'r1'.* answer 'bad': every component \(a, b\) is None"):
        checked_scores(Own(lambda answer: (None, None) if answer == "bad" else (1.0, 1.0)), ANSWERS, ROWS)
    components, totals = checked_scores(Own(lambda answer: (None if answer == "bad" else 1.0, 0.5)), ANSWERS, ROWS)
    assert totals == [1.5, 0.5, 1.5]
    assert components["a"] == [1.0, None, 1.0]


def test_what_a_reward_raises_is_named_with_its_answer() -> None:
    def values(answer: str) -> tuple[float, float]:
        if answer == "bad":
            raise KeyError("size")
        return 1.0, 1.0

    with pytest.raises(RewardError, match=r"record 'r1' .*answer 'bad': raised KeyError: 'size'"):
        checked_scores(Own(values), ANSWERS, ROWS)


class Short(Own):
    def score(self, answers: Sequence[str], records: Sequence[Record]) -> Any:
        return {"a": [1.0] * len(answers), "b": [1.0]}


class Loose(Own):
    def score(self, answers: Sequence[str], records: Sequence[Record]) -> Any:
        return [1.0] * len(answers)


def test_a_wrong_number_of_values_is_named() -> None:
    with pytest.raises(RewardError, match="own_reward: component 'b': 1 values for 3 answers"):
        checked_scores(Short(lambda answer: None), ANSWERS, ROWS)
    with pytest.raises(RewardError, match=r"own_reward: score must give a list for each component, got \[1.0"):
        checked_scores(Loose(lambda answer: None), ANSWERS, ROWS)


def test_the_rewards_that_ship_pass_as_they_are() -> None:
    row = Record("a", "grounding", (), (), {"box": (0.0, 0.0, 10.0, 10.0), "expression": "x"}, frame="original")
    reward = reward_for("grounding")
    answers = ['[{"bbox_2d": [0, 0, 10, 10]}]', "x"]
    components, totals = checked_scores(reward, answers, [row] * 2)
    assert components == reward(answers, row)
    assert totals == [2.0, 0.0]
