"""Perception-R1 with given answers and rewards in place of a model and rules."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from fastrl.batch import Completion, Prompt, PromptGroup
from fastrl.data.records import Record
from fastrl.data.stream import RecordStream
from fastrl.methods.base import Context
from fastrl.methods.perception_r1 import PerceptionR1, PerceptionR1Options
from fastrl.recipe import RewardRecipe, RolloutRecipe


def text_group(lengths: Sequence[int], advantages: Sequence[float], *, finished: Sequence[bool] = ()) -> PromptGroup:
    """A text prompt with completions of these lengths."""
    prompt = Prompt(token_ids=torch.arange(3), positions=torch.arange(3).expand(3, 3))
    completions = [
        Completion(token_ids=torch.arange(n), finished=finished[i] if finished else True, scalars={"advantage": a})
        for i, (n, a) in enumerate(zip(lengths, advantages, strict=True))
    ]
    return PromptGroup(prompt=prompt, completions=completions)


class Scripted(PerceptionR1):
    """Answers and rewards by record id, in place of a model and rules."""

    def __init__(self, options: PerceptionR1Options, context: Context, rewards: dict[str, list[float]]) -> None:
        super().__init__(options, context)
        self.given = rewards

    def _sample(self, records: Sequence[Record]) -> list[PromptGroup]:
        groups = []
        for record in records:
            group = text_group([2] * len(self.given[record.id]), [0.0] * len(self.given[record.id]))
            group.record = record
            groups.append(group)
        return groups

    def _score(self, groups: Sequence[PromptGroup]) -> None:
        for group in groups:
            assert group.record is not None
            for completion, reward in zip(group.completions, self.given[group.record.id], strict=True):
                completion.rewards = {"part": reward}
                completion.scalars["reward"] = reward


def scripted(rewards: dict[str, list[float]], **options: Any) -> Scripted:
    records = [Record(id=name, task="ocr", images=(), messages=(), target={}) for name in rewards]
    context = Context(
        policy=SimpleNamespace(),  # type: ignore[arg-type]
        stream=RecordStream(records, order="file"),
        rng=torch.Generator(),
        rollout=RolloutRecipe(max_new_tokens=10),  # type: ignore[call-arg]
        reward=RewardRecipe(),
    )
    return Scripted(PerceptionR1Options(**options), context, rewards)


FLAT, MIXED = [1.0, 1.0], [0.0, 1.0]


def scored(answers: list[str], task: str = "detection") -> tuple[PerceptionR1, list[PromptGroup]]:
    """A group of answers to one picture with a cat, scored by the task's rules."""
    box = [0.0, 0.0, 10.0, 10.0]
    target = {"boxes": [box], "labels": ["cat"], "crowd": [False], "categories": ["cat"], "box": box}
    record = Record(id="r1", task=task, images=(), messages=(), target=target, source="d.jsonl:3", frame="original")
    method = PerceptionR1(PerceptionR1Options(beta=0.0), scripted({"a": FLAT}).context)
    group = text_group([2] * len(answers), [0.0] * len(answers))
    for completion, text in zip(group.completions, answers, strict=True):
        completion.text = text
    group.record = record
    return method, [group]
