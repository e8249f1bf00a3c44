"""Compiles every shipped kernel ahead of time, without a GPU, and reads what the machine code costs.

Triton lowers to a cubin for any named architecture, and its wheel ships NVIDIA's disassembler, so a CPU-only machine
can state registers, spills, shared memory, instructions and barriers of each kernel at each shipped configuration.
``python -m fastrl_kernels.aot`` prints the table; ``--json FILE`` writes it. The tests fail where a row has a problem.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastrl_kernels._common import AotCase, interpreting
from fastrl_kernels._triton import HAS_TRITON, triton

ARCHITECTURES = (80, 90, 100)  # A100, H100/H200, B200
_ADDRESS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?P<code>.+?)\s*;")
_RESOURCE = re.compile(r"REG:(?P<registers>\d+)\s+STACK:(?P<stack>\d+)\s+SHARED:\d+\s+LOCAL:(?P<local>\d+)")


class AotRow(NamedTuple):
    """One kernel x launch configuration x architecture, as compiled."""

    name: str
    arch: int  # compute capability x 10
    warps: int
    registers: int  # per thread
    stack: int  # bytes of local memory per thread; not 0: registers were spilled
    spills: int | None  # local loads and stores in the machine code
    shared: int  # bytes per program
    instructions: int | None
    barriers: int | None  # block-wide barrier instructions


def aot_cases() -> list[AotCase]:
    """The shipped launch configurations of every module of the package that defines ``aot_cases``, sorted by name."""
    package = importlib.import_module("fastrl_kernels")
    cases: list[AotCase] = []
    for info in pkgutil.iter_modules(package.__path__, prefix="fastrl_kernels."):
        spec = importlib.util.find_spec(info.name)
        if info.name in (__name__, "fastrl_kernels.aot") or spec is None or not str(spec.origin).endswith(".py"):
            continue  # this module, or a compiled library
        define = getattr(importlib.import_module(info.name), "aot_cases", None)
        if callable(define) and define.__module__ == info.name:
            cases.extend(define())  # type: ignore[arg-type]
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"aot_cases: names used twice: {', '.join(twice)}")
    return sorted(cases, key=lambda case: case.name)


def compile_case(case: AotCase, arch: int, *, disassemble: bool = True) -> AotRow:
    """Compile one case for one architecture (80, 90 or 100) and read its machine code.

    Signature types are Triton's (``"*bf16"``, ``"i32"``, ``"fp32"``, ``"constexpr"``). Pointers are taken as aligned to
    16 bytes, as torch allocates them; an integer written ``"i32:16"`` is taken as divisible by 16, as the launcher
    would specialise it. Counting in the machine code takes the disassembler half a second: without ``disassemble``,
    ``spills``, ``instructions`` and ``barriers`` are ``None`` (``stack`` shows a spill as well).

    Raises:
        RuntimeError: under the interpreter, or without Triton.
        ValueError: arguments that are not the kernel's.
    """
    if not HAS_TRITON or interpreting():
        raise RuntimeError("ahead-of-time compilation needs Triton and no TRITON_INTERPRET")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constexprs, attrs = _specialise(case)
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        resource = _RESOURCE.search(_cuobjdump("-res-usage", cubin.name))
        codes = list(_instructions(_cuobjdump("-sass", cubin.name))) if disassemble else None
    if resource is None or codes == []:
        raise RuntimeError(f"{case.name}: cuobjdump gave no resource usage for sm_{arch}")
    return AotRow(
        name=case.name,
        arch=arch,
        warps=case.num_warps,
        registers=int(resource["registers"]),
        stack=int(resource["stack"]) + int(resource["local"]),
        spills=None if codes is None else sum(code.startswith(("LDL", "STL")) for code in codes),
        shared=int(compiled.metadata.shared),
        instructions=None if codes is None else len(codes),
        barriers=None if codes is None else sum(code.startswith("BAR.") for code in codes),
    )


def problems(case: AotCase, row: AotRow) -> list[str]:
    """What is wrong with a compiled case: spilled registers, or more shared memory or barriers than it allows."""
    where = f"{row.name} on sm_{row.arch}"
    found = []
    if row.stack or row.spills:
        found.append(f"{where}: spills ({row.stack} bytes of stack, {row.spills} local loads and stores)")
    if case.max_shared is not None and row.shared > case.max_shared:
        found.append(f"{where}: {row.shared} bytes of shared memory, allowed {case.max_shared}")
    if case.max_barriers is not None and row.barriers is None:
        raise ValueError(f"{where}: barriers are limited but were not counted")
    if case.max_barriers is not None and row.barriers is not None and row.barriers > case.max_barriers:
        found.append(f"{where}: {row.barriers} barriers, allowed {case.max_barriers}")
    return found


def aot_table(
    cases: Iterable[AotCase] | None = None, architectures: Iterable[int] = ARCHITECTURES
) -> list[dict[str, Any]]:
    """Every case (default: all shipped) x architecture as rows of plain values, for benchmarks and docs."""
    architectures = tuple(architectures)
    return [
        compile_case(case, arch)._asdict()
        for case in (aot_cases() if cases is None else cases)
        for arch in architectures
    ]


def _specialise(case: AotCase) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    names = list(case.kernel.arg_names)
    unknown = sorted({*case.signature, *case.constexprs} - set(names))
    missing = [name for name in names if name not in case.signature and name not in case.constexprs]
    if unknown or missing:
        raise ValueError(f"{case.name}: unknown arguments {unknown}, missing arguments {missing}")
    signature: dict[str, str] = {}
    attrs: dict[tuple[int], Any] = {}
    for position, name in enumerate(names):
        kind, _, divisor = case.signature.get(name, "constexpr").partition(":")
        kind = "constexpr" if name in case.constexprs else kind
        signature[name] = kind
        if kind.startswith("*") or divisor == "16":
            attrs[(position,)] = [["tt.divisibility", 16]]
    return signature, dict(case.constexprs), attrs


def _cuobjdump(flag: str, cubin: str) -> str:
    tool = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), flag, cubin], capture_output=True, text=True, check=True).stdout


def _instructions(sass: str) -> Iterator[str]:
    """Instruction texts without predicate and padding."""
    for line in sass.splitlines():
        match = _ADDRESS.match(line)
        if match:
            code = re.sub(r"^@!?\w+\s+", "", match["code"])
            if code != "NOP":
                yield code


def main(argv: list[str] | None = None) -> int:
    """Print the table, write it as JSON where asked, and return 1 if a shipped case has a problem."""
    parser = argparse.ArgumentParser(prog="python -m fastrl_kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    args = parser.parse_args(argv)
    cases = [case for case in aot_cases() if args.match in case.name]
    rows, found = [], []
    width = max((len(case.name) for case in cases), default=4)
    print(f"{'name':{width}}   sm warps regs stack spill shared instr bar")
    for case in cases:
        for arch in ARCHITECTURES:
            row = compile_case(case, arch)
            rows.append(row)
            found.extend(problems(case, row))
            print(
                f"{row.name:{width}}  {row.arch:3} {row.warps:5} {row.registers:4} {row.stack:5} {row.spills:5} "
                f"{row.shared:6} {row.instructions:5} {row.barriers:3}"
            )
    if args.json:
        payload = {"triton": triton.__version__, "kernels": [row._asdict() for row in rows]}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(payload, indent=1) + "\n")
    print("\n".join(found) or f"{len(rows)} compiled, no problem", file=sys.stderr if found else sys.stdout)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
