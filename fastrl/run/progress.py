"""Progress of a run on stderr: a live line with ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

_SHOWN = ("loss", "reward/mean", "kl", "completion/length_mean")
_NAMES = {"reward/mean": "reward", "completion/length_mean": "length"}


class Progress:
    """Progress display of a run.

    Args:
        steps: number of the last step.
        done: steps that a resumed run has already done.
        every: steps between lines without a terminal.
        stream: where to write (default stderr); ``show=False`` writes nothing at all.
    """

    def __init__(
        self, steps: int, *, done: int = 0, every: int = 1, stream: TextIO | None = None, show: bool = True
    ) -> None:
        self.steps, self.done, self.every = steps, done, every
        self._stream = stream if stream is not None else sys.stderr
        self._show = show
        self._live: Any = None
        self._task: Any = None
        self._start = time.monotonic()
        self._first = done
        self._evaluated = ""  # the last evaluation

    def __enter__(self) -> Progress:
        if self._show and self._stream.isatty():
            self._live, self._task = _rich_progress(self._stream, self.steps, self.done)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, row: Mapping[str, Any]) -> None:
        """Show a finished step; ``row`` has its metrics."""
        self.done = int(row["step"])
        parts = [f"{_NAMES.get(k, k)} {row[k]:.4g}" for k in _SHOWN if isinstance(row.get(k), int | float)]
        text = "  ".join([*parts, *([f"eval {self._evaluated}"] if self._evaluated else [])])
        if self._live is not None:
            self._live.update(self._task, completed=self.done, text=text)
        elif self._show and (self.done % self.every == 0 or self.done == self.steps):
            speed = f"  {row['time/step']:.2f} s/step" if "time/step" in row else ""
            self._line(f"step {self.done}/{self.steps}  {text}{speed}  ETA {self.eta()}")

    def eta(self) -> str:
        """Estimated remaining time as [h:]mm:ss."""
        made = self.done - self._first
        left = (time.monotonic() - self._start) / made * (self.steps - self.done) if made else 0.0
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"

    def evaluation(self, short: str, text: str) -> None:
        """Show ``text`` on a line of its own, and ``short`` on progress lines from now on."""
        self._evaluated = short
        self.note(text)

    def note(self, message: str) -> None:
        """Show a message about the run."""
        if self._live is not None:
            self._live.console.print(message, markup=False, highlight=False)
        elif self._show:
            self._line(message)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of sample answers with their rewards."""
        if not self._show or not rows:
            return
        if self._live is not None:
            self._live.console.print(_rich_table(step, rows))
            return
        self._line(f"samples at step {step}:")
        for row in rows:
            parts = "  ".join(f"{k} {v:.3g}" for k, v in row["rewards"].items())
            self._line(f"  [{printable(row['id'], 40)}] reward {_number(row['reward'])} ({parts})")
            for name in ("question", "truth", "answer"):
                self._line(f"    {name + ':':<9} {printable(row[name], 160)}")

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def printable(text: object, limit: int) -> str:
    """Model output as one safe line: control characters (including terminal commands) escaped, long text cut."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "-"


def _rich_progress(stream: TextIO, steps: int, done: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    live = Progress(
        TextColumn("train"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=Console(file=stream),
    )
    return live, live.add_task("train", total=steps, completed=done, text="")


def _rich_table(step: int, rows: Sequence[Mapping[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"samples at step {step}", title_justify="left", expand=False)
    for name in ("id", "question", "truth", "answer", "reward"):
        table.add_column(name, overflow="fold")
    for row in rows:
        parts = "\n".join(f"{k} {v:.3g}" for k, v in row["rewards"].items())
        limits = {"id": 40, "question": 120, "truth": 200, "answer": 300}
        cells = [printable(row[name], limit) for name, limit in limits.items()]
        table.add_row(*(Text(c) for c in cells), Text(f"{_number(row['reward'])}\n{parts}"))
    return table
