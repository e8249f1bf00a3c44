"""``with run_ptx("sm_90") as launches``: public calls on CPU tensors compute through their compiled kernels.

Triton is given a driver whose device is one of that architecture. It then specialises and compiles each launch as it
would on such a GPU, and hands the launcher below the kernel's arguments, which the interpreter runs and writes back.
Where the library asks whether to take its Triton path the answer is yes, as under ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastrl_kernels import _common
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


class _Driver:
    """What Triton asks of a driver before it compiles: here a device's number is its architecture's."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def run_ptx(arch: int) -> Iterator[list[Launch]]:
    """Run every kernel launch in the interpreter; the list gathers them.

    Memory that torch leaves uninitialised is filled with NaN meanwhile, so a kernel that reads what nobody wrote shows.
    """
    launches: list[Launch] = []
    original = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = original(kernel, *args, grid=grid, warmup=True, **options)
        if not warmup:
            bound = kernel.device_caches[arch][4](*args, **options)[0]
            launches.append(execute(compiled, dict(bound), grid))
        return compiled

    deterministic = torch.are_deterministic_algorithms_enabled()
    with (
        mock.patch.object(triton.runtime.driver, "_active", _Driver(arch)),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(_common, "interpreting", return_value=True),
    ):
        torch.use_deterministic_algorithms(True)
        try:
            yield launches
        finally:
            torch.use_deterministic_algorithms(deterministic)


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
    """The bits of each PTX parameter: the arguments that are no constants, then two scratch pointers nobody may use."""
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
