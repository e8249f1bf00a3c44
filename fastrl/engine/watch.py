"""Who keeps the others waiting: ranks tell each other how far they are, and one that waits too long stops and says for
whom.

A collective that a frozen process never joins holds every other process for ever, inside a library that nothing can
interrupt. So each rank has a thread that writes, into a folder that all ranks see (a run's checkpoints need one), how
many waits its rank has entered, and a beat that shows that the process lives. A rank that has waited longer than the
timeout looks whose count is behind its own, or who gives no sign of life, says so, and exits. As every rank that waits
does the same, the run stops.
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

EXIT = 75  # of a process that stopped waiting (EX_TEMPFAIL: going on with --resume may well work)
BEATS = 8  # within a timeout, at least
LONGEST_PAUSE = 5.0  # seconds between two of them


@dataclass
class Seen:
    """What another rank last wrote, and when that was first seen here."""

    waits: int = -1  # no word yet
    beat: int = -1
    what: str = "setting up"
    since: float = 0.0


class Watch:
    """Watches the waits of one rank.

    Args:
        folder: seen by all ranks of this run, and by no other.
        rank, world_size: who this is, and of how many.
        timeout: seconds one wait may take.
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
        self._waits, self._what = 0, "setting up"
        self._since: float | None = None  # when the present wait began
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._others = {other: Seen(since=time.monotonic()) for other in range(world_size) if other != rank}

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Inside: this rank does what it cannot end without the others. All ranks have the same waits in one order.

        Raises:
            RuntimeError: from a library that lost another rank, with the ranks that are missing.
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
        """The ranks that are behind, or give no sign of life; in words."""
        now = time.monotonic()
        silent = {r for r, seen in self._others.items() if now - seen.since > 4 * self._pause}
        behind = {r for r, seen in self._others.items() if seen.waits < self._waits}
        wanted = sorted(behind or silent)
        if not wanted:
            return "no rank in particular (all have come; is the network between them down?)"
        return "; ".join(self._described(r, r in silent, now) for r in wanted)

    def close(self) -> None:
        """Stop watching; the others are told nothing more."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(OSError):
            self._file(self.rank).unlink()

    def _described(self, rank: int, silent: bool, now: float) -> str:
        seen = self._others[rank]
        if silent:
            return f"rank {rank} (frozen or gone: no sign of life for {now - seen.since:.0f} s, last {seen.what})"
        return f"rank {rank} (alive, has not come; last {seen.what})"

    def _run(self) -> None:
        beat = 0
        while not self._ended.is_set():
            beat += 1
            with suppress(OSError):  # a folder that fails for a moment is no reason to stop
                self._write(beat)
            self._look()
            since, what = self._since, self._what
            if since is not None and time.monotonic() - since > self.timeout:
                seconds = time.monotonic() - since
                self._stop(f"rank {self.rank} waited {seconds:.0f} s in {what} for {self.missing()}")
                return
            self._ended.wait(self._pause)

    def _write(self, beat: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self._file(self.rank).with_suffix(".writing")
        temporary.write_text(json.dumps([self._waits, beat, self._what]))
        os.replace(temporary, self._file(self.rank))

    def _look(self) -> None:
        for rank, seen in self._others.items():
            try:
                waits, beat, what = json.loads(self._file(rank).read_text())
            except (OSError, ValueError, TypeError):
                continue
            if (waits, beat) != (seen.waits, seen.beat):
                self._others[rank] = Seen(waits, beat, what, time.monotonic())

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"


def _exit(text: str) -> None:
    """Say why and leave, whatever the main thread hangs in."""
    print(f"error: {text}; stopping (engine.timeout). Go on with --resume", file=sys.stderr, flush=True)
    os._exit(EXIT)
