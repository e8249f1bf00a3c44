"""What a caller of ``train`` is told while a run goes on, and how it ends one: ``train(recipe, callbacks=[obj])``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrl.config.registry import nearest

Row = Mapping[str, Any]


class StopRun(Exception):
    """Raised in a callback, ends the run after the step that is being done: it is saved, and can be resumed.

    Its text is said where the run ends.
    """


class Callback:
    """The hooks and their defaults, which do nothing. A subclass, or any object with one of these methods, is taken.

    All are called in the training process, on the first rank only; what is raised in one, but for :class:`StopRun`,
    ends the run as it stands. Rows are the caller's own: changing one changes nothing.
    """

    def on_step(self, row: dict[str, Any]) -> None:
        """After each step, with its row of metrics as it was written to ``metrics.jsonl``."""

    def on_samples(self, rows: list[dict[str, Any]]) -> None:
        """When a table of sample answers is due (``log.samples_every``), before ``on_step``: a row for each answer,
        with ``step``, ``id``, ``question``, ``answer``, ``reward``, ``rewards`` and more, as in ``samples.jsonl``."""

    def on_checkpoint(self, path: Path) -> None:
        """After a checkpoint was written, with its folder; the Hugging Face folder is ``path / "model"``."""

    def on_eval(self, row: dict[str, Any]) -> None:
        """After an evaluation during the run, with its row of metrics."""


HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class Callbacks:
    """Several callbacks as one; :attr:`reason` is why one of them ended the run (None: none did).

    Raises:
        TypeError: an object with none of the hooks, with a misspelt one, or a class in place of an object.
    """

    def __init__(self, callbacks: Iterable[object] = ()) -> None:
        self.reason: str | None = None
        self._hooks: dict[str, list[Callable[[Any], object]]] = {name: [] for name in HOOKS}
        for callback in callbacks:
            self.add(**_hooks_of(callback))

    def add(self, **hooks: Callable[[Any], object] | None) -> None:
        """Call further functions, by the name of their hook."""
        for name, function in hooks.items():
            if function is not None:
                self._hooks[name].append(function)

    def step(self, row: Row) -> None:
        """Tell of a step."""
        self._tell("on_step", lambda: dict(row))

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """Tell of sample answers."""
        self._tell("on_samples", lambda: [{"step": step, **row} for row in rows])

    def checkpoint(self, path: Path) -> None:
        """Tell of a checkpoint."""
        self._tell("on_checkpoint", lambda: path)

    def evaluation(self, row: Row) -> None:
        """Tell of an evaluation."""
        self._tell("on_eval", lambda: dict(row))

    def _tell(self, name: str, make: Callable[[], Any]) -> None:
        for function in self._hooks[name]:
            try:
                function(make())
            except StopRun as stop:  # the others are told all the same
                self.reason = self.reason or str(stop) or "a callback said so"


def _hooks_of(callback: object) -> dict[str, Callable[[Any], object]]:
    """The hooks that an object has."""
    what = f"callback {callback!r}"
    if isinstance(callback, type):
        raise TypeError(f"{what} is a class: give an object of it")
    for name in dir(callback):
        if name.startswith("on_") and name not in HOOKS and (near := nearest(name, HOOKS, cutoff=0.8)):
            raise TypeError(f"{what}: {name} is no hook; did you mean {near}? Hooks: {', '.join(HOOKS)}")
    found = {name: getattr(callback, name, None) for name in HOOKS}
    hooks = {name: function for name, function in found.items() if callable(function)}
    wrong = [name for name, value in found.items() if value is not None and name not in hooks]
    if wrong:
        raise TypeError(f"{what}: {wrong[0]} must be a function, got {found[wrong[0]]!r}")
    if not hooks:
        raise TypeError(f"{what} has none of the hooks: {', '.join(HOOKS)}")
    return hooks
