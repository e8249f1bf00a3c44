"""``fastrl train --profile``: a trace of a few steps, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

STEPS = 2  # traced steps
BEFORE = 2  # steps before them, which load, compile and allocate


@contextmanager
def profiled(out: Path, *, steps: int, enabled: bool = True) -> Iterator[Callable[[], None]]:
    """Trace some of the next ``steps`` on CPU and GPU; yields a function to call after each step.

    Writes ``OUT/trace.json`` with the phases of :class:`fastrl.clock.Clock` as ranges. The third and fourth step are
    traced, or the last ones of a shorter run.
    """
    if not enabled:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    before = max(0, min(BEFORE, steps - STEPS))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]

    def write(profiler: Any) -> None:
        profiler.export_chrome_trace(str(out / "trace.json"))

    warm = min(before, 1)
    with warnings.catch_warnings():  # a very short run has no step for warm-up
        warnings.filterwarnings("ignore", message="Profiler won't be using warmup")
        plan = schedule(skip_first=before - warm, wait=0, warmup=warm, active=min(STEPS, max(steps, 1)), repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
