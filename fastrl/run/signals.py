"""Ctrl-C and SIGTERM stop a run after its current step instead of in the middle of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals(note: Callable[[str], None]) -> Iterator[threading.Event]:
    """On Ctrl-C or SIGTERM, set an event that stops the run after its step; a second Ctrl-C stops it immediately."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(signum: int, _frame: object) -> None:
        if stop.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        note("stopping after this step (again: at once)")

    before: Mapping[signal.Signals, Any] = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
