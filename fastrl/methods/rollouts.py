"""What methods that sample share: prompts → groups of answers, and the reward a recipe gives the task of its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        origins: sections of the entries of a mixture, by name; records of these are scored by theirs.
        without_format: leave the format component out unless the recipe asks for it.
    """

    def __init__(
        self, section: RewardRecipe, origins: Mapping[str, RewardRecipe] | None = None, *, without_format: bool = False
    ) -> None:
        self._section, self._origins, self._without_format = section, origins or {}, without_format
        self._rewards: dict[tuple[str, str], Reward] = {}

    def misfit(self, record: Record) -> str | None:
        """Why answers to a record cannot be scored; None: they can, or it brings answers with their rewards."""
        return None if "list" in record.target else self.of(record.task, record.origin).misfit(record)

    def check(self, records: Sequence[Record]) -> None:
        """Raise ``ValueError`` where the recipe's reward does not fit a record's task; called before any sampling."""
        for record in records:
            self.of(record.task, record.origin)

    def of(self, task: str, origin: str = "") -> Reward:
        """The reward of ``task``, in a part of a mixture. Raises ``ValueError`` where the recipe's options are not that
        task's."""
        key = origin, task
        if key not in self._rewards:
            self._rewards[key] = self._make(task, self._origins.get(origin, self._section))
        return self._rewards[key]

    def members(self, groups: Sequence[PromptGroup]) -> list[tuple[Reward, list[PromptGroup]]]:
        """The groups that each reward scores, in order of first appearance."""
        found: dict[tuple[str, str], list[PromptGroup]] = {}
        for group in groups:
            assert group.record is not None
            found.setdefault((group.record.origin, group.record.task), []).append(group)
        return [(self._rewards[key], members) for key, members in found.items()]

    def _make(self, task: str, section: RewardRecipe) -> Reward:
        from fastrl.rewards import REWARDS, reward_for

        options: dict[str, Any] = {"weights": section.weights} if section.weights else {}
        if self._without_format and task in REWARDS and "format" in REWARDS[task].parts:
            options["format"] = "none"
            if "format" not in section.options:
                options["weights"] = {k: w for k, w in section.weights.items() if k != "format"}
        try:
            return reward_for(task, **{**options, **section.options})
        except ValueError as error:
            raise ValueError(
                f"the recipe's reward does not fit the data, which is {task}: {error}. Take a {task} recipe, or "
                f"data of the recipe's task"
            ) from None
