"""Common to methods that sample: prompts → groups of answers, and the rewards that a recipe defines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastrl.batch import PromptGroup
from fastrl.methods.base import Context
from fastrl.rewards.answer import Answer
from fastrl.rewards.base import unknown
from fastrl.rewards.checked import RewardError, checked_scores, place
from fastrl.rewards.functions import Functions, RewardFunction
from fastrl.rewards.judge import LABEL as JUDGE
from fastrl.rewards.judge import Judge

if TYPE_CHECKING:
    from fastrl.config.sections import RewardRecipe, RolloutRecipe
    from fastrl.data.records import Record
    from fastrl.rewards import Reward
    from fastrl.rollout import Sampling


def sampling_of(rollout: RolloutRecipe, step: int = 0) -> Sampling:
    """How a recipe's rollout section samples at a step (from 0)."""
    from fastrl.rollout import Sampling

    return Sampling(
        n=rollout.group_at(step),
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
    )


def sample_groups(context: Context, records: Sequence[Record]) -> list[PromptGroup]:
    """Encode each record once and sample its answers according to the recipe's rollout section."""
    with context.clock.phase("preprocess"):
        encoded = [context.policy.encode(record) for record in records]
    sampling = sampling_of(context.rollout, context.step)
    keep = {"keep": context.kept} if context.kept is not None else {}  # only the local generator is asked to
    answers = context.generator.generate([prompt for prompt, _ in encoded], sampling, context.rng, **keep)
    return [PromptGroup(p, completions, record) for (p, record), completions in zip(encoded, answers, strict=True)]


class Scored(NamedTuple):
    """The score of one answer."""

    components: dict[str, float]  # of the task's reward and of user functions
    total: float


class RecipeRewards:
    """The rewards that a recipe's reward section defines: the task's own, created when a task first occurs, and user
    functions.

    Args:
        section: the recipe's reward section.
        origins: sections of the entries of a mixture, by name; they score the records of these entries.
        without_format: leave out the format component unless the recipe sets it.
        functions: the user functions of these sections, if already loaded.
    """

    def __init__(
        self,
        section: RewardRecipe,
        origins: Mapping[str, RewardRecipe] | None = None,
        *,
        without_format: bool = False,
        functions: Functions | None = None,
    ) -> None:
        self._section, self._origins, self._without_format = section, origins or {}, without_format
        self._functions = functions or functions_of(section, self._origins)
        self._rewards: dict[tuple[str, str], Reward | None] = {}

    def misfit(self, record: Record) -> str | None:
        """Why answers to a record cannot be scored; None: they can, or the record has answers with rewards."""
        reward = None if "list" in record.target else self._builtin(record)
        return reward.misfit(record) if reward is not None else None

    def check(self, records: Sequence[Record], encode: Callable[[Record], tuple[Any, Record]] | None = None) -> None:
        """Raise ``ValueError`` if the recipe's reward does not fit a record's task; called before any sampling.

        With ``encode`` (the policy's), functions are called once for the first record of each part and task.
        """
        for record in records:
            try:
                self._builtin(record)
            except ValueError as error:
                if not record.origin:
                    raise
                raise ValueError(f"data.mix, {record.origin}: {error}") from None
            if encode is not None:
                self._functions.try_out(record, encode)

    def of(self, task: str, origin: str = "") -> Reward:
        """The task's own reward in a part of a mixture. Raises ``ValueError`` if the recipe's options do not fit the
        task, or the recipe leaves this reward out."""
        reward = self._made(task, origin)
        if reward is None:
            raise ValueError(f"{task} answers are only scored by reward.function")
        return reward

    def members(self, groups: Sequence[PromptGroup]) -> list[tuple[Reward, list[PromptGroup]]]:
        """The groups that each task's own reward scores, in order of first appearance."""
        found: dict[tuple[str, str], list[PromptGroup]] = {}
        for group in groups:
            assert group.record is not None
            found.setdefault((group.record.origin, group.record.task), []).append(group)
        pairs = [(self._made(task, origin), members) for (origin, task), members in found.items()]
        return [(reward, members) for reward, members in pairs if reward is not None]

    def readable(self, group: PromptGroup) -> list[bool]:
        """Whether each answer of a group can be parsed; functions accept any text."""
        assert group.record is not None
        reward, texts = self._builtin(group.record), [c.text for c in group.completions]
        return reward.readable(texts, [group.record] * len(texts)) if reward is not None else [True] * len(texts)

    def scores(self, places: Sequence[tuple[PromptGroup, int]]) -> list[Scored]:
        """The score of each answer, given as (group, index of the completion). One call per task's reward and one per
        function. Raises ``RewardError``."""
        answers = []
        for group, i in places:
            assert group.record is not None
            completion = group.completions[i]
            answers.append(Answer(completion.text, completion.token_ids.tolist(), group.record))
        return self.score(answers)

    def score(self, answers: Sequence[Answer]) -> list[Scored]:
        """:meth:`scores` of answers that are in no group."""
        scored = [Scored({}, 0.0) for _ in answers]
        by_task: dict[tuple[str, str], list[int]] = {}
        by_function: dict[RewardFunction | Judge, list[int]] = {}
        for i, answer in enumerate(answers):
            by_task.setdefault((answer.record.origin, answer.record.task), []).append(i)
            for function in self._functions.of(answer.record.origin):
                by_function.setdefault(function, []).append(i)
        for (origin, task), rows in by_task.items():
            reward = self._made(task, origin)
            if reward is not None:
                components, totals = checked_scores(
                    reward, [answers[i].text for i in rows], [answers[i].record for i in rows]
                )
                for at, i in enumerate(rows):
                    parts = {name: values[at] for name, values in components.items() if values[at] is not None}
                    scored[i] = Scored(parts, totals[at])
        for function, rows in by_function.items():
            for i, value in zip(rows, function([answers[i] for i in rows]), strict=True):
                if value is not None:
                    weight = self.weights_of(answers[i].record).get(function.label, 1.0)
                    parts = {**scored[i].components, function.label: value}
                    scored[i] = Scored(parts, scored[i].total + weight * value)
        for answer, found in zip(answers, scored, strict=True):
            judged = self.section_of(answer.record.origin).judge is not None  # a reply may have no score
            if not found.components and not judged:
                names = ", ".join(f.name for f in self._functions.of(answer.record.origin))
                raise RewardError(f"{place(names, answer.record, answer.text)}: not scored: all rewards return None")
        return scored

    def weights_of(self, record: Record) -> dict[str, float]:
        """Weights of the components that answers to a record have; 1 for those not named."""
        section, reward = self.section_of(record.origin), self._builtin(record)
        judged = {} if section.judge is None else {JUDGE: section.judge.weight}
        return {**judged, **section.weights, **(reward.weights if reward is not None else {})}

    def section_of(self, origin: str) -> RewardRecipe:
        """The reward section of a part of a mixture (empty: the recipe's)."""
        return self._origins.get(origin, self._section)

    def _builtin(self, record: Record) -> Reward | None:
        return self._made(record.task, record.origin)

    def _made(self, task: str, origin: str) -> Reward | None:
        """The task's own reward; None: only functions score, because the recipe says so or the task has no reward."""
        key = origin, task
        if key not in self._rewards:
            self._rewards[key] = self._make(task, origin)
        return self._rewards[key]

    def _make(self, task: str, origin: str) -> Reward | None:
        from fastrl.rewards import REWARDS, reward_for

        section = self.section_of(origin)
        own = [function.label for function in self._functions.of(origin)]
        if not section.builtin and not own:
            raise ValueError("reward.builtin: false leaves nothing to score answers with: set reward.function or judge")
        builtin = section.builtin and not (own and task not in REWARDS)
        own += ["overlong"] if section.overlong is not None else []  # added by the method, not by the reward
        _check_names(section, own, REWARDS[task].parts if builtin and task in REWARDS else (), builtin=builtin)
        if not builtin:
            return None
        weights = {name: weight for name, weight in section.weights.items() if name not in own}
        options: dict[str, Any] = {"weights": weights} if weights else {}
        if self._without_format and task in REWARDS and "format" in REWARDS[task].parts:
            options["format"] = "none"
            if "format" not in section.options:
                options["weights"] = {k: w for k, w in weights.items() if k != "format"}
        try:
            return reward_for(task, **{**options, **section.options})
        except ValueError as error:
            raise ValueError(_take_another(task, error)) from None


def functions_of(section: RewardRecipe, origins: Mapping[str, RewardRecipe]) -> Functions:
    """The user functions of a run: those of the recipe's reward section and of a mixture's entries."""
    return Functions({**origins, "": section})


def _take_another(task: str, error: Exception) -> str:
    """What to do about a recipe whose reward is not that of the data's task."""
    article = "an" if task[:1] in "aeiou" else "a"
    return (
        f"the data is {task}, which the recipe's reward does not fit: take {article} {task} recipe (fastrl recipes "
        f"lists them), or data of the recipe's task. In detail: {error}"
    )


def _check_names(section: RewardRecipe, own: Sequence[str], parts: Sequence[str], *, builtin: bool) -> None:
    """Raise ``ValueError`` if a function has the name of a component, or a weight the name of neither.

    If only functions score, weights of any task's components may stay in the recipe and are not read.
    """
    from fastrl.rewards import REWARDS

    for name in own:
        if name in parts:
            raise ValueError(f"reward.function: {name} is already a component of the task; rename the function")
    if not own:
        return  # the task's reward reports it
    known = [*own, *(parts if builtin else (part for reward in REWARDS.values() for part in reward.parts))]
    for name in section.weights:
        if name not in known:
            raise ValueError("reward.weights: " + unknown("component or function", name, [*own, *parts]))
