"""Communication between the processes of a run, with the backend of ``torch.distributed``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from fastrl.engine.watch import Watch

LATER = 60.0  # seconds by which the backend's timeout exceeds the watch's, so that the watch can report the rank


class LostRank(RuntimeError):
    """Another process of the run is gone."""


def leave(status: int) -> NoReturn:
    """End this process with ``status``. With an open process group, do it without the interpreter's shutdown: the
    backend's threads may still hold tensors of an operation that failed, and a shutdown under them aborts or hangs.
    """
    if dist.is_available() and dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def begin(device: torch.device, timeout: float) -> bool:
    """Open the process group of a run if none is open; returns whether it did.

    Args:
        device: of the model: NCCL on a GPU (and gloo for tensors on the host), else gloo.
        timeout: of the watch, in seconds.
    """
    if dist.is_initialized():
        return False
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout + LATER))
    return True


class Ranks:
    """Collective operations, each timed by ``watch``. ``device``: device of tensors for the backend."""

    def __init__(self, watch: Watch, device: torch.device) -> None:
        self.watch, self.device = watch, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def average(self, value: float) -> float:
        """Mean over ranks."""
        return self._reduce(value, dist.ReduceOp.SUM, "a mean") / self.world_size

    def maximum(self, value: float) -> float:
        """The largest of all ranks' values."""
        return self._reduce(value, dist.ReduceOp.MAX, "a maximum")

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of each rank, in the order of ranks."""
        gathered: list[Any] = [None] * self.world_size
        with self.joined("a gathering of metrics"):
            dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        """Wait for all ranks."""
        with self.joined("a barrier"):
            dist.barrier()

    def _reduce(self, value: float, op: Any, what: str) -> float:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        with self.joined(what):
            dist.all_reduce(tensor, op=op)
            return float(tensor)  # synchronises on a GPU

    @contextmanager
    def joined(self, what: str, *, computes: bool = False) -> Iterator[None]:
        """A block with collective operations. A broken connection raises ``LostRank``, which names the ranks.

        Args:
            what: for the message.
            computes: the block also runs the model, whose own errors (out of memory, a bad shape) stay what they are.
        """
        with self.watch.waiting(what):
            try:
                yield
            except RuntimeError as error:  # the type by which backends report a broken connection
                if computes and not _is_of_a_backend(error):
                    raise
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise LostRank(
                    f"rank {self.rank} lost another in {what}; missing: {self.watch.missing()} ({reason})"
                ) from None


class OnRanks:
    """What every engine of several processes hands on to its ``Ranks`` and its ``Watch``."""

    _ranks: Ranks
    _watch: Watch

    def average(self, value: float) -> float:
        return self._ranks.average(value)

    def maximum(self, value: float) -> float:
        return self._ranks.maximum(value)

    def gather(self, value: Any) -> list[Any]:
        return self._ranks.gather(value)

    def barrier(self) -> None:
        self._ranks.barrier()

    def abandon(self, error: str) -> None:
        self._watch.abandon(error)


def _is_of_a_backend(error: RuntimeError) -> bool:
    """NCCL's errors have a type; gloo's are plain ones that begin with its source file."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))
