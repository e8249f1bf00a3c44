"""Measures the time of a step's phases without synchronising the device between phases."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

PHASES = ("preprocess", "vision", "prefill", "decode", "reward", "forward", "backward", "optimizer")


@dataclass
class _Mark:
    """A point in time: on the host, and with a GPU an event in its stream."""

    seconds: float
    event: Any = None

    @staticmethod
    def now() -> _Mark:
        event = None
        if torch.cuda.is_initialized():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return _Mark(time.perf_counter(), event)

    def until(self, end: _Mark) -> float:
        if self.event is None or end.event is None:
            return end.seconds - self.seconds
        return self.event.elapsed_time(end.event) / 1e3


@dataclass
class _Span:
    name: str
    start: _Mark
    end: _Mark | None = None
    inside: list[_Span] = field(default_factory=list)

    def seconds(self) -> float:
        assert self.end is not None
        return self.start.until(self.end)


class Clock:
    """Seconds spent in named phases.

    On a GPU a phase begins and ends with events in its stream: its time is that of the device's work (and of waiting
    for the host), and nothing synchronises before :meth:`read`. The time of a nested phase is subtracted from the outer
    one, so that phases sum to the total. A clock is used by one thread only.
    """

    def __init__(self) -> None:
        self._open: list[_Span] = []
        self._done: list[_Span] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to phase ``name``."""
        span = _Span(name, _Mark.now())
        if self._open:
            self._open[-1].inside.append(span)
        self._open.append(span)
        self._done.append(span)
        try:
            with torch.profiler.record_function(name):  # a range in a trace, if one is being taken
                yield
        finally:
            span.end = _Mark.now()
            self._open.pop()

    def read(self) -> dict[str, float]:
        """Seconds of each completed phase since the last call. Synchronises a GPU."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        ended = [span for span in self._done if span.end is not None]
        self._done = [span for span in self._done if span.end is None]
        for span in ended:
            own = span.seconds() - sum(inner.seconds() for inner in span.inside)
            seconds[span.name] = seconds.get(span.name, 0.0) + max(own, 0.0)
        return seconds
