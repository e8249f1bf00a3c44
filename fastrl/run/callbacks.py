"""Callbacks by which a caller of ``train`` follows and stops a run: ``train(recipe, callbacks=[obj])``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrl.config.registry import nearest
from fastrl.config.usercode import takes

Row = Mapping[str, Any]


class StopRun(Exception):
    """Raised in a callback, ends the run after the current step; the run is saved and can be resumed.

    Its text is shown when the run ends.
    """


class Callback:
    """The hooks; their defaults do nothing. A callback is a subclass, or any object with one of these methods.

    All hooks are called in the training process, on the first rank only. Any exception except :class:`StopRun` ends the
    run immediately. Rows are copies, which may be changed.
    """

    def on_step(self, row: dict[str, Any]) -> None:
        """After each step, with its row of metrics as it was written to ``metrics.jsonl``."""

    def on_samples(self, rows: list[dict[str, Any]]) -> None:
        """Before ``on_step``, every ``log.samples_every`` steps, with sample answers: one row per answer, with
        ``step``, ``id``, ``question``, ``answer``, ``reward``, ``rewards`` and more, as in ``samples.jsonl``."""

    def on_checkpoint(self, path: Path) -> None:
        """After a checkpoint was written, with its folder; the Hugging Face folder is ``path / "model"``."""

    def on_eval(self, row: dict[str, Any]) -> None:
        """After an evaluation during the run, with its row of metrics."""


HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class Callbacks:
    """Several callbacks as one; :attr:`reason` is why one of them ended the run (None: none did).

    Raises:
        TypeError: an object has none of the hooks, a misspelt one or one that cannot be called, or is a class.
    """

    def __init__(self, callbacks: Iterable[object] = ()) -> None:
        self.reason: str | None = None
        self._hooks: dict[str, list[Callable[[Any], object]]] = {name: [] for name in HOOKS}
        if not isinstance(callbacks, Iterable):
            raise TypeError(f"callbacks must be a list of objects, got {callbacks!r}")
        for callback in callbacks:
            self.add(**_hooks_of(callback))

    def add(self, **hooks: Callable[[Any], object] | None) -> None:
        """Add functions by the name of their hook."""
        for name, function in hooks.items():
            if function is not None:
                self._hooks[name].append(function)

    def step(self, row: Row) -> None:
        """Call ``on_step``."""
        self._call("on_step", lambda: dict(row))

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """Call ``on_samples``."""
        self._call("on_samples", lambda: [{"step": step, **row} for row in rows])

    def checkpoint(self, path: Path) -> None:
        """Call ``on_checkpoint``."""
        self._call("on_checkpoint", lambda: path)

    def evaluation(self, row: Row) -> None:
        """Call ``on_eval``."""
        self._call("on_eval", lambda: dict(row))

    def _call(self, name: str, make: Callable[[], Any]) -> None:
        for function in self._hooks[name]:
            try:
                function(make())
            except StopRun as stop:  # the other callbacks are still called
                self.reason = self.reason or str(stop) or "a callback raised StopRun"


def _hooks_of(callback: object) -> dict[str, Callable[[Any], object]]:
    """The hooks that an object has."""
    what = f"callback {callback!r}"
    if isinstance(callback, type):
        raise TypeError(f"{what} is a class: pass an instance")
    for name in dir(callback):
        if name.startswith("on_") and name not in HOOKS and (near := nearest(name, HOOKS, cutoff=0.8)):
            raise TypeError(f"{what}: {name} is not a hook; did you mean {near}? Hooks: {', '.join(HOOKS)}")
    found = {name: getattr(callback, name, None) for name in HOOKS}
    hooks = {name: function for name, function in found.items() if function is not None}
    for name, function in hooks.items():
        (argument,) = list(inspect.signature(getattr(Callback, name)).parameters)[1:]
        if wrong := takes(function, argument):
            raise TypeError(f"{what}: {name} {wrong}")
    if not hooks:
        raise TypeError(f"{what} has none of the hooks: {', '.join(HOOKS)}")
    return hooks
