"""Loggers of metrics and samples besides the run's folder: TensorBoard, wandb, trackio, or a user's class.

An error in a logger is reported once and never ends the run. Loggers are imported only if named.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, MethodType
from typing import Any

from fastrl.config.registry import nearest
from fastrl.config.usercode import UserCodeError, load_function, same_folder, takes, where_it_raised
from fastrl.run.progress import printable

FAILURES = 3  # consecutive failures after which a logger is removed
CAPTION = 300  # maximum characters of a picture's caption


@dataclass(frozen=True)
class RunInfo:
    """Information about a run, passed to ``open``."""

    name: str  # name of its folder
    folder: Path
    project: str | None  # ``log.project``
    recipe: Mapping[str, Any]  # every key, plain values
    step: int  # completed steps; more than 0 on a resume, which repeats later steps that were already logged


class Logger:
    """The hooks and their defaults. A subclass, or any class with a ``log`` method, is accepted.

    All hooks are called in sequence in the training process, on the first rank only, so a slow hook delays training. An
    error is reported once and never ends the run; after three consecutive failures the logger is no longer called.
    """

    def open(self, run: RunInfo) -> None:
        """Called before the first step. A logger that fails here is not called again."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Called with the metrics of a step, as in ``metrics.jsonl``, or of an evaluation after it (``eval/…``), as in
        ``eval.jsonl``. Non-finite values are omitted."""
        raise NotImplementedError

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Called with sample answers of a step: the rows of ``samples.jsonl``, plus ``picture``: a PIL image of at most
        448 pixels per side with the true boxes in green and those of the answer in red, or None."""

    def close(self) -> None:
        """Called after the last step, also if the run failed, unless the process was killed."""


ARGUMENTS = MappingProxyType(
    {
        name: tuple(inspect.signature(hook).parameters)[1:]
        for name, hook in vars(Logger).items()
        if not name.startswith("_")
    }
)
HOOKS = tuple(ARGUMENTS)


class TensorBoard(Logger):
    """Event files in ``OUT/tensorboard``."""

    def open(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1 if run.step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        import numpy as np

        self._writer.add_text("samples", _markdown(rows), step)
        for number, row in enumerate(rows):
            if row["picture"] is not None:
                self._writer.add_image(f"samples/{number}", np.asarray(row["picture"]), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Wandb(Logger):
    """Weights & Biases; ``WANDB_MODE=offline`` keeps everything in ``OUT/wandb``. A resume continues the same run."""

    def open(self, run: RunInfo) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        kept = run.folder / "wandb-id"
        if not (run.step and kept.is_file()):
            kept.write_text(uuid.uuid4().hex[:8])
        self._wandb = wandb
        self._run = wandb.init(
            project=run.project or (None if os.environ.get("WANDB_PROJECT") else "fastrl"),
            name=run.name,
            id=kept.read_text().strip(),
            resume="allow",
            dir=str(run.folder),
            config=dict(run.recipe),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        cells = [_cells(row, self._wandb.Image) for row in rows]
        table = self._wandb.Table(columns=list(cells[0]), data=[list(row.values()) for row in cells])
        # Offline, wandb stores a table's pictures in its own folder, but these in the run's.
        pictures = [
            self._wandb.Image(row["picture"], caption=f"{row['id']}: {row['answer']}"[:CAPTION])
            for row in rows
            if row["picture"] is not None
        ]
        self._run.log({"samples": table, **({"samples/pictures": pictures} if pictures else {})}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio(Logger):
    """trackio, in its local folder (``TRACKIO_DIR``), or wherever trackio's own variables point."""

    def open(self, run: RunInfo) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio = trackio
        with redirect_stdout(sys.stderr):  # stdout is reserved for the command's result
            trackio.init(
                project=run.project or "fastrl",
                name=run.name,
                config=dict(run.recipe),
                resume="allow" if run.step else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        cells = [_cells(row, self._trackio.Image) for row in rows]
        table = self._trackio.Table(columns=list(cells[0]), data=[list(row.values()) for row in cells])
        self._trackio.log({"samples": table}, step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._trackio.finish()


BUILT_IN: Mapping[str, type[Logger]] = MappingProxyType(
    {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
)


def make_loggers(names: Sequence[str] | None) -> dict[str, Logger]:
    """The loggers that ``log.to`` names, not opened yet; None: TensorBoard if it is installed.

    Raises:
        ValueError: a logger is not installed, its file or class does not exist, or the class is not a logger.
    """
    if names is None:
        return {name: BUILT_IN[name]() for name in ("tensorboard",) if _installed(name)}
    made: dict[str, Logger] = {}
    for name in names:
        if name in BUILT_IN:
            if not _installed(name):
                raise ValueError(f"log.to: {name} is not installed: pip install 'fastrl[track]', or remove it")
            made[name] = BUILT_IN[name]()
        else:
            made[name] = _own(name)
    return made


class Loggers:
    """Several loggers as one, by name. An error of one is reported once, with its name.

    Args:
        loggers: from :func:`make_loggers`.
        run: passed to ``open``.
        say: called with messages about failures.
    """

    def __init__(self, loggers: Mapping[str, Logger], run: RunInfo, say: Callable[[str], None]) -> None:
        self._say = say
        self._failed = dict.fromkeys(loggers, 0)  # consecutive failures
        self._said: set[str] = set()
        self._loggers = dict(loggers)
        for name in loggers:
            if not self._call(name, "open", run, more="it is not called again"):
                del self._loggers[name]

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Log a row of metrics, without values that are not finite numbers."""
        values = {key: float(v) for key, v in row.items() if key != "step" and _is_finite(v)}
        self._all("log", step, values)

    def samples(self, step: int, rows: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
        """Log sample answers; ``rows`` is only called if a logger takes them."""
        if any(logger.samples != MethodType(Logger.samples, logger) for logger in self._loggers.values()):
            self._all("samples", step, rows())

    def close(self) -> None:
        """Close all loggers."""
        for name in list(self._loggers):
            self._call(name, "close", more="some of its data may be lost")
        self._loggers = {}

    def _all(self, hook: str, step: int, value: Any) -> None:
        for name in list(self._loggers):
            given = dict(value) if isinstance(value, Mapping) else [dict(row) for row in value]
            more = f"it is called until it fails {FAILURES} times in a row"
            if self._call(name, hook, step, given, more=more):
                self._failed[name] = 0
                continue
            self._failed[name] += 1
            if self._failed[name] == FAILURES:
                self._call(name, "close", more="")
                del self._loggers[name]

    def _call(self, name: str, hook: str, *given: Any, more: str) -> bool:
        """Call a hook; return whether it succeeded."""
        try:
            with same_folder():
                getattr(self._loggers[name], hook)(*given)
        except (Exception, SystemExit) as error:  # a logger must never end the run
            if name not in self._said:
                self._said.add(name)
                what = f"{where_it_raised(error)}{type(error).__name__}: {error}"
                self._say(f"logger {name} failed in {hook}: {what}; the run continues, {more}")
            return False
        return True


class _Guest(Logger):
    """An object that is not a ``Logger``: its own hooks, and the defaults of those that it does not have."""

    def __init__(self, **hooks: Callable[..., None]) -> None:
        vars(self).update(hooks)


def _own(name: str) -> Logger:
    """An instance of a user's logger class, created without arguments."""
    try:
        made = load_function(name)()
    except UserCodeError as error:
        raise ValueError(f"log.to: {error}") from None
    except (Exception, SystemExit) as error:
        what = f"{where_it_raised(error)}{type(error).__name__}: {error}"
        raise ValueError(
            f"log.to: {name} cannot be created without arguments: {what} (code that may fail belongs in open)"
        ) from error
    hooks = {hook: getattr(made, hook) for hook in HOOKS if hook in dir(made)}
    if "log" not in hooks or (isinstance(made, Logger) and type(made).log is Logger.log):
        raise ValueError(f"log.to: {name} has no log(step, values); a logger may have {', '.join(HOOKS)}")
    for hook, function in hooks.items():
        if wrong := takes(function, *ARGUMENTS[hook]):
            raise ValueError(f"log.to: {name}: {hook} {wrong}")
    for attribute in dir(type(made)):
        known = attribute.startswith("_") or attribute in HOOKS or not callable(getattr(type(made), attribute))
        if not known and (near := nearest(attribute, HOOKS, cutoff=0.8)):
            raise ValueError(f"log.to: {name}: {attribute} is not a hook of a logger; did you mean {near}?")
    return made if isinstance(made, Logger) else _Guest(**hooks)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _cells(row: Mapping[str, Any], image: Callable[[Any], Any]) -> dict[str, Any]:
    """A row of a table of samples."""
    parts = ", ".join(f"{name} {value:.3g}" for name, value in row["rewards"].items())
    texts = {name: str(row[name]) for name in ("id", "question", "answer")}
    picture = image(row["picture"]) if row["picture"] is not None else None
    return {"picture": picture, **texts, "reward": row["reward"], "rewards": parts}


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    def cell(text: object) -> str:
        return printable(text, 300).replace("|", "\\|")

    lines = ["| id | question | answer | reward |", "|---|---|---|---|"]
    for row in rows:
        reward = "" if row["reward"] is None else f"{row['reward']:.3f}"
        lines.append(f"| {cell(row['id'])} | {cell(row['question'])} | {cell(row['answer'])} | {reward} |")
    return "\n".join(lines)
