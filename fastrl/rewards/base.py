"""Base of all rewards: options with checked names and values, call conventions, and the weighted sum.

A reward is a small frozen dataclass whose fields are its options. Calling it with the answers to one record gives named
components, one value per answer; :meth:`Reward.score` does the same for answers to many records in one kernel call.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from fastrl.answers import FAMILIES
from fastrl.answers.frames import Frame
from fastrl.data.records import Record

Components = dict[str, list[float]]


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The message for an unknown name, with the nearest valid one and all valid ones."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{hint} (known: {', '.join(names)})"


def total(components: Mapping[str, Sequence[float]], weights: Mapping[str, float] | None = None) -> list[float]:
    """Weighted sum of reward components, one value per answer.

    A component without a weight counts with weight 1 (the unweighted sum of Perception-R1's released code); weight 0
    drops it.

    Raises:
        ValueError: a weight for a component that does not exist, or components of different lengths.
    """
    weights = weights or {}
    for name in weights:
        if name not in components:
            raise ValueError(unknown("reward component", name, components))
    lengths = {name: len(values) for name, values in components.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"reward components of different lengths: {lengths}")
    used = [(float(weights.get(name, 1.0)), values) for name, values in components.items()]
    n = next(iter(lengths.values()), 0)
    return [math.fsum(weight * values[i] for weight, values in used if weight != 0.0) for i in range(n)]


@dataclass(frozen=True, kw_only=True)
class Reward:
    """Base of all rewards; a subclass names its task and components and implements ``score``.

    Args:
        weights: component → weight, used by :meth:`total`; a component not named weighs 1.
        frame: what the answers' coordinates mean (see :mod:`fastrl.answers`); None: each record's own ``frame``.
        family: ``model_type`` of the answering model's config, if records do not have it (under TRL and verl); it
            determines frame and style (``fastrl.answers.FAMILIES``).
        max_items: largest number of boxes or points read from one answer, which bounds time and memory.
    """

    task: ClassVar[str] = ""
    parts: ClassVar[tuple[str, ...]] = ()

    weights: Mapping[str, float] = field(default_factory=dict)
    frame: Frame | None = None
    family: str | None = None
    max_items: int = 512

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            self._check_type(name, hint)
            allowed = [a for h in (hint, *get_args(hint)) if get_origin(h) is Literal for a in get_args(h)]
            value = getattr(self, name, None)
            if allowed and value not in allowed and not (value is None and type(None) in get_args(hint)):
                raise ValueError(f"{self.task} reward: " + unknown(f"value of option {name!r}:", value, allowed))
        for name, weight in self.weights.items():
            if name not in self.parts:
                raise ValueError(f"{self.task} reward: " + unknown("component in 'weights':", name, self.parts))
            if name in self.absent:
                raise ValueError(
                    f"{self.task} reward: 'weights' names {name!r}, which does not occur with {self.absent[name]}; "
                    "take the weight out or change the option"
                )
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ValueError(f"{self.task} reward: weight of {name!r} must be a finite number, got {weight!r}")
        if self.family is not None and self.family not in FAMILIES:
            raise ValueError(f"{self.task} reward: " + unknown("family", self.family, FAMILIES))
        if self.max_items < 1:
            raise ValueError(f"{self.task} reward: max_items must be a positive integer, got {self.max_items!r}")

    def _check_type(self, name: str, hint: Any) -> None:
        """Check the type of an option; values come from recipes and command lines."""
        kinds = {float: (int | float, "a finite number"), int: (int, "a whole number"), bool: (bool, "true or false")}
        if hint in kinds:
            value, (kind, expected) = getattr(self, name), kinds[hint]
            good = isinstance(value, kind) and isinstance(value, bool) == (hint is bool) and abs(value) < math.inf
            if not good:
                raise ValueError(f"{self.task} reward: {name} must be {expected}, got {value!r}")

    @property
    def __name__(self) -> str:
        """The name under which trainers log this reward."""
        return f"{self.task}_reward"

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Names of the options that ``reward_for`` takes for this task."""
        return tuple(f.name for f in fields(cls))

    @property
    def absent(self) -> dict[str, str]:
        """Components of ``parts`` that these options leave out → the option that does so."""
        return {}

    def misfit(self, record: Record) -> str | None:
        """Why no answer to a record can be scored; None: answers can be scored."""
        return None

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> Components:
        """Components of ``answers[i]`` as an answer to ``records[i]``: name → one finite float per answer."""
        raise NotImplementedError

    def readable(self, answers: Sequence[str], records: Sequence[Record]) -> list[bool]:
        """Whether each answer can be parsed as an answer to this task (an explicit empty list can)."""
        return [True] * len(answers)

    def diagnose(self, answers: Sequence[str], records: Sequence[Record]) -> dict[str, list[int]]:
        """Counts that explain low rewards without being part of them: name → one count per answer.

        ``unparsable`` is 1 for an answer that could not be parsed; tasks with labels or coordinates add more.
        """
        return {"unparsable": [int(not readable) for readable in self.readable(answers, records)]}

    def total(self, components: Mapping[str, Sequence[float]]) -> list[float]:
        """Weighted sum of the components under this reward's ``weights``."""
        return total(components, self.weights)

    def __call__(self, answers: Sequence[str] | None = None, record: Record | None = None, /, **call: Any) -> Any:
        """Score answers; the arguments determine which of three call conventions is used.

        - fastrl, ``reward(answers, record)``: dict of components, one float per answer.
        - TRL, ``reward(prompts=…, completions=…, **columns)``: list of weighted sums
          (:func:`fastrl.rewards.adapters.trl_rewards`).
        - verl, ``reward(data_source=…, solution_str=…, ground_truth=…, extra_info=…)``: dict with ``score`` and the
          components (:func:`fastrl.rewards.adapters.verl_score`).

        Raises:
            TypeError: the arguments fit none of these.
            ValueError: the truth (never the answer) is missing or malformed.
        """
        if answers is not None and record is not None and not call:
            if isinstance(answers, str):
                raise TypeError(f"{self.__name__}: answers must be a sequence of strings, got one string")
            for number, answer in enumerate(answers):
                if not isinstance(answer, str):
                    raise TypeError(f"{self.__name__}: answers[{number}] must be a string, got {answer!r:.80}")
            return self.score(answers, [record] * len(answers))
        from fastrl.rewards import adapters  # imported here, as it imports this module

        if answers is None and "completions" in call:
            return adapters.trl_rewards(self, **call)
        if answers is None and "solution_str" in call:
            return adapters.verl_score(self, **call)
        raise TypeError(
            f"{self.__name__}: call as (answers, record), or with TRL's or verl's keywords; got keywords {sorted(call)}"
        )
