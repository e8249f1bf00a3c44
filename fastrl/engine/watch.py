"""Detects missing ranks: ranks record their progress, and one that waits too long reports which ranks are missing and
stops.

If a frozen process never joins a collective operation, all other processes hang in a library call that cannot be
interrupted. So each rank has a thread that writes into a folder accessible to all ranks (a run's checkpoints need one)
the number of waits that its rank has entered, and a heartbeat. A rank that has waited longer than the timeout reports
the ranks with a lower count or without a heartbeat, and exits. As every waiting rank does so, the run stops.

A rank that ends with an error writes it beside its count (:meth:`Watch.abandon`): ranks that wait for it stop with that
error at their next look, within seconds, whatever the backend notices.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

EXIT = 75  # exit status of a process that stopped waiting (EX_TEMPFAIL, as --resume may succeed)
BEATS = 8  # heartbeats per timeout, at least
LONGEST_PAUSE = 5.0  # seconds between two heartbeats


@dataclass
class Seen:
    """The last record of another rank, and when it was first seen here."""

    waits: int = -1  # nothing read yet
    beat: int = -1
    what: str = "setting up"
    since: float = 0.0
    error: str = ""  # with which it ended


class Watch:
    """Watches the waits of one rank.

    Args:
        folder: accessible to all ranks of this run, and used by no other run.
        rank, world_size: this rank and the number of ranks.
        timeout: seconds allowed for one wait.
        stop: ends the process, for tests.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        timeout: float,
        *,
        stop: Callable[[str], None] | None = None,
    ) -> None:
        self.folder, self.rank, self.world_size, self.timeout = folder, rank, world_size, timeout
        self._pause = min(timeout / BEATS, LONGEST_PAUSE)
        self._stop = stop or _exit
        self._waits, self._what, self._error = 0, "setting up", ""
        self._beat = 0
        self._since: float | None = None  # start of the current wait
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._others = {other: Seen(since=time.monotonic()) for other in range(world_size) if other != rank}

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A block in which this rank waits for the others. All ranks must have the same waits in the same order.

        Raises:
            RuntimeError: a library lost another rank; the message has the missing ranks.
        """
        if self._thread is None and self.world_size > 1:
            self._thread = threading.Thread(target=self._run, daemon=True, name="fastrl-watch")
            self._thread.start()
        self._waits, self._what, self._since = self._waits + 1, what, time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def missing(self) -> str:
        """A description of the ranks that are behind or show no sign of life."""
        self._look()
        now = time.monotonic()
        silent = {r for r, seen in self._others.items() if now - seen.since > 4 * self._pause}
        behind = {r for r, seen in self._others.items() if seen.waits < self._waits}
        wanted = sorted(behind or silent)
        if not wanted:
            return "no rank in particular (all have come; is the network between them down?)"
        return "; ".join(self._described(r, r in silent, now) for r in wanted)

    def abandon(self, error: str) -> None:
        """Tell the others that this rank ends with ``error``."""
        if self.world_size > 1:
            self._ended.set()
            if self._thread is not None:
                self._thread.join()
            self._error = error
            with suppress(OSError):
                self._write()

    def forget(self) -> None:
        """Remove what an earlier run has left. Ranks do this, then meet once, before anyone watches."""
        with suppress(OSError):
            self._file(self.rank).unlink()

    def close(self) -> None:
        """Stop watching and writing heartbeats."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(OSError):
            self._file(self.rank).unlink()

    def _described(self, rank: int, silent: bool, now: float) -> str:
        seen = self._others[rank]
        if seen.error:
            return f"rank {rank}, which ended with: {seen.error}"
        if silent:
            return f"rank {rank} (frozen or gone: no sign of life for {now - seen.since:.0f} s, last {seen.what})"
        return f"rank {rank} (alive, has not come; last {seen.what})"

    def _run(self) -> None:
        while not self._ended.is_set():
            with suppress(OSError):  # a temporary failure of the folder is ignored
                self._write()
            self._look()
            if found := self._ended_with_error():
                self._stop(found)
                return
            since, what = self._since, self._what
            if since is not None and time.monotonic() - since > self.timeout:
                seconds = time.monotonic() - since
                self._stop(f"rank {self.rank} waited {seconds:.0f} s in {what} for {self.missing()}")
                return
            self._ended.wait(self._pause)

    def _ended_with_error(self) -> str:
        """Of a rank that will not come to the current wait, the error with which it ended."""
        gone = [(r, s) for r, s in self._others.items() if s.error and s.waits < self._waits]
        if self._since is None or not gone:
            return ""
        rank, seen = gone[0]
        return f"rank {self.rank} waited in {self._what} for rank {rank}, which ended with: {seen.error}"

    def _write(self) -> None:
        self._beat += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self._file(self.rank).with_suffix(".writing")
        temporary.write_text(json.dumps([self._waits, self._beat, self._what, self._error]))
        os.replace(temporary, self._file(self.rank))

    def _look(self) -> None:
        for rank, seen in self._others.items():
            try:
                waits, beat, what, *error = json.loads(self._file(rank).read_text())
            except (OSError, ValueError, TypeError):
                continue
            if (waits, beat) != (seen.waits, seen.beat):
                self._others[rank] = Seen(waits, beat, what, time.monotonic(), *error)

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"


def _exit(text: str) -> None:
    """Print the reason and exit, even if the main thread hangs."""
    print(f"error: {text}; stopping (engine.timeout). Go on with --resume", file=sys.stderr, flush=True)
    os._exit(EXIT)
