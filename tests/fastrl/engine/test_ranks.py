"""Leaving a process: with a process group open, without the interpreter's shutdown."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrl.engine.ranks import leave
from tests.helpers.gloo import start

LEAVE = """
import atexit, sys
import torch.distributed as dist
from fastrl.engine.ranks import leave

dist.init_process_group("gloo")
dist.barrier()
atexit.register(sys.stderr.write, "the shutdown ran")
sys.stderr.write("the reason")
leave(int(sys.argv[1]))
"""


def test_one_process_leaves_as_usual() -> None:
    with pytest.raises(SystemExit) as stop:
        leave(2)
    assert stop.value.code == 2


def test_a_process_of_several_leaves_at_once_with_its_message(tmp_path: Path) -> None:
    for process in start(LEAVE, tmp_path, 3):
        _, message = process.communicate(timeout=300)
        assert process.returncode == 3, message
        assert message.endswith("the reason")
