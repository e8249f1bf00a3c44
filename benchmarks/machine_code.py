"""Number of instructions that a launch issues: SASS instructions per loop times the interpreter's iteration counts.

The interpreter in ``tests/ptx`` counts executions of PTX instructions, but a GPU issues SASS. The assembler keeps loops
or unrolls them, so loops of both are paired, and each SASS loop is assumed to run as often as its PTX loop (divided by
the unrolling factor). ``Issued.paired`` tells whether pairing was possible.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA\b.*?\b0x([0-9a-f]+)")
_RESOURCE = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:\d+\s+LOCAL:(\d+)")


class Issued(NamedTuple):
    """Warp instructions of a launch."""

    instructions: float
    special: float  # those for the special function unit (MUFU)
    paired: bool  # False: the loops do not correspond, and these are PTX instructions


class Loop(NamedTuple):
    """First and last instruction of a natural loop."""

    first: int
    last: int


def loops(jumps: Sequence[tuple[int, int]]) -> list[Loop]:
    """Loops from (instruction, target) of branches, ordered by header. Branches back to one header are one loop."""
    last: dict[int, int] = {}
    for at, target in jumps:
        if target < at:
            last[target] = max(at, last.get(target, at))
    return [Loop(first, last[first]) for first in sorted(last)]


def own(found: Sequence[Loop], length: int) -> list[list[int]]:
    """Instructions outside of loops, then for each loop those that are not in an inner loop."""
    where = [0] * length
    for number, loop in sorted(enumerate(found, 1), key=lambda pair: pair[1].first - pair[1].last):
        where[loop.first : loop.last + 1] = [number] * (loop.last + 1 - loop.first)  # outer loops first
    members: list[list[int]] = [[] for _ in range(len(found) + 1)]
    for at, number in enumerate(where):
        members[number].append(at)
    return members


def issued(opcodes: Sequence[str], jumps: Sequence[tuple[int, int]], executed: Counter[int], sass: str) -> Issued:
    """Warp instructions of a launch.

    Args:
        opcodes: opcodes of the PTX instructions.
        jumps: their branches as (index, target's index).
        executed: number of times a warp issued each instruction.
        sass: cuobjdump's disassembly of the same kernel.
    """
    machine = [(int(address, 16), code) for address, code in _LINE.findall(sass) if code != "NOP"]
    index = {address: at for at, (address, _) in enumerate(machine)}
    codes = [code for _, code in machine]
    back = [(at, index.get(int(match[1], 16), at)) for at, code in enumerate(codes) if (match := _BRANCH.search(code))]
    above, below = loops(jumps), loops(back)
    partners = pair([_work(opcodes, loop, _PTX) for loop in above], [_work(codes, loop, _SASS) for loop in below])
    if partners is None:
        special = sum(n for at, n in executed.items() if opcodes[at].split(".")[0] in _SPECIAL)
        return Issued(sum(executed.values()), special, paired=False)
    times = [sum(executed[at] for at in members) / max(len(members), 1) for members in own(above, len(opcodes))]
    total, special, done = 0.0, 0.0, set()
    for members, (loop, copies) in zip(own(below, len(codes)), [(0, 1), *partners], strict=True):
        rounds = 0.0 if loop in done else times[loop] / copies  # the few remaining iterations after an unrolled loop
        done.add(loop)
        total += rounds * len(members)
        special += rounds * sum("MUFU" in codes[at] for at in members)
    return Issued(total, special, paired=True)


def pair(above: Sequence[tuple[int, ...]], below: Sequence[tuple[int, ...]]) -> list[tuple[int, int]] | None:
    """For each SASS loop the number (from 1) of its PTX loop and the unrolling factor; None if they cannot be paired.

    Loops are identified by their loads, stores and exponentials. If both sides have the same number, they are paired in
    order. An unrolled loop becomes two: one with a multiple of that work and one for the remainder.
    """
    if len(above) == len(below):
        return [(number, 1) for number in range(1, len(above) + 1)]
    found: list[tuple[int, int]] = []
    for number, work in enumerate(above, 1):
        first = len(found)
        while len(found) < len(below) and (copies := _multiple(below[len(found)], work)):
            if len(found) > first and len(below) - len(found) <= len(above) - number:
                break  # the others belong to later loops
            found.append((number, copies))
        if len(found) == first:
            return None
    return found if len(found) == len(below) else None


def _multiple(work: tuple[int, ...], of: tuple[int, ...]) -> int:
    """The factor by which ``work`` is a multiple of ``of``; 0 if it is not a multiple."""
    copies = max(work) // max(max(of), 1)
    return copies if work == tuple(copies * one for one in of) else 0


def _work(code: Sequence[str], loop: Loop, names: tuple[tuple[str, ...], ...]) -> tuple[int, ...]:
    body = code[loop.first : loop.last + 1]
    return tuple(sum(any(name in text for name in kind) for text in body) for kind in names)


_PTX = (("ld.global", "cp.async.c"), ("st.global",), ("ex2",))
_SASS = (("LDG",), ("STG",), ("MUFU.EX2",))
_SPECIAL = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div")


def disassemble(cubin: bytes) -> tuple[str, int, int]:
    """SASS, registers per thread, and bytes of stack per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass, usage = (_cuobjdump(flag, file.name) for flag in ("-sass", "-res-usage"))
    resource = _RESOURCE.search(usage)
    if resource is None:
        raise RuntimeError("cuobjdump printed no resource usage")
    return sass, int(resource[1]), int(resource[2]) + int(resource[3])


def _cuobjdump(flag: str, path: str) -> str:
    import triton

    tool = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), flag, path], capture_output=True, text=True, check=True).stdout
