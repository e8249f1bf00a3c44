"""``with run_ptx(90) as launches``: public calls on CPU tensors compute through their compiled kernels.

``fastrl_kernels.aot.as_launched`` specialises and compiles each launch as a GPU's would be; here it is then run by the
interpreter with its real arguments, and what it stores is written back to the tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastrl_kernels._common import RECORDERS
from fastrl_kernels.aot import as_launched
from tests.ptx import machine
from tests.ptx.faults import Unsupported
from tests.ptx.machine import Compiled, Counts
from tests.ptx.memory import Global
from tests.ptx.parser import parse
from tests.ptx.values import Raw

_PREPARED: dict[str, Compiled] = {}  # by the text of the PTX


class Launch(NamedTuple):
    """One kernel launch that was run."""

    name: str  # of the kernel function
    grid: tuple[int, int, int]
    warps: int
    compiled: Any  # Triton's compiled kernel
    prepared: Compiled
    counts: Counts


class _Runner:
    """Replaces the recorder of ``as_launched``."""

    def __init__(self, processors: int) -> None:
        self.processors = processors
        self.launches: list[Launch] = []

    def record(self, kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        compiled = kernel.warmup(*arguments, grid=(programs,), **options)
        named = {name: value for name, value in options.items() if name in kernel.arg_names}
        bound = kernel.signature.bind(*arguments, **named).arguments
        self.launches.append(execute(compiled, dict(bound), (programs,)))


@contextlib.contextmanager
def run_ptx(arch: int) -> Iterator[list[Launch]]:
    """Run every kernel launch in the interpreter, as compiled for ``arch`` (80, 90, 100); the list collects them.
    Memory that torch leaves uninitialised is filled with NaN, so that reads of unwritten values are detected."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    with as_launched(arch):
        runner = _Runner(RECORDERS[-1].processors)
        RECORDERS.append(runner)
        torch.use_deterministic_algorithms(True)
        try:
            yield runner.launches
        finally:
            torch.use_deterministic_algorithms(deterministic)
            RECORDERS.remove(runner)


def execute(compiled: Any, arguments: dict[str, Any], grid: tuple[int, ...]) -> Launch:
    """Run a compiled kernel with its arguments by name, as they were given to the launch."""
    text = compiled.asm["ptx"]
    if text not in _PREPARED:
        _PREPARED[text] = machine.prepare(parse(text), compiled.metadata.shared)
    prepared = _PREPARED[text]
    x, y, z = (*grid, 1, 1)[:3]
    whole = (x, y, z)
    kinds = {name: kind for name, kind in compiled.src.signature.items() if kind != "constexpr"}
    memory = Global({name: arguments[name] for name in kinds if isinstance(arguments[name], Tensor)})
    params = _params(prepared, kinds, arguments, memory)
    counts = machine.run(prepared, memory, params, whole)
    memory.write_back()
    return Launch(prepared.kernel.name, whole, compiled.metadata.num_warps, compiled, prepared, counts)


def _params(prepared: Compiled, kinds: dict[str, str], arguments: dict[str, Any], memory: Global) -> dict[str, Raw]:
    """The bits of each PTX parameter: the arguments that are not constants, then two scratch pointers that may not
    be used."""
    declared = prepared.kernel.params
    if not len(kinds) <= len(declared) <= len(kinds) + 2:
        raise Unsupported(f"{len(kinds)} arguments for {len(declared)} parameters")
    params: dict[str, Raw] = {}
    for param, name in zip(declared, kinds, strict=False):
        value = arguments[name]
        if isinstance(value, Tensor):
            params[param.name] = np.array([memory.address(value)], "u8")
        elif param.kind == "f32":
            params[param.name] = np.array([value], "f4").view("u4")
        elif param.kind in ("u8", "u16", "u32", "u64"):
            width = int(param.kind[1:])
            params[param.name] = np.array([int(value) & ((1 << width) - 1)], f"u{width // 8}")
        else:
            raise Unsupported(f"a parameter of type .{param.kind}")
    for param in declared[len(kinds) :]:
        params[param.name] = np.zeros(1, "u8")
    return params
