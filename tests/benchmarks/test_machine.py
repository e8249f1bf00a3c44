"""Cores given to a benchmark, and what other processes take of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from benchmarks import machine

_SPIN = """
import time
end = time.process_time() + 0.3
while time.process_time() < end:
    pass
print("done", flush=True)
input()
"""


@pytest.fixture
def restored() -> Iterator[list[int]]:
    before, threads = machine.cores(), torch.get_num_threads()
    yield before
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, before)
    torch.set_num_threads(threads)


def test_threads_get_as_many_cores(restored: list[int]) -> None:
    machine.pin(None)
    assert machine.cores() == restored
    machine.pin(1)
    assert torch.get_num_threads() == 1
    assert machine.cores() == (restored[:1] if hasattr(os, "sched_setaffinity") else restored)
    for wrong in (0, -1, len(restored) + 1):
        with pytest.raises(ValueError, match="--threads: from 1 to"):
            machine.pin(wrong)


def test_work_of_others_is_told_from_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = iter([(100.0, 50.0, 20.0), (110.0, 65.0, 32.0), (100.0, 50.0, 20.0), (110.0, 59.0, 30.0)])
    monkeypatch.setattr(machine, "_spent", lambda cores: next(spent))
    assert machine.Others().busy() == pytest.approx(0.3)  # 15 s of the cores, 12 of them ours, in 10 s
    assert machine.Others().busy() == 0.0  # ticks of two clocks may differ


def test_children_are_our_own() -> None:
    """A child that spins is counted whether it still runs or has ended; its CPU seconds never go down."""
    _, every, own = machine._spent(machine.cores())
    command = [sys.executable, "-c", _SPIN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "done\n"
        _, running, living = machine._spent(machine.cores())
        child.communicate("\n")
    _, after, ended = machine._spent(machine.cores())
    assert living - own >= 0.29
    assert ended - own >= 0.29
    assert running - every >= 0.25  # in ticks of the system
    assert after >= running


def test_a_busy_machine_is_said() -> None:
    assert machine.notice(0.05).endswith("idle")
    assert machine.notice(0.7).startswith("BUSY: others take 0.70 of")
