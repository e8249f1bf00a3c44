"""The machine while something is measured: its cores, and what other processes take of them."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

import torch

QUIET = 0.1  # cores' worth of other processes below which the machine counts as idle
_SAMPLE = 1.0  # seconds of the check before a run


def pin(threads: int | None) -> None:
    """Give torch this many threads and this process as many cores. None leaves both as they are.

    Raises:
        ValueError: the process may use fewer cores.
    """
    if threads is None:
        return
    allowed = cores()
    if not 1 <= threads <= len(allowed):
        raise ValueError(f"--threads: from 1 to {len(allowed)}, the cores of this process, got {threads}")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, allowed[:threads])
    torch.set_num_threads(threads)


def pin_or_exit(parser: argparse.ArgumentParser, threads: int | None) -> None:
    """``pin`` for a command: what it cannot do is an error of its arguments."""
    try:
        pin(threads)
    except ValueError as error:
        parser.error(str(error))


def cores() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class Others:
    """What other processes, and the host of a virtual machine, take of this process's cores since it was made."""

    def __init__(self) -> None:
        self._cores = cores()
        self._begin = _spent(self._cores)

    def busy(self) -> float:
        """In cores: 0.5 is half of one. Never below 0."""
        wall, all_of_it, own = (now - then for now, then in zip(_spent(self._cores), self._begin, strict=True))
        return max(0.0, all_of_it - own) / wall if wall > 0 else 0.0


def _spent(chosen: Sequence[int]) -> tuple[float, float, float]:
    """Seconds: of the clock, of the cores on anything but idling, and of this process with its children."""
    import psutil

    per_core = psutil.cpu_times(percpu=True)
    every = sum(
        sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
        for number, times in enumerate(per_core)
        if number in chosen
    )
    me = psutil.Process()
    own = sum(me.cpu_times()[:4])  # of this process, and of children that ended
    for child in me.children(recursive=True):
        try:
            own += sum(child.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return time.perf_counter(), every, own


def busy_before(seconds: float = _SAMPLE) -> float:
    """Cores that others take while this process sleeps."""
    others = Others()
    time.sleep(seconds)
    return others.busy()


def notice(busy: float) -> str:
    """What to print before a run: that the machine is idle, or what the numbers are worth."""
    if busy <= QUIET:
        return f"others take {busy:.2f} of {len(cores())} cores: idle"
    return (
        f"BUSY: others take {busy:.2f} of {len(cores())} cores. Times are those of a busy machine, ratios less so; "
        "counted FLOPs and bytes are unaffected"
    )
