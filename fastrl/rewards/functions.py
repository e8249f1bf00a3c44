"""User reward functions, named in a recipe: ``my_rewards.py:score`` or ``package.module:score``.

They are called like TRL's ``reward_funcs``, with keywords that each have one value per answer: ``prompts``,
``completions``, ``completion_ids``, the fields of the target and the other columns of the row; also ``task``, ``id``
and ``records``. They return a number for each answer, or None if the row belongs to another task. ``async`` functions
are awaited. The name may also refer to a ``Reward``, or to a class, which is created without arguments.
"""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fastrl.config.sections import JudgeRecipe, RewardRecipe
from fastrl.config.usercode import UserCodeError, load_function, same_folder, where_it_raised
from fastrl.data.records import Record
from fastrl.rewards.answer import Answer, answers_to_try
from fastrl.rewards.base import Reward
from fastrl.rewards.checked import RewardError, checked_scores, place, wrong_value
from fastrl.rewards.judge import Judge

TAKEN = ("mean", "min", "max", "std", "group_std")  # names of other metrics reward/NAME
_SHOWN = 5  # records named in a message about many


class RewardFunction:
    """One user function.

    Args:
        name: ``place:function``, as in the recipe.
        text: completions are strings; otherwise TRL's conversational form.
        timeout: seconds allowed for one call; None: no limit.

    Raises:
        ValueError: the name does not refer to something callable.
    """

    def __init__(self, name: str, *, text: bool, timeout: float | None) -> None:
        self.name, self.label = name, name.rpartition(":")[2]
        self._text, self._timeout = text, timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        try:
            found = load_function(name)
            self._target: Any = found() if isinstance(found, type) else found
        except UserCodeError as error:
            raise ValueError(f"reward.function: {error}") from None
        except (Exception, SystemExit) as error:
            what = f"{where_it_raised(error)}{type(error).__name__}: {error}"
            raise ValueError(f"reward.function: {name} cannot be created without arguments: {what}") from error
        if not callable(self._target):
            raise ValueError(f"reward.function: objects of {name} cannot be called")
        if self.label in TAKEN:
            raise ValueError(f"reward.function: {name}: reward/{self.label} is already a metric; rename the function")
        self._named, self._open = _parameters(self._target, name)

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        """A reward for each answer, all in one call.

        Raises:
            RewardError: it raised, timed out, or did not return a finite number or None for each answer.
        """
        if not answers:
            return []
        try:
            with same_folder():
                given = self._call(answers)
        except _Hung:
            raise RewardError(
                f"{self.name}: no answer within {self._timeout:g} s (reward.timeout) for {len(answers)} answers to "
                f"{_names(answers)}"
            ) from None
        except (RewardError, UserCodeError) as error:  # the former of a Reward object: its message has the record
            raise RewardError(f"{self.name}: {error}") from error
        except Exception as error:
            raise RewardError(f"{self._place(answers)}: raised {_raised(error)}") from error
        return self._checked(given, answers)

    def try_out(self, record: Record) -> list[float | None]:
        """Its rewards for two answers to a record with views and style: the truth as the model would write it, and a
        text without an answer. Raises ``RewardError``."""
        missing = [name for name in self._required() if name not in self._columns([Answer("", [], record)])]
        if missing:
            known = ", ".join(self._columns([Answer("", [], record)]))
            raise RewardError(
                f"{self.name}: needs {', '.join(missing)}, which record {record.id!r} does not have; it has {known}"
                ". An argument that only some rows have needs a default"
            )
        return self(answers_to_try(record))

    def _call(self, answers: Sequence[Answer]) -> Any:
        if isinstance(self._target, Reward):
            reward = self._target
            return self._waited(lambda: _scored(reward, answers))
        columns = {**{name: [None] * len(answers) for name in self._required()}, **self._columns(answers)}
        if not self._open:
            columns = {name: values for name, values in columns.items() if name in self._named}
        return self._waited(lambda: self._target(**columns))

    def _columns(self, answers: Sequence[Answer]) -> dict[str, list[Any]]:
        """All available keywords, one value per answer; None if a row lacks the column. What a function changes in
        them is not changed in the data."""
        own = {id(answer.record): _copied_record(answer.record) for answer in answers}
        records = [own[id(answer.record)] for answer in answers]
        rows = [{"task": r.task, "id": r.id, **r.columns, **r.target} for r in records]
        columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(n for row in rows for n in row)}
        texts: list[Any] = [answer.text for answer in answers]
        return {
            **columns,
            "prompts": [list(record.messages) for record in records],
            "completions": texts if self._text else [[{"role": "assistant", "content": text}] for text in texts],
            "completion_ids": [list(answer.token_ids) for answer in answers],
            "records": records,
        }

    def _required(self) -> list[str]:
        return [name for name, needed in self._named.items() if needed]

    def _waited(self, call: Callable[[], Any]) -> Any:
        """The result of a call in its own thread; one that hangs cannot be ended, so its thread is abandoned."""
        done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def work() -> None:
            try:
                given = call()
                done.put((self._awaited(given) if inspect.isawaitable(given) else given, None))
            except BaseException as error:  # also sys.exit; raised again in the waiting thread
                done.put((None, error))

        threading.Thread(target=work, name=self.name, daemon=True).start()
        try:
            given, error = done.get(timeout=self._timeout)
        except queue.Empty:
            raise _Hung from None
        if error is not None:
            raise error if isinstance(error, Exception) else _Left(error) from error
        return given

    def _awaited(self, given: Awaitable[Any]) -> Any:
        """Await in one event loop for all calls, as a client in the user's file is bound to the loop of its first
        use."""

        async def result() -> Any:
            return await given

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name=f"{self.name} loop", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(result(), self._loop).result()

    def _checked(self, given: Any, answers: Sequence[Answer]) -> list[float | None]:
        if hasattr(given, "tolist"):  # tensors, arrays, columns of a table
            given = given.tolist()
        if not isinstance(given, Sequence) or isinstance(given, str | bytes):
            raise RewardError(f"{self.name}: must give a list of {len(answers)} numbers or None, got {given!r:.80}")
        if len(given) != len(answers):
            raise RewardError(f"{self.name}: {len(given)} values for {len(answers)} answers to {_names(answers)}")
        given = [v.item() if isinstance(v, torch.Tensor | np.ndarray) and v.ndim == 0 else v for v in given]
        for value, answer in zip(given, answers, strict=True):
            wrong = wrong_value(value)
            if wrong is not None:
                raise RewardError(f"{place(self.name, answer.record, answer.text)}: the value {wrong}")
        return [None if value is None else float(value) for value in given]

    def _place(self, answers: Sequence[Answer]) -> str:
        """The answer for which it raises, found by bisection; all answers if neither half raises alone."""
        while len(answers) > 1:
            middle = len(answers) // 2
            half = next((part for part in (answers[:middle], answers[middle:]) if self._raises(part)), None)
            if half is None:
                return f"{self.name}: {_names(answers)}"
            answers = half
        return place(self.name, answers[0].record, answers[0].text)

    def _raises(self, answers: Sequence[Answer]) -> bool:
        try:
            self._call(answers)
        except Exception:
            return True
        return False


class Functions:
    """The functions and judges of a run's reward sections; one that several sections name is created once.

    Args:
        sections: the recipe's own under "", and those of a mixture's entries by name.
    """

    def __init__(self, sections: dict[str, RewardRecipe]) -> None:
        self._sections = sections
        self._made: dict[tuple[str, bool, float | None], RewardFunction] = {}
        self._judges: dict[JudgeRecipe, Judge] = {}
        self._tried: set[tuple[str, str]] = set()

    @property
    def any(self) -> bool:
        """Whether any section has one."""
        return any(section.function or section.judge is not None for section in self._sections.values())

    def of(self, origin: str = "") -> list[RewardFunction | Judge]:
        """Those of a part of a mixture, its judge last. Raises ``ValueError`` if one cannot be loaded or two have the
        same name."""
        section = self._sections.get(origin, self._sections[""])
        found: list[RewardFunction | Judge] = [self._make(name, section) for name in section.function]
        if section.judge is not None:
            if section.judge not in self._judges:
                self._judges[section.judge] = Judge(section.judge)
            found.append(self._judges[section.judge])
        for i, function in enumerate(found):
            other = next((f for f in found[:i] if f.label == function.label), None)
            if other is not None:
                raise ValueError(
                    f"reward.function: {other.name} and {function.name} have the same name, used in logs "
                    "and weights; rename one"
                )
        return found

    def try_out(self, record: Record, encode: Callable[[Record], tuple[Any, Record]]) -> None:
        """Try those of a record's part on it, once for each part and task; before answers are sampled.

        Raises ``RewardError`` where one fails, or where nothing else scores the record and each gives None.
        """
        from fastrl.rewards import REWARDS  # it imports the tasks' rewards

        key = record.origin, record.task
        functions = self.of(record.origin)
        if not functions or key in self._tried:
            return
        self._tried.add(key)
        encoded = encode(record)[1]
        given = [value for function in functions for value in function.try_out(encoded)]
        alone = not self._sections.get(record.origin, self._sections[""]).builtin or record.task not in REWARDS
        if alone and all(value is None for value in given):
            names = ", ".join(function.name for function in functions)
            raise RewardError(f"{names}: nothing scores record {record.id!r} of task {record.task}: all give None")

    def _make(self, name: str, section: RewardRecipe) -> RewardFunction:
        key = name, section.completions == "text", section.timeout
        if key not in self._made:
            self._made[key] = RewardFunction(name, text=key[1], timeout=key[2])
        return self._made[key]


class _Hung(Exception):
    """A call took longer than it may."""


class _Left(Exception):
    """Carries what a call raised that is no ``Exception``, such as ``SystemExit``."""


def _scored(reward: Reward, answers: Sequence[Answer]) -> list[float | None]:
    """Weighted sums of a ``Reward``; None for rows of another task than its own."""
    own = [i for i, answer in enumerate(answers) if reward.task in ("", answer.record.task)]
    result: list[float | None] = [None] * len(answers)
    if own:
        _, totals = checked_scores(reward, [answers[i].text for i in own], [answers[i].record for i in own])
        for i, value in zip(own, totals, strict=True):
            result[i] = value
    return result


def _parameters(target: Any, name: str) -> tuple[dict[str, bool], bool]:
    """Name → whether it has to be given, and whether all others may be given, too."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # of no Python function
        return {}, True
    if isinstance(target, Reward):
        return {}, True
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if positional:
        raise ValueError(
            f"reward.function: {name}: arguments are given as keywords, but {', '.join(positional)} can only be given "
            "by position (the / in its signature)"
        )
    named = {p.name: p.default is p.empty for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _copied_record(record: Record) -> Record:
    messages = tuple(_copied(list(record.messages)))
    return replace(record, messages=messages, target=_copied(record.target), columns=_copied(record.columns))


def _copied(value: Any) -> Any:
    """Lists and mappings anew; what is in them (numbers, texts, pictures) as it is."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _names(answers: Sequence[Answer]) -> str:
    found = list(dict.fromkeys(repr(answer.record.id) for answer in answers))
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"record{'s' if len(found) > 1 else ''} {', '.join(found[:_SHOWN])}{more}"


def _raised(given: Exception) -> str:
    error = given.__cause__ if isinstance(given, _Left) and given.__cause__ is not None else given
    return f"{type(error).__name__}: {error} ({where_it_raised(error).removesuffix(': ')})"
