"""Measurements of a training step: total seconds and per phase, peak memory, FLOPs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import running_peak
from fastrl.models.flops import flop_counter

PHASES = ("preprocess", "generate", "reward", "forward", "backward", "optimizer", "other")
KINDS = ("warm", "time", "count")  # measured in a step: nothing; seconds; FLOPs and memory


class Phases:
    """Seconds per phase of a step. Time in a nested phase does not count for the outer one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._open: list[tuple[str, float]] = []  # phase, time at which it (last) started counting
        self._wrapped: list[tuple[Any, str, Any]] = []

    def enter(self, name: str) -> None:
        now = self._now()
        if self._open:
            self._count(now)
        self._open.append((name, now))

    def leave(self) -> None:
        now = self._now()
        self._count(now)
        self._open.pop()
        if self._open:
            self._open[-1] = (self._open[-1][0], now)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Count calls of ``owner.method`` as phase ``name``, until :meth:`unwrap`."""
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return inner(*args, **kwargs)

        self._wrapped.append((owner, method, inner))
        setattr(owner, method, timed)

    def unwrap(self) -> None:
        """Restore all wrapped methods."""
        while self._wrapped:
            owner, method, inner = self._wrapped.pop()
            setattr(owner, method, inner)

    def read(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _count(self, now: float) -> None:
        name, since = self._open[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - since

    def _now(self) -> float:
        return now(self.device)


def now(device: torch.device) -> float:
    """Time in seconds after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Recorder:
    """Measurements of a side's steps: ``seconds`` and ``by_phase`` of every timed one, ``flops``, ``step_bytes``."""

    def __init__(self, device: torch.device, phases: Phases) -> None:
        self.device, self.phases = device, phases
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []  # of all threads of this process
        self.by_phase: list[dict[str, float]] = []
        self.flops: int | None = None
        self.flops_by_operator: dict[str, int] = {}
        self.step_bytes: int | None = None

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Measure one of ``KINDS`` for the step in a block."""
        self.phases.read()
        if kind == "count":
            with peak_of_step(self.device) as found, flop_counter() as counter:
                yield
            self.step_bytes, self.flops = found[0], int(counter.get_total_flops())
            counts = counter.get_flop_counts().get("Global", {})
            self.flops_by_operator = {str(operator): int(flops) for operator, flops in counts.items()}
        else:
            begin, cpu = now(self.device), time.process_time()
            yield
            total, cpu = now(self.device) - begin, time.process_time() - cpu
            phases = self.phases.read()
            phases.pop("other", None)
            if kind == "time":
                self.seconds.append(total)
                self.cpu_seconds.append(cpu)
                self.by_phase.append(phases | {"other": total - sum(phases.values())})


@contextmanager
def peak_of_step(device: torch.device) -> Iterator[list[int]]:
    """Measure a step in a block; afterwards the list has its peak bytes of tensors beyond those alive before it."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        torch.cuda.synchronize(device)
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield found
    found.append(running_peak(profile))


def static_bytes(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes that persist between steps: weights, buffers, the optimizer's parameters and state, each storage once."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for optimizer in optimizers:
        tensors += [p for group in optimizer.param_groups for p in group["params"]]
        tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
