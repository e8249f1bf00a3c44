"""Reads the PTX that Triton emits: one entry function, its parameters, and its instructions with their source lines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

_ENTRY = re.compile(r"\.visible\s+\.entry\s+([\w$]+)\s*\((.*?)\)", re.DOTALL)
_PARAM = re.compile(r"\.param\s+\.(\w+)\s+(?:\.ptr\s+\.\w+\s+\.align\s+\d+\s+)?([\w$]+)")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%\w+?)<(\d+)>")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', re.MULTILINE)
_LOC = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)\s+\d+")
_LABEL = re.compile(r"^(\$?[\w$]+):")
_GUARD = re.compile(r"^@(!?)(%\w+)\s+")
_TOKEN = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_ADDRESS = re.compile(r"^\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]$")


class Param(NamedTuple):
    """A kernel parameter and its PTX type (``u64``, ``u32``, ``f32``, ...)."""

    name: str
    kind: str


@dataclass(frozen=True)
class Address:
    """``[base + offset]``; the base is a register, a parameter or a symbol."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]  # a register, number or symbol; a memory operand; a vector of registers


class Instruction(NamedTuple):
    """One instruction. ``guard`` is ``(register, negated)``; a branch's target is its operand."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None
    where: str  # "file.py:line" of the kernel's source
    text: str


class Kernel(NamedTuple):
    """A parsed entry function."""

    name: str
    params: tuple[Param, ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # label -> index of the instruction that follows
    threads: int  # per program
    registers: dict[str, str]  # register prefix -> type, e.g. "%r" -> "b32"


def parse(ptx: str) -> Kernel:
    """The one entry function of a PTX module.

    Raises:
        ValueError: no entry or several, a function call, or text that is none of what Triton emits.
    """
    entries = _ENTRY.findall(ptx)
    if len(entries) != 1:
        raise ValueError(f"expected one entry function, found {len(entries)}")
    name, declared = entries[0]
    params = tuple(Param(symbol, kind) for kind, symbol in _PARAM.findall(declared))
    header, _, rest = ptx[ptx.index(".entry") :].partition("{")
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", header)
    if threads is None:
        raise ValueError(f"{name}: the number of threads is not declared")
    files = {number: (second or first).rsplit("/", 1)[-1] for number, first, second in _FILE.findall(ptx)}
    body = rest[: rest.index("\n}")]
    registers = {prefix: kind for kind, prefix, _ in _REGISTERS.findall(body)}
    instructions, labels = _body(body, files)
    return Kernel(name, params, tuple(instructions), labels, int(threads[1]), registers)


def _body(body: str, files: dict[str, str]) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    where = "?"
    for raw in body.splitlines():
        line = raw.partition("//")[0].strip()
        if loc := _LOC.match(line):
            if loc[2] != "0":  # line 0: the compiler's own code, kept under the last line known
                where = f"{files.get(loc[1], loc[1])}:{loc[2]}"
            continue
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
            line = line[label.end() :].strip()
        for text in _statements(line):
            instructions.append(_instruction(text, where))
    return instructions, labels


def _statements(line: str) -> list[str]:
    """Instructions of a line; braces that open or close a scope, and directives, are none."""
    if line in ("", "{", "}") or line.startswith("."):
        return []
    parts = [part.strip() for part in line.split(";")]
    return [part for part in parts if part and part not in ("{", "}") and not part.startswith(".")]


def _instruction(text: str, where: str) -> Instruction:
    rest = text
    guard = None
    if match := _GUARD.match(rest):
        guard = (match[2], match[1] == "!")
        rest = rest[match.end() :]
    opcode, *tail = rest.split(None, 1)
    operands = tuple(_operand(token.strip()) for token in _TOKEN.findall(tail[0] if tail else ""))
    return Instruction(opcode, operands, guard, where, " ".join(text.split()))


def _operand(token: str) -> Operand:
    if token.startswith("{"):
        return tuple(part.strip() for part in token.strip("{}").split(","))
    if token.startswith("["):
        match = _ADDRESS.match(token)
        if match is None:
            raise ValueError(f"a memory operand that is not [base + offset]: {token}")
        return Address(match[1], int(match[2] or "0", 0))
    return token
