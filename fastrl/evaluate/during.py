"""Periodic evaluation during training on a fixed set of records, with the protocols of ``fastrl eval``.

Evaluation does not affect training: random states are restored, and its time does not count as the step's. The best
value and the patience used so far are part of checkpoints (:meth:`Evaluation.state`), so a resumed run has them too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch

from fastrl.captions.embedding import AUTO, OFF, Soft
from fastrl.data import load_data
from fastrl.data.blank import BlankImages
from fastrl.data.decodable import Chosen, decoded
from fastrl.data.mixture import summary_of
from fastrl.data.prompts import suffixed
from fastrl.data.records import Dataset, Record
from fastrl.evaluate import EVALUATIONS, evaluate
from fastrl.evaluate.best import SAMPLED, Best, Mode, check_metric
from fastrl.evaluate.run import MAX_NEW_TOKENS, check_answerable, sample_records
from fastrl.evaluate.soft import caption_soft, is_free
from fastrl.methods.rollouts import RecipeRewards
from fastrl.rewards.base import unknown
from fastrl.rewards.functions import Answer
from fastrl.rollout.vllm_weights import RolloutError

if TYPE_CHECKING:
    from fastrl.config.sections import EvalRecipe
    from fastrl.engine.base import Engine
    from fastrl.methods import Context
    from fastrl.recipe import Recipe
    from fastrl.rewards.functions import Functions

T = TypeVar("T")
REWARD = "reward"  # the recipe's mean reward: for tasks without a protocol, or if chosen as eval.metric
# Errors that data or model can cause; they are reported as EvaluationError. Any other error is a bug and propagates.
FAULTS = (ValueError, OSError, ArithmeticError, RolloutError, torch.OutOfMemoryError)


class EvaluationError(RuntimeError):
    """An evaluation failed; the run's weights are unchanged."""


@dataclass(frozen=True)
class HeldOut:
    """An evaluation set: records by task, and the metric that selects the best weights."""

    tasks: Mapping[str, Sequence[Record]]
    metric: str
    mode: Mode
    rewards: RecipeRewards | None  # None: protocols only
    summary: str = ""  # summary of rows that did not become records
    softly: Soft = field(default_factory=Soft)  # soft matching of captions

    def __len__(self) -> int:
        return sum(map(len, self.tasks.values()))

    def metrics(self, answers: Mapping[str, Sequence[Answer]]) -> dict[str, float | None]:
        """Metrics of each task's answers; with several tasks, names are prefixed with the task."""
        found: dict[str, float | None] = {}
        for task, given in answers.items():
            if task in EVALUATIONS:
                records, texts = [answer.record for answer in given], [answer.text for answer in given]
                values = evaluate(task, records, texts, similarity=self.softly.similarity)
                found |= {f"{task}/{name}" if len(answers) > 1 else name: value for name, value in values.items()}
        if self.rewards is not None:
            every = [answer for given in answers.values() for answer in given]
            found[REWARD] = float(np.mean([scored.total for scored in self.rewards.score(every)]))
        return found


class Evaluated(NamedTuple):
    """One evaluation."""

    row: dict[str, Any]  # of ``eval.jsonl``
    better: bool  # whether it is the best so far
    short: str  # to append to progress lines
    text: str  # a line for the log


def held_out(
    recipe: Recipe, records: Sequence[Record] | None = None, functions: Functions | None = None
) -> HeldOut | None:
    """The evaluation set of a recipe, checked as far as possible without a model; None if the recipe has none.

    Args:
        recipe: its ``eval`` section.
        records: the set, instead of loading ``eval.spec``.
        functions: the user's reward functions, if already loaded.

    Raises:
        ValueError: the set cannot be loaded or evaluated, or the metric is unknown or has an unknown direction.
    """
    section = recipe.eval
    if not section.spec and records is None:
        if section.model_dump(exclude_defaults=True):
            raise ValueError("eval.spec: missing, although other keys of eval are set; give a data spec")
        return None
    data = records if records is not None else _load(recipe)
    summary = summary_of(data)
    chosen: Sequence[Record] = data if section.n is None else data[: section.n]
    if recipe.data.blank_images:
        chosen = BlankImages(chosen)
    places: dict[str, list[int]] = {}
    free = False
    for index in range(len(chosen)):  # one at a time: records may be rendered, or cut from a video, on access
        record = chosen[index]
        places.setdefault(record.task, []).append(index)
        free |= is_free(record.task, record.target)
    tasks = {task: Chosen(chosen, indices) for task, indices in places.items()}
    scored = (section.metric or "").removeprefix(SAMPLED) == REWARD or not tasks.keys() <= EVALUATIONS.keys()
    rewards = RecipeRewards(recipe.reward, functions=functions) if scored else None
    try:
        names = _names(tasks, rewards)
    except ValueError as error:
        raise ValueError(f"eval.spec: {error}") from error
    names += [SAMPLED + name for name in names] if section.samples else []
    if section.metric is None and len(tasks) > 1 and not scored:
        raise ValueError(f"eval.metric: required, as the set has several tasks. Allowed: {', '.join(names)}")
    metric = section.metric if section.metric is not None else REWARD if scored else names[0]
    if section.soft not in (AUTO, OFF) and "caption" not in tasks:
        raise ValueError(f"eval.soft: matches words of captions; eval.spec has {', '.join(tasks)}")
    softly = caption_soft("caption", section.soft, free=free)
    return HeldOut(tasks, metric, check_metric(metric, names, section.mode), rewards, summary, softly)


def _names(tasks: Mapping[str, Sequence[Record]], rewards: RecipeRewards | None) -> list[str]:
    """Names of a set's metrics, found by scoring empty answers. Raises ``ValueError`` for a set that cannot be answered
    or scored."""
    for task, members in tasks.items():
        if task in EVALUATIONS:
            check_answerable(task, members)
        if rewards is not None:
            try:
                rewards.check([members[0]])
            except ValueError as error:
                if task in EVALUATIONS:
                    raise
                raise ValueError(f"{unknown('task to evaluate', task, EVALUATIONS)}, and no reward: {error}") from None
    empty = {
        task: [Answer("", [], replace(record, images=())) for record in members] for task, members in tasks.items()
    }
    names = HeldOut(tasks, "", "max", None).metrics(empty)
    return [name for name in names if name.rpartition("/")[2] != "n"] + ([REWARD] if rewards is not None else [])


def _load(recipe: Recipe) -> Dataset:
    """Load as ``fastrl eval`` does; decode pictures now if they would otherwise first be opened during the run."""
    section, skip = recipe.eval, recipe.data.skip_bad
    try:
        data = suffixed(load_data(recipe.eval_spec, skip_bad=skip), recipe.data.suffix, recipe.eval_spec)
        part = data if section.n is None else Dataset(data[: section.n], data.problems, data.left_out, data.notes)
        if skip or not section.at_start:
            part = decoded(part)
            broken = [problem for problem in part.problems if problem not in data.problems]
            if broken and not skip:
                raise ValueError("; ".join(str(problem) for problem in broken[:20]))
    except ValueError as error:
        raise ValueError(f"eval.spec: {error}") from error
    return part


class Evaluation:
    """The evaluations of a run. With several ranks, each answers a part of the records and the first scores them all.

    Args:
        recipe: ``eval`` has the schedule, ``rollout`` the sampling settings.
        held_out: the evaluation set; None: no evaluation is ever due.
        context: the method's context; provides the policy and the clock.
        engine: gathers answers from all ranks.
    """

    def __init__(self, recipe: Recipe, held_out: HeldOut | None, context: Context, engine: Engine) -> None:
        self.recipe, self.held_out, self.context, self.engine = recipe, held_out, context, engine
        section = recipe.eval
        self.best = Best(held_out.mode if held_out else "max", section.min_delta, section.patience)
        self.note = ""  # message to show on a resume
        self._last = -1  # the last step that was measured

    @property
    def section(self) -> EvalRecipe:
        """The recipe's ``eval``."""
        return self.recipe.eval

    @property
    def skipped(self) -> str:
        """A line about rows of the set that did not become records; empty if there are none."""
        summary = self.held_out.summary if self.held_out is not None else ""
        return f"eval.spec: {summary}" if summary else ""

    @property
    def matching(self) -> str:
        """A line about soft matching; empty if captions are matched by rules as a matter of course."""
        softly = self.held_out.softly if self.held_out is not None else Soft()
        if softly.note:
            return f"eval.soft: {softly.note}"
        return f"eval.soft: captions are matched by {softly.matching}" if softly.similarity is not None else ""

    def due(self, step: int) -> bool:
        """Whether an evaluation after ``step`` is scheduled and has not been made yet."""
        if self.held_out is None or step == self._last:
            return False
        if step == 0:
            return self.section.at_start
        return step % self.section.every == 0 or step == self.recipe.optim.steps

    @property
    def over(self) -> bool:
        """Whether the patience is exhausted."""
        return self.best.over

    def measure(self, step: int) -> Evaluated:
        """Evaluate the current weights, after ``step``. Every rank must call this.

        Raises:
            EvaluationError: records cannot be answered or scored, or the weights produce non-finite values.
        """
        assert self.held_out is not None
        clock = self.context.clock
        with clock.phase("eval"), own_random(self.recipe.seed):
            found = {f"eval/{name}": value for name, value in self._metrics(step, greedy=True).items()}
            if self.section.samples:
                sampled = self._metrics(step, greedy=False)
                found |= {f"eval/{SAMPLED}{name}": value for name, value in sampled.items()}
        seconds = sum(clock.read().values())  # only this evaluation: the phases of the step before were already read
        value = found.get(f"eval/{self.held_out.metric}")
        better = self.best.take(step, value)
        self._last = step
        row = {"step": step, **found, "best": better, "time/eval": seconds}
        return Evaluated(row, better, self._short(value), self._text(step, found, better, seconds))

    def verdict(self, step: int) -> str:
        """Summary line at the end of a run of ``step`` steps; empty if nothing was evaluated."""
        best, name = self.best, self.held_out.metric if self.held_out is not None else ""
        if self.held_out is None or (best.value is None and not best.over):
            return ""
        before = f" (before the first step: {best.start:.4g})" if best.start is not None else ""
        found = f"{best.value:.4g} after step {best.step}{before}" if best.value is not None else "none is defined"
        if best.over and step < self.recipe.optim.steps:
            waited = f"{best.waited} evaluation{'s' if best.waited > 1 else ''} (eval.patience)"
            return f"stopped early after step {step}: no better {name} in {waited}; best: {found}"
        return f"best {name}: {found}"

    def state(self) -> dict[str, Any]:
        """State for a checkpoint; empty if nothing was evaluated yet."""
        if self.held_out is None or self._last < 0:
            return {}
        return {"of": self._identity(), "last": self._last, **self.best.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state`; discarded if the evaluation set or the metric has changed."""
        if self.held_out is None:
            return
        if state["of"] != self._identity():
            self.note = "the evaluation set or metric has changed: the best so far is discarded"
            return
        self._last = int(state["last"])
        self.best.load(state)

    def _identity(self) -> dict[str, Any]:
        assert self.held_out is not None
        section = self.section
        chosen = {"metric": self.held_out.metric, "mode": self.held_out.mode, "records": len(self.held_out)}
        softly = self.held_out.softly
        chosen |= {"matching": softly.matching} if softly.similarity is not None else {}
        return {"spec": section.spec, "adapter": section.adapter, "max_new_tokens": section.max_new_tokens, **chosen}

    def _metrics(self, step: int, *, greedy: bool) -> dict[str, float | None]:
        """Metrics of one greedy answer per record, or means over several sampled ones."""
        held = self.held_out
        assert held is not None
        given = self._together(step, lambda: self._answers(greedy))
        first = self.engine.rank == 0

        def score() -> dict[str, float | None]:
            return _mean([held.metrics(self._whole(given, n)) for n in range(1 if greedy else self.section.samples)])

        return self._together(step, score if first else dict)[0]

    def _answers(self, greedy: bool) -> list[list[Answer]]:
        """This rank's answers to its records. Pictures are dropped unless a reward on this rank may need them."""
        from fastrl.rollout import Generator, Sampling

        held, section, rollout, context = self.held_out, self.section, self.recipe.rollout, self.context
        assert held is not None
        how = {} if greedy else {"top_p": rollout.top_p, "top_k": rollout.top_k}
        served = rollout.backend == "vllm"
        context.sync()
        options: dict[str, Any] = {"decode": rollout.decode, "merge": context.merge}
        generator = context.generator if served else Generator(context.policy, clock=context.clock, **options)
        found: list[list[Answer]] = []
        for task, records in held.tasks.items():
            sampling = Sampling(
                n=1 if greedy else section.samples,
                max_new_tokens=section.max_new_tokens or MAX_NEW_TOKENS.get(task, rollout.max_new_tokens),
                temperature=0.0 if greedy else rollout.temperature,
                **how,
            )
            own = records[self.engine.rank :: self.engine.world_size]
            answered = sample_records(
                context.policy,
                own,
                sampling,
                self.recipe.seed + self.engine.rank,
                section.batch,
                generator=generator,
            )
            for record, completions in answered:
                alone = self.engine.world_size == 1
                seen = record if held.rewards is not None and alone else replace(record, images=())
                found.append([Answer(c.text, c.token_ids.tolist(), seen) for c in completions])
        return found

    def _whole(self, given: Sequence[Sequence[Sequence[Answer]]], which: int) -> dict[str, list[Answer]]:
        """The ``which``-th answer to every record, by task, merged from all ranks in record order."""
        held = self.held_out
        assert held is not None
        left = [iter(answers) for answers in given]
        whole = {
            task: [next(left[number % len(given)])[which] for number in range(len(records))]
            for task, records in held.tasks.items()
        }
        if held.rewards is None or len(given) == 1:
            return whole
        return {  # pictures are not sent between ranks
            task: [
                answer._replace(record=replace(answer.record, images=record.images))
                for answer, record in zip(answers, held.tasks[task], strict=True)
            ]
            for task, answers in whole.items()
        }

    def _together(self, step: int, work: Callable[[], T]) -> list[T]:
        """Run ``work`` on each rank and return all results. If it fails on one rank, all raise."""
        found: T | None = None
        failed = None
        try:
            found = work()
        except FAULTS as error:
            failed, cause = f"evaluation after step {step}: {str(error) or type(error).__name__}", error
        else:
            cause = None
        outcomes: list[tuple[Any, str | None]] = self.engine.gather((found, failed))
        message = next((text for _, text in outcomes if text is not None), None)
        if message is not None:
            raise EvaluationError(message) from cause
        return [value for value, _ in outcomes]

    def _short(self, value: float | None) -> str:
        assert self.held_out is not None
        best = f" (best {self.best.value:.4g} after step {self.best.step})" if self.best.value is not None else ""
        return f"{self.held_out.metric} {_shown(value)}{best}"

    def _text(self, step: int, found: Mapping[str, float | None], better: bool, seconds: float) -> str:
        assert self.held_out is not None
        name, best = self.held_out.metric, self.best
        other = name.removeprefix(SAMPLED) if name.startswith(SAMPLED) else SAMPLED + name
        beside = f", {other} {_shown(found[f'eval/{other}'])}" if f"eval/{other}" in found else ""
        when = f"after step {step}" if step else "before the first step"
        rank = ", the best so far" if better else ""
        if not better and best.value is not None:
            rank = f", best so far {best.value:.4g} after step {best.step}"
        return f"evaluation {when}: {name} {_shown(found.get(f'eval/{name}'))}{beside}{rank} ({seconds:.1f} s)"


@contextmanager
def own_random(seed: int) -> Iterator[None]:
    """Use seeded random states in a block; afterwards restore those of Python, NumPy, torch and the GPU."""
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


def _mean(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The mean of each metric; None if it is undefined in any row."""
    found: dict[str, float | None] = {}
    for name in rows[0]:
        values = [row.get(name) for row in rows]
        known = [value for value in values if value is not None]
        found[name] = (sum(known) / len(known) if len(known) > 1 else known[0]) if len(known) == len(values) else None
    return found


def _shown(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4g}"
