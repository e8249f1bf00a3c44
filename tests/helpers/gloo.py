"""A data-parallel engine for tests: the local one with gradients averaged over processes by gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastrl.config.sections import EngineRecipe, OptimRecipe
from fastrl.engine.base import Shardable, StepInfo
from fastrl.engine.local import LocalEngine
from fastrl.engine.ranks import Ranks
from fastrl.engine.watch import Watch

REPO = Path(__file__).resolve().parents[2]


class GlooEngine(LocalEngine):
    """Processes and where they meet come from the environment, as torchrun sets it."""

    def __init__(
        self,
        model: nn.Module,
        optim: OptimRecipe,
        engine: EngineRecipe,
        folder: Path,
        *,
        alias: Callable[[str], str],
        cores: Sequence[Shardable] = (),
    ) -> None:
        super().__init__(model, optim, alias=alias)
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._watch = Watch(folder, self.rank, self.world_size, engine.timeout)
        ranks = Ranks(self._watch, torch.device("cpu"))
        self.average, self.maximum, self.gather = ranks.average, ranks.maximum, ranks.gather  # type: ignore[method-assign]
        self.barrier = ranks.barrier  # type: ignore[method-assign]

    def step(self) -> StepInfo:
        with self._watch.waiting("an update"):
            for parameter in self._masters.values():
                gradient: Tensor = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                dist.all_reduce(gradient)
                parameter.grad = gradient / self.world_size
        return super().step()

    def save(self, folder: Path) -> None:
        if self.rank == 0:
            super().save(folder)

    def abandon(self, error: str) -> None:
        self._watch.abandon(error)

    def close(self) -> None:
        self.barrier()
        self._watch.close()
        dist.destroy_process_group()


def environment(rank: int, port: int, repo: Path, ranks: int = 2) -> dict[str, str]:
    """For process ``rank`` of ``ranks``."""
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(repo), str(repo / "kernels"), os.environ.get("PYTHONPATH", "")]),
    }


def start(code: str, folder: Path, *arguments: Any, ranks: int = 2) -> list[subprocess.Popen[str]]:
    """Run ``code`` in ``ranks`` processes."""
    script = folder / "script.py"
    script.write_text(code)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(script), *map(str, arguments)]
    return [
        subprocess.Popen(command, env=environment(rank, port, REPO, ranks), stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
