"""Ctrl-C and SIGTERM ask a run to stop after its step instead of ending it in the middle."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals(note: Callable[[str], None]) -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM ask the run to stop after its step; a second Ctrl-C stops it at once."""
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
