"""A step of fixed shapes on a GPU, captured once per batch size in a CUDA graph and replayed.

A graph replays the same kernels on the same addresses: everything a step reads or writes beside its own temporaries
must stay where it is. Weights do while an optimizer changes them in place; here graphs are replayed within one decode
only, so nothing that happens between two rollouts (a reloaded adapter, a moved model) can be replayed over.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache

import torch

WORTH_CAPTURING = 4  # steps left: a capture costs about as much as one or two steps that the host launches


class GraphRunner:
    """Runs ``step`` for one batch size after another: the first time as it is, then as a replay.

    Args:
        step: no arguments, fixed shapes for a given size, all state changed in place, no host reads.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self.step, self.device, self.place = step, device, _place(device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def run(self, size: int, left: int) -> None:
        """One step at batch size ``size``, with ``left`` steps to go, this one included."""
        graph = self.graphs.get(size)
        if graph is not None:
            graph.replay()
            return
        self._warm_up()
        if left > WORTH_CAPTURING:
            self.graphs[size] = self.place.latest = self._capture()

    def _warm_up(self) -> None:
        """One real step, on the stream that will capture: kernels are compiled and loaded, workspaces made."""
        stream, current = self.place.stream, torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self.step()
        current.wait_stream(stream)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """``step`` as a graph. Capturing runs nothing."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        collects = gc.isenabled()
        gc.disable()  # a collection may free a CUDA object, which is forbidden while capturing
        try:
            with torch.cuda.stream(self.place.stream):
                # Not torch.cuda.graph: it empties the allocator's cache, which the next forward would have to refill.
                # Thread-local: what other threads ask of the driver meanwhile (pinning pictures) is no error.
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
    """Where a device's decodes capture, one after another: one stream, as libraries keep a workspace for each stream
    they meet, and one pool for the temporaries, which stays one as long as a graph of it is alive: the latest."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.latest: torch.cuda.CUDAGraph | None = None


@cache
def _place(device: torch.device) -> _Place:
    return _Place(device)
