"""Leaving a process: with a process group open, without the interpreter's shutdown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastrl.engine.base import NonFiniteError
from fastrl.engine.ranks import LostRank, Ranks, leave
from fastrl.engine.watch import Watch
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


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Ranks]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(Watch(tmp_path, 0, 1, 60), torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("mat1 and mat2"), NonFiniteError("nan")]
)
def test_an_error_of_the_model_is_no_lost_rank(alone: Ranks, error: RuntimeError) -> None:
    with pytest.raises(RuntimeError) as found, alone.joined("a forward", computes=True):
        raise error
    assert found.value is error


@pytest.mark.parametrize("computes", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp"),
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
    ],
)
def test_a_broken_connection_is_a_lost_rank(alone: Ranks, error: RuntimeError, computes: bool) -> None:
    with pytest.raises(LostRank, match="rank 0 lost another in a step"), alone.joined("a step", computes=computes):
        raise error
