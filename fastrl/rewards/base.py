"""What every reward shares: options with checked names and values, one way to be called, and the weighted sum.

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
    """The message for a name that does not exist: what it is, the nearest valid one, all valid ones."""
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
        family: ``model_type`` of the config of the model that answers, where records do not know it (under TRL and
            verl): it says frame and form (``fastrl.answers.FAMILIES``).
        max_items: boxes or points read from one answer; what follows is not looked at, which bounds time and memory.
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
        """Numbers and switches come from recipes and command lines, where anything may stand."""
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
        """Names of the options ``reward_for`` takes for this task."""
        return tuple(f.name for f in fields(cls))

    @property
    def absent(self) -> dict[str, str]:
        """Components of ``parts`` that do not occur with these options → the option that leaves them out."""
        return {"format": "format='none'"} if getattr(self, "format", None) == "none" else {}

    def misfit(self, record: Record) -> str | None:
        """Why answers to a record cannot be scored, whatever they say; None: they can."""
        return None

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> Components:
        """Components of ``answers[i]`` as an answer to ``records[i]``: name → one finite float per answer."""
        raise NotImplementedError

    def readable(self, answers: Sequence[str], records: Sequence[Record]) -> list[bool]:
        """Whether each answer could be read as an answer to this task at all (an explicit empty list can)."""
        return [True] * len(answers)

    def diagnose(self, answers: Sequence[str], records: Sequence[Record]) -> dict[str, list[int]]:
        """What explains a low reward and is no part of it: name → a count for each answer.

        ``unparsable`` is 1 for an answer in which nothing could be read; tasks with labels or coordinates add more.
        """
        return {"unparsable": [int(not sound) for sound in self.readable(answers, records)]}

    def total(self, components: Mapping[str, Sequence[float]]) -> list[float]:
        """Weighted sum of the components under this reward's ``weights``."""
        return total(components, self.weights)

    def __call__(self, answers: Sequence[str] | None = None, record: Record | None = None, /, **call: Any) -> Any:
        """Score answers; three call conventions, told apart by their arguments.

        - fastrl, ``reward(answers, record)``: dict of components, one float per answer.
        - TRL, ``reward(prompts=…, completions=…, **columns)``: list of weighted sums
          (:func:`fastrl.rewards.adapters.trl_rewards`).
        - verl, ``reward(data_source=…, solution_str=…, ground_truth=…, extra_info=…)``: dict with ``score`` and the
          components (:func:`fastrl.rewards.adapters.verl_score`).

        Raises:
            TypeError: neither of these.
            ValueError: the truth (never the answer) is missing or malformed.
        """
        if answers is not None and record is not None and not call:
            if isinstance(answers, str):
                raise TypeError(f"{self.__name__}: answers must be a sequence of strings, got one string")
            return self.score(answers, [record] * len(answers))
        from fastrl.rewards import adapters  # it builds on this module

        if answers is None and "completions" in call:
            return adapters.trl_rewards(self, **call)
        if answers is None and "solution_str" in call:
            return adapters.verl_score(self, **call)
        raise TypeError(
            f"{self.__name__}: call as (answers, record), or with TRL's or verl's keywords; got keywords {sorted(call)}"
        )
