"""Measures a callable: time, temporary memory, and the device's peak rates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastrl.studies.machine import cpu_name

Call = Callable[[], Any]
# Sustained on random data (dense FLOP/s by dtype; bytes/s of a copy, read and write counted), by device name.
KNOWN = {"H200": ({"bfloat16": 788e12, "float16": 788e12}, 4.3e12)}
_FLUSH_BYTES = 256 << 20  # more than any L2


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's model as the system states it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def device_peaks(device: torch.device) -> dict[str, Any]:
    """Best FLOP/s per dtype and bytes/s: from ``KNOWN``, else measured by a matmul and a copy."""
    dtypes = [torch.float32] if device.type == "cpu" else [torch.float32, torch.bfloat16]
    known = next((value for key, value in KNOWN.items() if key in device_name(device)), ({}, None))
    flops = dict(known[0])
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        if name not in flops:
            n = 1024 if device.type == "cpu" else 8192
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            flops[name] = 2 * n**3 / _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
    if known[1] is not None:
        return {"flops": flops, "bytes_per_s": known[1], "source": "table"}
    source = torch.ones((64 << 20) if device.type == "cpu" else (1 << 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rate = 2 * source.numel() / _best(lambda: target.copy_(source), device)
    return {"flops": flops, "bytes_per_s": rate, "source": "measured: matmul and copy"}


def _best(call: Call, device: torch.device) -> float:
    rounds = 100 if device.type == "cpu" else 7  # an idle CPU takes a second to reach its full clock
    return min(min(times["warm"].data) for times in interleaved({"": call}, device, rounds, cold=False).values())


def interleaved(
    calls: dict[str, Call], device: torch.device, rounds: int, *, reset: Call | None = None, cold: bool = True
) -> dict[str, dict[str, Any]]:
    """Times each call once per round, in turn, so that disturbances affect all of them.

    Returns per name ``{"warm": Stats}`` (pytest-benchmark's statistics, seconds), on a GPU also ``"cold"``: the same
    with the L2 cache overwritten before; on a CPU also ``"cpu"``: seconds of the process on all its cores. ``data`` of
    each is in the order of the rounds. Calls of less than a millisecond on a CPU are timed several at a time.
    """
    from pytest_benchmark.stats import Stats

    gpu = device.type == "cuda"
    kinds = ("warm", "cold") if gpu and cold else ("warm",)
    flush = torch.empty(_FLUSH_BYTES if len(kinds) > 1 else 0, dtype=torch.uint8, device=device)
    found = {name: {kind: Stats() for kind in (*kinds, *(() if gpu else ("cpu",)))} for name in calls}
    numbers = {name: _calls_per_round(call, device, reset) for name, call in calls.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            for kind in kinds:
                if reset is not None:
                    reset()
                if kind == "cold":
                    flush.zero_()
                began = time.process_time()
                found[name][kind].update(_seconds(call, device, numbers[name]) / numbers[name])
                if not gpu:
                    found[name]["cpu"].update((time.process_time() - began) / numbers[name])
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile; of a single value, three times that value."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def spread(values: Sequence[float]) -> dict[str, float]:
    """The quartiles by name, for the JSON of a result."""
    return dict(zip(("q1", "median", "q3"), quartiles(values), strict=True))


def unsteady(found: dict[str, float]) -> bool:
    """Whether the quartiles lie further apart than a quarter of the median."""
    return found["q3"] - found["q1"] > abs(found["median"]) / 4


def _calls_per_round(call: Call, device: torch.device, reset: Call | None) -> int:
    if device.type == "cuda" or reset is not None:
        return 1
    call()
    return max(1, min(1000, int(1e-3 / max(_seconds(call, device, 1), 1e-7))))


def _seconds(call: Call, device: torch.device, number: int) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    from pytest_benchmark.timers import default_timer

    begin = default_timer()
    for _ in range(number):
        call()
    return default_timer() - begin


def graphed(call: Call) -> Call:
    """The call captured in a CUDA graph after a warm-up; returns its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_bytes(call: Call, device: torch.device) -> int:
    """Peak bytes of tensors alive during one call, minus those before it; results count."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()  # alive until the profiler stops
    del kept
    return running_peak(profile)


def running_peak(profile: Any) -> int:
    """Peak bytes allocated inside a profile with ``profile_memory``, minus those at its start."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak
