"""What methods that sample share: prompts → groups of answers, and the reward a recipe gives the task of its data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastrl.batch import PromptGroup
from fastrl.methods.base import Context

if TYPE_CHECKING:
    from fastrl.config.sections import RewardRecipe
    from fastrl.data.records import Record
    from fastrl.rewards import Reward


def sample_groups(context: Context, records: Sequence[Record]) -> list[PromptGroup]:
    """Encode each record once and sample its answers as the recipe's rollout section says."""
    from fastrl.rollout import Sampling

    rollout = context.rollout
    with context.clock.phase("preprocess"):
        encoded = [context.policy.encode(record) for record in records]
    sampling = Sampling(
        n=rollout.group_size,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
    )
    answers = context.generator.generate([prompt for prompt, _ in encoded], sampling, context.rng)
    return [PromptGroup(p, completions, record) for (p, record), completions in zip(encoded, answers, strict=True)]


class RecipeRewards:
    """The reward of each task, made from the recipe's reward section when the task is first met.

    Args:
        section: the recipe's reward section.
        without_format: leave the format component out unless the recipe asks for it.
    """

    def __init__(self, section: RewardRecipe, *, without_format: bool = False) -> None:
        self._section, self._without_format = section, without_format
        self._rewards: dict[str, Reward] = {}

    def misfit(self, record: Record) -> str | None:
        """Why answers to a record cannot be scored; None: they can, or it brings answers with their rewards."""
        return None if "list" in record.target else self.of(record.task).misfit(record)

    def check(self, records: Sequence[Record]) -> None:
        """Raise ``ValueError`` where the recipe's reward does not fit a record's task; called before any sampling."""
        for task in dict.fromkeys(record.task for record in records):
            self.of(task)

    def of(self, task: str) -> Reward:
        """The reward of ``task``. Raises ``ValueError`` where the recipe's options are not that task's."""
        if task not in self._rewards:
            from fastrl.rewards import REWARDS, reward_for

            options: dict[str, Any] = {"weights": self._section.weights} if self._section.weights else {}
            if self._without_format and task in REWARDS and "format" in REWARDS[task].parts:
                options["format"] = "none"
                if "format" not in self._section.options:
                    options["weights"] = {k: w for k, w in self._section.weights.items() if k != "format"}
            try:
                self._rewards[task] = reward_for(task, **{**options, **self._section.options})
            except ValueError as error:
                raise ValueError(
                    f"the recipe's reward does not fit the data, which is {task}: {error}. Take a {task} recipe, or "
                    f"data of the recipe's task"
                ) from None
        return self._rewards[task]
