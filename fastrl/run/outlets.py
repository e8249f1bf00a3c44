"""Everybody who is told of a run, as one: its log, its display, and the callbacks of whoever called ``train``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrl.run.callbacks import Callbacks
from fastrl.run.metrics import MetricsLog, NoLog
from fastrl.run.progress import Progress
from fastrl.run.samples import Sample


class Outlets:
    """Passes on what happens in a run. What is written comes first: a callback may end the run."""

    def __init__(self, log: MetricsLog | NoLog, progress: Progress, callbacks: Callbacks) -> None:
        self.log, self.progress, self.callbacks = log, progress, callbacks

    @property
    def reason(self) -> str | None:
        """Why a callback ends the run; None: none does."""
        return self.callbacks.reason

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        self.progress.note(text)

    def note(self, step: int, text: str) -> None:
        """A line that stays with the run; nothing where it is empty."""
        if text:
            self.progress.note(text)
            self.log.note(step, text)

    def step(self, row: Mapping[str, Any], samples: Sequence[Sample]) -> None:
        """A step is done; ``samples`` are of a step that a table of them is due for."""
        self.log.write(row)
        self.progress.step(row)
        if samples:
            step, rows = int(row["step"]), [sample.row for sample in samples]
            self.log.samples(step, samples)
            self.progress.samples(step, rows)
            self.callbacks.samples(step, rows)
        self.callbacks.step(row)

    def evaluation(self, row: Mapping[str, Any], short: str, text: str) -> None:
        """An evaluation is done: its row, a few words for the lines to come, and a line of its own."""
        self.log.evaluation(row)
        self.progress.evaluation(short, text)
        self.callbacks.evaluation(row)

    def checkpoint(self, path: Path) -> None:
        """A checkpoint was written."""
        self.callbacks.checkpoint(path)
