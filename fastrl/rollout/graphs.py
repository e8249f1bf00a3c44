"""A step of fixed shapes on a GPU, captured in a CUDA graph once per batch size and then replayed.

A graph replays the same kernels on the same addresses, so everything a step reads or writes, other than its own
temporaries, must keep its address. Graphs are replayed within one rollout only, in which nothing but the prompts
changes: whatever happens between two (a reloaded adapter, a moved model) cannot leave a graph with stale addresses.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache

import torch

WORTH_CAPTURING = 4  # remaining steps above which to capture: a capture costs about one or two ordinary steps


class GraphRunner:
    """Runs ``step`` at one batch size after another: directly the first time, then as a replayed graph.

    Args:
        step: takes no arguments, has fixed shapes for a given size, changes all state in place, reads nothing on the
            host.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self.step, self.device, self.place = step, device, _place(device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def run(self, size: int, left: int) -> None:
        """Run one step at batch size ``size``; ``left`` steps remain, this one included."""
        graph = self.graphs.get(size)
        if graph is not None:
            graph.replay()
            return
        self._warm_up()
        if left > WORTH_CAPTURING:
            self.graphs[size] = self.place.latest = self._capture()

    def forget(self) -> None:
        """Drop all graphs: something that they read or write has moved."""
        self.graphs.clear()

    def _warm_up(self) -> None:
        """Run one real step on the capturing stream, which compiles and loads kernels and allocates workspaces."""
        stream, current = self.place.stream, torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self.step()
        current.wait_stream(stream)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Capture ``step`` as a graph. Capturing executes nothing."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        collects = gc.isenabled()
        gc.disable()  # a collection may free a CUDA object, which is forbidden while capturing
        try:
            with torch.cuda.stream(self.place.stream):
                # Not torch.cuda.graph: it empties the allocator's cache, which the next forward would have to refill.
                # Thread-local: driver calls of other threads (pinning pictures) must not fail the capture.
                graph.capture_begin(pool=self.place.pool, capture_error_mode="thread_local")
                try:
                    self.step()
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        return graph


class _Place:
    """The stream and memory pool that all captures on a device use.

    One stream, because libraries allocate a workspace for every stream they see. One pool for temporaries, which lives
    as long as one of its graphs does: ``latest`` keeps it.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.latest: torch.cuda.CUDAGraph | None = None


@cache
def _place(device: torch.device) -> _Place:
    return _Place(device)
