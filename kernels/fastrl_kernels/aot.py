"""Compiles kernels without a GPU exactly as a launch would, and reads the resource usage of the machine code.

Inside ``with as_launched(90) as launches:`` public calls on CPU tensors take the Triton path. Triton gets a driver
whose device has that compute capability, and each launch is specialised on its actual arguments (an integer 1 is a
constant; divisibility by 16 and aligned pointers are attributes), compiled and recorded, but not run. Results of such a
call are uninitialised memory. Triton's wheel includes NVIDIA's assembler and disassembler, so this works on any
machine.

``python -m fastrl_kernels.aot`` compiles the public API at realistic sizes (``_aot_calls``) for three architectures and
prints a table; ``--json FILE`` writes it. A register spill is a failure, also in the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor

from fastrl_kernels._common import RECORDERS, interpreting
from fastrl_kernels._triton import HAS_TRITON, triton

ARCHITECTURES = (80, 90, 100)  # A100, H100/H200, B200
_PROCESSORS = {80: 108, 90: 132, 100: 148}
_ADDRESS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?P<code>.+?)\s*;")
_RESOURCE = re.compile(r"REG:(?P<registers>\d+)\s+STACK:(?P<stack>\d+)\s+SHARED:\d+\s+LOCAL:(?P<local>\d+)")
_BARRIER = re.compile(r"^\s*(?:@!?%p\d+ )?(?:bar\.sync|barrier\.sync)", re.MULTILINE)


class Launch(NamedTuple):
    """A kernel launched by a public call on one architecture."""

    name: str  # name of the kernel
    registers: int  # per thread
    stack: int  # bytes of local memory per thread; nonzero if registers were spilled
    shared: int  # bytes per program
    barriers: int  # number of barrier instructions
    call: str  # the public call that launches it first
    arch: int  # compute capability x 10
    warps: int
    programs: int
    compiled: Any  # Triton's compiled kernel: ``asm["ptx"]``, ``asm["cubin"]``

    def row(self) -> dict[str, Any]:
        """Plain values, with the number of instructions (without padding)."""
        return {**self._asdict(), "instructions": len(instructions(self.compiled))} | {"compiled": None}


class _Driver:
    """The part of a driver that Triton needs to compile."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        return f"sm_{self.arch}"  # a name that no real driver uses, so that these kernels are cached separately

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


class _Recorder:
    def __init__(self, arch: int) -> None:
        self.arch, self.processors = arch, _PROCESSORS[arch]
        self.launches: list[Launch] = []
        self._seen: set[str] = set()
        self._calls: dict[str, str] = {}  # module -> its last public call

    def record(self, kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        call = self._public_call()
        compiled = kernel.warmup(*arguments, grid=(programs,), **options)
        if compiled.hash in self._seen:
            return
        self._seen.add(compiled.hash)
        resource = _RESOURCE.search(_cuobjdump(compiled.asm["cubin"], "-res-usage"))
        if resource is None:
            raise RuntimeError(f"{call}: cuobjdump gave no resource usage for sm_{self.arch}")
        launch = Launch(
            name=compiled.metadata.name,
            registers=int(resource["registers"]),
            stack=int(resource["stack"]) + int(resource["local"]),
            shared=int(compiled.metadata.shared),
            barriers=len(_BARRIER.findall(compiled.asm["ptx"])),
            call=call,
            arch=self.arch,
            warps=int(compiled.metadata.num_warps),
            programs=programs,
            compiled=compiled,
        )
        self.launches.append(launch)

    def _public_call(self) -> str:
        """The public call on the stack as text. A backward has none; it gets the last call of its module's forward."""
        public = importlib.import_module("fastrl_kernels").__all__
        modules, outermost = [""], None
        frame = sys._getframe(2)
        while frame is not None:
            package, _, name = str(frame.f_globals.get("__name__")).rpartition(".")
            if package.split(".")[0] == "fastrl_kernels" and not name.startswith("_"):
                modules.append(name)
                if frame.f_code.co_name in public:
                    outermost = frame
            frame = frame.f_back
        if outermost is None:
            return f"{self._calls.get(modules[-1], modules[-1])}, backward"
        call = _describe(outermost)
        self._calls.update(dict.fromkeys(modules, call))
        return call


def _describe(frame: FrameType) -> str:
    """A public function's frame as the text of a call: arguments that are not defaults, tensors as dtype and shape."""
    function = frame.f_globals[frame.f_code.co_name]
    arguments = []
    for name, parameter in inspect.signature(function).parameters.items():
        value = frame.f_locals[name]
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments += [f"{key}={_value(x)}" for key, x in value.items()]
        elif value is not parameter.default and not (
            isinstance(value, int | float | str) and value == parameter.default
        ):
            arguments.append(f"{name}={_value(value)}")
    return f"{function.__name__}({', '.join(arguments)})"


def _value(value: object) -> str:
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f").replace("int", "i")
        return f"{kind}{list(value.shape)}".replace(" ", "")
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_value, value))})"
    return repr(value)


@contextlib.contextmanager
def as_launched(arch: int) -> Iterator[list[Launch]]:
    """Compile public calls on CPU tensors as a GPU of this architecture would; yields the list of their kernels.

    Each kernel is in the list once, even if it is launched several times. Sizes affect the compiled code only by being
    1 or divisible by 16, and through launch configurations, so small batches are enough.

    Args:
        arch: compute capability times 10: 80 (A100), 90 (H100, H200) or 100 (B200).

    Raises:
        RuntimeError: under the interpreter, or without Triton.
        ValueError: the architecture is not supported.
    """
    if not HAS_TRITON or interpreting():
        raise RuntimeError("ahead-of-time compilation needs Triton and no TRITON_INTERPRET")
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch: expected one of {', '.join(map(str, ARCHITECTURES))}, got {arch}")
    driver = importlib.import_module("triton.runtime.driver").driver
    before, recorder = driver._active, _Recorder(arch)
    driver.set_active(_Driver(arch))
    RECORDERS.append(recorder)
    try:
        yield recorder.launches
    finally:
        RECORDERS.remove(recorder)
        driver.set_active(before)


def instructions(compiled: Any) -> list[str]:
    """The instructions of a compiled kernel's machine code, without predicates and padding."""
    found = []
    for line in _cuobjdump(compiled.asm["cubin"], "-sass").splitlines():
        match = _ADDRESS.match(line)
        if match:
            code = re.sub(r"^@!?\w+\s+", "", match["code"])
            if code != "NOP":
                found.append(code)
    return found


def problems(launch: Launch) -> list[str]:
    """Problems of a compiled kernel: spilled registers, or a barrier in a program of one warp."""
    where = f"{launch.name} on sm_{launch.arch}, launched by {launch.call}"
    found = []
    if launch.stack:
        found.append(f"{where}: spills ({launch.stack} bytes of stack)")
    if launch.warps == 1 and launch.barriers:
        found.append(f"{where}: {launch.barriers} barriers in a program of one warp")
    return found


@functools.cache
def _tool() -> str:
    return str(Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _cuobjdump(cubin: bytes, flag: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_tool(), flag, file.name], capture_output=True, text=True, check=True).stdout


def shipped(arch: int, names: Iterable[str] | None = None) -> list[Launch]:
    """Every kernel of the public API at realistic sizes; ``names``: only these groups of ``_aot_calls``."""
    from fastrl_kernels._aot_calls import CALLS

    with as_launched(arch) as launches:
        for name in CALLS if names is None else names:
            CALLS[name]()
    return launches


def main(argv: list[str] | None = None) -> int:
    """Print the table, write it as JSON if requested, and return 1 if a launch has a problem."""
    parser = argparse.ArgumentParser(prog="python -m fastrl_kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to this file as JSON")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="compile only these public functions")
    args = parser.parse_args(argv)
    rows, found = [], []
    print("  sm warps regs stack shared bar kernel, call")
    for arch in ARCHITECTURES:
        for launch in shipped(arch, args.only):
            rows.append(launch)
            found.extend(problems(launch))
            print(
                f"{launch.arch:4} {launch.warps:5} {launch.registers:4} {launch.stack:5} {launch.shared:6} "
                f"{launch.barriers:3} {launch.name}, {launch.call}"
            )
    if args.json:
        plain = [{key: value for key, value in launch.row().items() if key != "compiled"} for launch in rows]
        args.json.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(map(json.dumps, plain))  # a launch a line, so that changes are seen
        args.json.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n')
    print("\n".join(found) or f"{len(rows)} compiled, no problem", file=sys.stderr if found else sys.stdout)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
