"""Dispatch a run's events to its log, its progress display and the user's callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrl.run.callbacks import Callbacks
from fastrl.run.metrics import MetricsLog, NoLog
from fastrl.run.progress import Progress
from fastrl.run.samples import Sample


class Outlets:
    """Dispatches a run's events. Logs are written first, since a callback may end the run."""

    def __init__(self, log: MetricsLog | NoLog, progress: Progress, callbacks: Callbacks) -> None:
        self.log, self.progress, self.callbacks = log, progress, callbacks

    @property
    def reason(self) -> str | None:
        """Why a callback ends the run; None if none does."""
        return self.callbacks.reason

    def say(self, text: str) -> None:
        """Show a line to the user."""
        self.progress.note(text)

    def note(self, step: int, text: str) -> None:
        """Show a line and add it to the run's notes; does nothing if it is empty."""
        if text:
            self.progress.note(text)
            self.log.note(step, text)

    def step(self, row: Mapping[str, Any], samples: Sequence[Sample]) -> None:
        """Report a finished step; ``samples`` is empty unless a table of samples is due."""
        self.log.write(row)
        self.progress.step(row)
        if samples:
            step, rows = int(row["step"]), [sample.row for sample in samples]
            self.log.samples(step, samples)
            self.progress.samples(step, rows)
            self.callbacks.samples(step, rows)
        self.callbacks.step(row)

    def evaluation(self, row: Mapping[str, Any], short: str, text: str) -> None:
        """Report an evaluation: its row, a short text for later progress lines, and a line of its own."""
        self.log.evaluation(row)
        self.progress.evaluation(short, text)
        self.callbacks.evaluation(row)

    def checkpoint(self, path: Path) -> None:
        """Report a written checkpoint."""
        self.callbacks.checkpoint(path)
