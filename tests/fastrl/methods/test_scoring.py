"""Rewards and advantages are checked before they are used for training; errors name the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.batch import Completion, Prompt, PromptGroup
from fastrl.data.records import Record
from fastrl.methods.ranking import rank_answers
from fastrl.methods.scoring import check_advantages
from fastrl.rewards.base import Reward
from fastrl.rewards.checked import RewardError
from fastrl.rewards.ocr import OcrReward
from fastrl.run import keeping
from fastrl.trainer import TrainingError, train
from tests.helpers.training import make_recipe, make_records

RECORDS = [Record(f"r{i}", "ocr", (), (), {"text": "x"}, source=f"rows.jsonl:{i + 1}") for i in range(3)]
ANSWERS = ["first", "second", "third"]


class Made(Reward):
    """A reward with given values."""

    def __init__(self, make: Callable[[Sequence[str]], Any]) -> None:
        object.__setattr__(self, "make", make)
        object.__setattr__(self, "weights", {})
        object.__setattr__(self, "task", "made")

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> Any:
        return self.make(answers)  # type: ignore[attr-defined]

    def readable(self, answers: Sequence[str], records: Sequence[Record]) -> list[bool]:
        return [True] * len(answers)


def second(value: Any) -> Callable[[Sequence[str]], Any]:
    """``value`` for the second answer, 0.5 for the others, beside a valid component."""
    return lambda answers: {
        "good": [1.0] * len(answers),
        "odd": [value if answer == "second" else 0.5 for answer in answers],
    }


@pytest.mark.parametrize(
    ("rewards", "advantages", "message"),
    [
        ([0.0, 1e-300], [-1e-296, 1e-296], "vanish"),
        ([0.0, 1.0], [-1e300, 1e300], "overflow"),
        ([0.0, 1.0], [float("nan"), 0.0], "overflow"),
        ([0.5, 0.5], [0.0, 0.0], ""),
        ([0.0, 1e-9], [-5e-6, 5e-6], ""),
    ],
)
def test_advantages_that_float32_does_not_hold_are_named(
    rewards: list[float], advantages: list[float], message: str
) -> None:
    completions = [Completion(torch.tensor([1]), text=f"a{i}", scalars={"reward": r}) for i, r in enumerate(rewards)]
    group = PromptGroup(Prompt(torch.tensor([1]), torch.zeros(3, 1, dtype=torch.int64)), completions, RECORDS[0])
    values = [torch.tensor(advantages, dtype=torch.float64)]
    if not message:
        check_advantages([group], values)
        return
    with pytest.raises(RewardError, match=rf"record 'r0' \(rows.*advantages that {message} in float32; .*'a1'"):
        check_advantages([group], values)


@pytest.mark.parametrize("value", [float("nan"), 1e300, "1", None, 1e-300])
def test_a_step_with_such_a_reward_stops_the_run_and_is_named(
    value: Any, tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, steps = OcrReward.score, []

    def score(self: OcrReward, answers: Sequence[str], records: Sequence[Record]) -> Any:
        found = whole(self, answers, records)
        steps.append(1)
        if len(steps) == 1:
            return found
        return {name: [value if i == 5 else 0.0 for i in range(len(answers))] for name in found}

    monkeypatch.setattr(OcrReward, "score", score)
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, checkpoint__every=1, optim__steps=2)
    message = "advantages that vanish .*answer .*components" if value == 1e-300 else "answer .*component"
    with pytest.raises(TrainingError, match=rf"^step 2: .*record 'r\d'.*{message}"):
        train(recipe, records=make_records(), show=False)
    assert [path.name for path in keeping.list_checkpoints(tmp_path)] == ["step-00000001"]


def test_lists_are_ranked_by_checked_rewards() -> None:
    completions = [Completion(torch.tensor([1]), text=text, finished=True) for text in ANSWERS]
    group = PromptGroup(Prompt(torch.tensor([1]), torch.zeros(3, 1, dtype=torch.int64)), completions, RECORDS[1])
    with pytest.raises(RewardError, match=r"record 'r1' \(rows\.jsonl:2\), answer 'second': component 'odd' is nan"):
        rank_answers([group], Made(second(float("nan"))))
    (ranking,) = rank_answers([group], Made(second(0.75)))
    assert ranking.order == [1, 0, 2]
