"""A CUDA graph's semantics on the CPU: what a step does is recorded without effect, and replayed on the same memory."""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Records operators while active; ``undo`` takes back what they wrote, ``replay`` runs them on the same addresses.

    Values the host read while recording stay as they were: a step that depends on one replays wrongly, as a graph does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.written: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for formal, actual in zip(func._schema.arguments, args, strict=False):
            if formal.alias_info is not None and formal.alias_info.is_write:
                self.written += [(x, x.clone()) for x in tree_leaves(actual) if isinstance(x, Tensor)]
        out = func(*args, **kwargs)
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view:  # a view stays one of the same memory
            self.calls.append((func, args, kwargs, out))
        return out

    def undo(self) -> None:
        for tensor, before in reversed(self.written):
            tensor.copy_(before)
        self.written.clear()

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != value.data_ptr():
                    old.copy_(value)


class TapeGraph:
    """Stands in for ``torch.cuda.CUDAGraph``."""

    captures = 0
    replays = 0

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert pool == "the pool"
        assert capture_error_mode == "thread_local"
        self.tape = Tape()
        self.tape.__enter__()

    def capture_end(self) -> None:
        self.tape.__exit__(None, None, None)
        self.tape.undo()
        type(self).captures += 1

    def replay(self) -> None:
        type(self).replays += 1
        self.tape.replay()


def stand_in(monkeypatch: Any, graphs: Any) -> type[TapeGraph]:
    """Let ``fastrl.rollout.graphs`` capture on the CPU; returns the class that counts."""
    counted = type("Counted", (TapeGraph,), {})
    stream = SimpleNamespace(wait_stream=lambda _: None)
    cuda = SimpleNamespace(
        CUDAGraph=counted, stream=lambda _: nullcontext(), current_stream=lambda _: stream, synchronize=lambda _: None
    )
    place = SimpleNamespace(stream=stream, pool="the pool", latest=None)
    monkeypatch.setattr(graphs, "torch", SimpleNamespace(cuda=cuda, device=torch.device))
    monkeypatch.setattr(graphs, "_place", lambda _: place)
    return counted


def read_no_groups(monkeypatch: Any) -> None:
    """Let the eager twin of ``decode_attention`` take ``max_rows`` for the largest group, as the kernel does, instead
    of reading it on the host: a replay with other groups would have the size of those at the capture."""

    def init(self: Any, row_offsets: Tensor, groups: int, rows: int, gq: int, max_rows: int) -> None:
        self.groups, self.rows, self.gq, self.n = groups, rows, gq, max_rows
        offsets, row = row_offsets.long(), torch.arange(rows)
        self.table = (offsets[:-1, None] + torch.arange(max_rows)).clamp(max=rows - 1)
        group = torch.searchsorted(offsets[1:].contiguous(), row, right=True)
        self.alone, self.group = group == groups, group.clamp(max=groups - 1)
        self.slot = (row - offsets[self.group]).clamp(max=max_rows - 1)

    monkeypatch.setattr(import_module("fastrl_kernels.decode_attention")._Groups, "__init__", init)
