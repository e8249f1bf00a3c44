"""The cost of a piece of work on any machine: operators dispatched, storages made and their bytes, FLOPs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrl.models.flops import flop_counter


class Cost(NamedTuple):
    flops: int
    operators: int
    allocations: int
    bytes: int


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators = self.allocations = self.bytes = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {self._name(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and self._name(leaf) not in given:
                self.allocations += 1
                self.bytes += leaf.untyped_storage().nbytes()
        return out

    @staticmethod
    def _name(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata


def cost(work: Callable[[], object]) -> Cost:
    """Run ``work`` twice and count: the first time for operators and storages, the second for FLOPs."""
    with _Counter() as counter:
        work()
    with flop_counter() as flops:
        work()
    return Cost(flops.get_total_flops(), counter.operators, counter.allocations, counter.bytes)
