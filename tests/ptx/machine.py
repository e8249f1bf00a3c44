"""Runs parsed PTX: many programs side by side, one numpy element per thread.

Threads may part at a branch. The group that stands at the lowest instruction runs until it meets the next one, so
threads that took different ways come together again where the ways do; barriers, shuffles and matrix products demand
that whoever takes part is there. A register that was never written, or that a false guard left as it was, poisons what
is computed from it; poison in a store, an address, a branch or a guard is a fault, as in a memory checker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.ptx import warp
from tests.ptx.arithmetic import resolve
from tests.ptx.faults import Divergent, Fault, OutOfBounds, Uninitialised, Unsupported
from tests.ptx.memory import Global, Index, Shared, Threads
from tests.ptx.parser import Address, Instruction, Kernel, Operand
from tests.ptx.values import Raw, decode, encode, immediate, register_size, size_of

_BATCH = 4096  # threads side by side
Mask = NDArray[np.bool_]
Poison = NDArray[np.uint8]  # per thread: bit 0 for the low half of a packed pair, bit 1 for the high one; else both
Step = Callable[["Machine"], None]


class Traffic(NamedTuple):
    """Bytes that threads asked for, and 32-byte sectors that their warps touched."""

    bytes: int = 0
    sectors: int = 0


class Counts:
    """What the programs of a launch did: instructions per warp, and bytes."""

    def __init__(self) -> None:
        self.executed: Counter[int] = Counter()  # instruction index -> times a warp issued it
        self.opcodes: Counter[str] = Counter()
        self.read = self.written = Traffic()  # global memory
        self.distinct: tuple[int, int] = (0, 0)  # bytes of global memory that were read, and written, however often
        self.shared_bytes = 0
        self.barriers = 0  # passed, summed over programs


class Compiled(NamedTuple):
    """A kernel ready to run: a step per instruction."""

    kernel: Kernel
    steps: tuple[Step, ...]
    jumps: frozenset[int]  # instructions that may move on elsewhere than to the next
    shared: int  # bytes per program
    shared_grain: int


def prepare(kernel: Kernel, shared: int) -> Compiled:
    """Translate every instruction once.

    Raises:
        Unsupported: an instruction that is not interpreted, named with its source line.
    """
    steps, jumps, widths = [], set(), {8}
    for at, instruction in enumerate(kernel.instructions):
        try:
            steps.append(_translate(instruction, kernel))
        except (Unsupported, KeyError, ValueError) as problem:
            raise Unsupported(f"{instruction.where}: {problem} [{instruction.text}]") from problem
        name = instruction.opcode.split(".")[0]
        if name in ("bra", "ret"):
            jumps.add(at)
        if ".shared" in instruction.opcode:
            widths.add(16 if name in ("cp", "ldmatrix", "stmatrix") else size_of(instruction.opcode.rsplit(".", 1)[1]))
    return Compiled(kernel, tuple(steps), frozenset(jumps), shared, min(widths))


def run(compiled: Compiled, memory: Global, params: dict[str, Raw], grid: tuple[int, int, int]) -> Counts:
    """Run all programs of the grid; stores go to ``memory``.

    Raises:
        Fault: with source line, instruction, program and thread.
    """
    counts = Counts()
    total = grid[0] * grid[1] * grid[2]
    batch = max(1, _BATCH // compiled.kernel.threads)
    for first in range(0, total, batch):
        programs = np.arange(first, min(first + batch, total))
        Machine(compiled, memory, params, grid, programs, counts).run()
    for at, times in counts.executed.items():
        counts.opcodes[compiled.kernel.instructions[at].opcode] += times
    counts.distinct = memory.touched()
    return counts


class Machine:
    """Some programs of a launch and where they stand."""

    def __init__(
        self,
        compiled: Compiled,
        memory: Global,
        params: dict[str, Raw],
        grid: tuple[int, int, int],
        programs: Index,
        counts: Counts,
    ) -> None:
        self.compiled, self.memory, self.params, self.counts = compiled, memory, params, counts
        threads = compiled.kernel.threads
        self.lanes = threads * programs.size
        self.threads, self.warps = threads, threads // 32
        self.first_program = int(programs[0])
        self.program = np.repeat(programs, threads)
        self.thread = np.tile(np.arange(threads), programs.size)
        self.warp = self.program * self.warps + self.thread // 32
        self.epoch = np.zeros(self.lanes, "i4")
        self.shared = Shared(compiled.shared, programs.size, compiled.shared_grain)
        self.registers: dict[str, Raw] = {}
        self.poison: dict[str, Poison] = {}
        self.mask: Mask | None = None  # threads that execute the current instruction; None: all
        self.copies = warp.Copies(self.lanes)
        x = self.program % grid[0]
        y, z = self.program // grid[0] % grid[1], self.program // (grid[0] * grid[1])
        special = {"tid.x": self.thread, "laneid": self.thread % 32, "warpid": self.thread // 32}
        special |= {"ctaid.x": x, "ctaid.y": y, "ctaid.z": z, "ntid.x": np.full(self.lanes, threads)}
        special |= {f"nctaid.{axis}": np.full(self.lanes, size) for axis, size in zip("xyz", grid, strict=True)}
        self.symbols = {name: np.array([at], "u8") for at, name in enumerate(params)}  # a parameter's "address"
        self.symbols["global_smem"] = np.zeros(1, "u4")
        self.special = {f"%{name}": value.astype("u4") for name, value in special.items()}

    # ---- control -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        end = len(self.compiled.steps)
        at = np.zeros(self.lanes, "i4")  # each thread's next instruction
        with np.errstate(all="ignore"):
            while True:
                here = int(at.min())
                if here >= end:
                    return
                group = at == here
                active = None if group.all() else group
                limit = end if active is None else int(at[~group].min())
                self._go(at, active, here, limit)

    def _go(self, at: Index, active: Mask | None, here: int, limit: int) -> None:
        """Run one group of threads until it parts, jumps or reaches the others at ``limit``."""
        steps, jumps, executed = self.compiled.steps, self.compiled.jumps, self.counts.executed
        warps = self.lanes // 32 if active is None else int(active.reshape(-1, 32).any(1).sum())
        where: Any = slice(None) if active is None else active
        while here < limit:
            self.mask = active
            executed[here] += warps
            if here in jumps:
                self._jump(at, active, where, here)
                return
            try:
                steps[here](self)
            except (Fault, Unsupported) as problem:
                instruction = self.compiled.kernel.instructions[here]
                raise type(problem)(f"{instruction.where}: {problem} [{instruction.text}]") from problem
            here += 1
        at[where] = here

    def _jump(self, at: Index, active: Mask | None, where: Any, here: int) -> None:
        instruction = self.compiled.kernel.instructions[here]
        target = len(self.compiled.steps)
        if instruction.opcode.startswith("bra"):
            target = self.compiled.kernel.labels[str(instruction.operands[0])]
        at[where] = here + 1
        try:
            taken = self.guarded(instruction)
        except Fault as problem:
            raise type(problem)(f"{instruction.where}: {problem} [{instruction.text}]") from problem
        at[slice(None) if taken is None else taken] = target

    def guarded(self, instruction: Instruction) -> Mask | None:
        """The threads that execute this instruction: those of the group whose guard is true. None: all."""
        if instruction.guard is None:
            return self.mask
        name, negated = instruction.guard
        guard = self.read(name, 0)
        self.demand(name, self.mask, "a guard")
        guard = ~guard if negated else guard
        guard = guard if self.mask is None else guard & self.mask
        return None if guard.all() else guard

    # ---- registers ---------------------------------------------------------------------------------------------------

    def read(self, operand: Operand, size: int) -> Raw:
        """An operand's bits: a register's per thread, or a literal's as an array of one."""
        name = str(operand)
        if name[0] != "%":
            return self.symbols[name] if name in self.symbols else immediate(name, size)
        value = self.registers.get(name)
        if value is None:
            if name in self.special:
                return self.special[name]
            width = register_size(name)
            value = np.zeros(self.lanes, bool if width == 0 else f"u{width}")
            self.registers[name] = value
            self.poison[name] = np.full(self.lanes, 3, "u1")
        return value

    def write(self, name: str, value: Raw, poison: Poison | None = None) -> None:
        """Set a register in the threads that execute."""
        if name == "_":
            return
        if value.shape != (self.lanes,):
            value = np.broadcast_to(value, (self.lanes,))
        mask = self.mask
        if mask is not None:
            old = self.read(name, 0)
            value = np.where(mask, value, old)
            before = self.poison.get(name)
            if before is not None or poison is not None:
                nothing = np.zeros(self.lanes, "u1")
                poison = np.where(mask, nothing if poison is None else poison, nothing if before is None else before)
        self.registers[name] = value
        if poison is not None and poison.any():
            self.poison[name] = poison
        else:
            self.poison.pop(name, None)

    def taint(self, *operands: Operand) -> Poison | None:
        """What is poisoned in one of these operands; None: nothing in any thread."""
        found = None
        for operand in operands:
            for name in operand if isinstance(operand, tuple) else (operand,):
                mask = self.poison.get(name) if isinstance(name, str) else None
                if mask is not None:
                    found = mask if found is None else found | mask
        return found

    def demand(self, operand: Operand, mask: Mask | None, what: str) -> None:
        """Raise where a poisoned operand would be used."""
        self.read(operand, 8)
        poison = self.taint(operand)
        if poison is not None:
            used = (poison != 0) if mask is None else (poison != 0) & mask
            if used.any():
                at = int(used.argmax())
                raise Uninitialised(
                    f"program {self.program[at]}, thread {self.thread[at]}: {what} comes from a register or memory "
                    "that was never written"
                )

    def any(self, condition: Mask) -> bool:
        """Whether it holds in a thread that executes."""
        return bool((condition if self.mask is None else condition & self.mask).any())

    # ---- memory ------------------------------------------------------------------------------------------------------

    def who(self, mask: Mask | Index | None) -> Threads:
        """The threads of a mask, or of an index."""
        chosen: Any = slice(None) if mask is None else mask
        return Threads(self.warp[chosen], self.program[chosen], self.thread[chosen], self.epoch[chosen], self.warps)

    def addresses(self, operand: Operand, mask: Mask | None) -> Index:
        """The addresses of the threads that access, in order."""
        if not isinstance(operand, Address):
            raise Unsupported(f"memory operand {operand}")
        self.demand(operand.base, mask, "an address")
        base = self.read(operand.base, 4).astype("i8") + operand.offset
        base = np.broadcast_to(base, (self.lanes,))
        return base if mask is None else base[mask]

    def count_traffic(self, before: Traffic, address: Index, mask: Mask | None, size: int) -> Traffic:
        sector = np.full(self.lanes, -1, "i8")
        sector[slice(None) if mask is None else mask] = address >> 5
        rows = np.sort(sector.reshape(-1, 32), axis=1)
        new = rows >= 0
        new[:, 1:] &= rows[:, 1:] != rows[:, :-1]
        return Traffic(before.bytes + size * address.size, before.sectors + int(new.sum()))

    def whole_warps(self, mask: Mask | None, what: str) -> None:
        """Raise unless every warp takes part with all of its threads or with none."""
        if mask is not None:
            rows = mask.reshape(-1, 32)
            torn = rows.any(1) != rows.all(1)
            if torn.any():
                raise Divergent(f"warp {int(torn.argmax())}: {what} in some of its threads only")

    def barrier(self, mask: Mask | None) -> None:
        if mask is not None:
            rows = mask.reshape(-1, self.threads)
            torn = rows.any(1) != rows.all(1)
            if torn.any():
                raise Divergent(f"program {self.first_program + int(torn.argmax())}: a barrier that some threads skip")
        self.epoch = self.epoch + (1 if mask is None else mask)
        self.counts.barriers += (self.lanes if mask is None else int(mask.sum())) // self.threads


# ---- instructions ----------------------------------------------------------------------------------------------------


def _translate(instruction: Instruction, kernel: Kernel) -> Step:
    opcode = instruction.opcode
    name, *modifiers = opcode.split(".")
    if name in ("bra", "ret"):
        if name == "bra":
            kernel.labels[str(instruction.operands[0])]
        return _nothing
    if name == "mov":
        return _guard(instruction, _mov(instruction, modifiers[-1]))
    if name in ("ld", "st"):
        return _memory(instruction, name, modifiers)
    if name == "bar" and modifiers == ["sync"] and instruction.operands == ("0",):
        return lambda m: m.barrier(m.guarded(instruction))
    if opcode in ("bar.warp.sync",) or name in ("fence", "membar") or opcode.startswith("createpolicy"):
        return _policy(instruction) if name == "createpolicy" else _nothing
    if name == "trap":
        return _trap
    if special := warp.translate(instruction):
        return special
    return _guard(instruction, _elementwise(instruction))


def _nothing(machine: Machine) -> None:
    """An instruction without effect on threads that run in lockstep."""


def _trap(machine: Machine) -> None:
    raise Fault("trap")


def _policy(instruction: Instruction) -> Step:
    return lambda m: m.write(str(instruction.operands[0]), np.zeros(1, "u8"))


def _guard(instruction: Instruction, step: Step) -> Step:
    """Run a step in the threads whose guard is true."""
    if instruction.guard is None:
        return step

    def guarded(machine: Machine) -> None:
        machine.mask = machine.guarded(instruction)
        if machine.mask is None or machine.mask.any():
            step(machine)

    return guarded


def _elementwise(instruction: Instruction) -> Step:
    target, *sources = instruction.operands
    operation = resolve(instruction.opcode, len(sources))
    if len(sources) != len(operation.operands):
        raise Unsupported(f"{len(sources)} operands")
    name = str(target)
    width = register_size(name)
    typed = [(source, kind, size_of(kind)) for source, kind in zip(sources, operation.operands, strict=True)]
    result, compute = operation.result, operation.compute
    select, packed = instruction.opcode.startswith("selp"), result.endswith("x2")
    lazy = {"and.pred": False, "or.pred": True}.get(instruction.opcode)
    whole_division = instruction.opcode.split(".")[0] in ("div", "rem") and operation.result[0] in "us"

    def step(machine: Machine) -> None:
        values = [decode(kind, machine.read(source, size)) for source, kind, size in typed]
        if whole_division and machine.any(values[1] == 0):
            raise Fault("an integer is divided by zero")
        poison = machine.taint(*sources) if machine.poison else None
        if poison is not None and select:
            poison = _chosen_poison(machine, sources, values[2])
        elif poison is not None and lazy is not None:
            # one defined side can decide the result
            clean = [(_poison_of(machine, s) == 0) & (v == lazy) for s, v in zip(sources, values, strict=True)]
            poison = np.where(clean[0] | clean[1], np.uint8(0), poison)
        elif poison is not None and not packed:
            poison = np.where(poison, np.uint8(3), np.uint8(0))
        machine.write(name, encode(result, compute(*values), width), poison)

    return step


def _poison_of(machine: Machine, operand: Operand) -> Poison:
    found = machine.taint(operand)
    return np.zeros(machine.lanes, "u1") if found is None else found


def _chosen_poison(machine: Machine, sources: list[Operand], predicate: Raw) -> Poison:
    first, second, chooser = (_poison_of(machine, source) for source in sources)
    return np.where(predicate, first, second) | chooser


def _mov(instruction: Instruction, kind: str) -> Step:
    target, source = instruction.operands
    if isinstance(target, Address) or isinstance(source, Address):
        raise Unsupported("mov of an address")
    size = size_of(kind)
    if isinstance(target, tuple):  # unpack
        each = size // len(target)

        def unpack(machine: Machine) -> None:
            whole = np.ascontiguousarray(np.broadcast_to(machine.read(source, size), (machine.lanes,)))
            parts = whole.view(f"u{each}").reshape(machine.lanes, -1)
            poison = machine.taint(source)
            for i, name in enumerate(target):
                part = poison
                if poison is not None and len(target) == 2:
                    part = np.where(poison & np.uint8(1 << i), np.uint8(3), np.uint8(0))
                machine.write(name, np.ascontiguousarray(parts[:, i]), part)

        return unpack
    if isinstance(source, tuple):  # pack
        each = size // len(source)

        def pack(machine: Machine) -> None:
            parts = [np.broadcast_to(machine.read(part, each), (machine.lanes,)) for part in source]
            whole = np.ascontiguousarray(np.stack(parts, -1)).view(f"u{size}")[:, 0]
            poison = machine.taint(source)
            if poison is not None and len(source) == 2:
                low, high = (_poison_of(machine, part) for part in source)
                poison = (low & np.uint8(1)) | (high & np.uint8(2))
            machine.write(str(target), whole, poison)

        return pack

    def move(machine: Machine) -> None:
        machine.write(str(target), machine.read(source, size), machine.taint(source))

    return move


def _memory(instruction: Instruction, name: str, modifiers: list[str]) -> Step:
    space, kind = modifiers[0], modifiers[-1]
    if space == "volatile":
        space = modifiers[1]
    size = size_of(kind)
    operands = instruction.operands
    if name == "ld" and space == "param":
        return _load_param(instruction, kind)
    if space not in ("global", "shared") or any(m.startswith("cluster") for m in modifiers):
        raise Unsupported(f"instruction {instruction.opcode}")
    address, data = (operands[1], operands[0]) if name == "ld" else (operands[0], operands[1])
    names = data if isinstance(data, tuple) else (str(data),)

    def load(machine: Machine) -> None:
        mask = machine.guarded(instruction)
        places, who = machine.addresses(address, mask), machine.who(mask)
        if space == "global":
            machine.counts.read = machine.count_traffic(machine.counts.read, places, mask, size * len(names))
            values = machine.memory.load(places, size, len(names), who)
        else:
            machine.counts.shared_bytes += size * len(names) * places.size
            places = machine.shared.place(places, size * len(names), who, "read", machine.first_program)
            values = machine.shared.load(places, size, len(names), who)
        machine.mask = mask
        for register, value in zip(names, values, strict=True):
            raw = encode(kind, decode(kind, value), register_size(register))
            if mask is not None:
                spread = np.zeros(machine.lanes, raw.dtype)
                spread[mask] = raw
                raw = spread
            machine.write(register, raw)

    def store(machine: Machine) -> None:
        mask = machine.guarded(instruction)
        places, who = machine.addresses(address, mask), machine.who(mask)
        values = []
        for register in names:
            machine.demand(register, mask, "a stored value")
            whole = np.broadcast_to(machine.read(register, size), (machine.lanes,))
            values.append((whole if mask is None else whole[mask]).astype(f"u{size}"))
        if space == "global":
            machine.counts.written = machine.count_traffic(machine.counts.written, places, mask, size * len(names))
            machine.memory.store(places, size, values, who)
        else:
            machine.counts.shared_bytes += size * len(names) * places.size
            places = machine.shared.place(places, size * len(names), who, "write", machine.first_program)
            machine.shared.store(places, size, values, who)

    return load if name == "ld" else store


def _load_param(instruction: Instruction, kind: str) -> Step:
    target, source = instruction.operands
    if not isinstance(source, Address) or source.offset:
        raise Unsupported("a parameter that is not read whole")
    name, width = str(target), register_size(str(target))

    def step(machine: Machine) -> None:
        if source.base in machine.params:
            value = decode(kind, machine.params[source.base])
        else:  # one of several, chosen by each thread
            machine.demand(source.base, machine.mask, "an address")
            number, params = machine.read(source.base, 8), list(machine.params.values())
            value = np.zeros(machine.lanes, f"u{size_of(kind)}")
            for at in np.unique(number if machine.mask is None else number[machine.mask]):
                if at >= len(params):
                    raise OutOfBounds("a read of no parameter")
                value[number == at] = decode(f"b{8 * size_of(kind)}", params[at])
            value = decode(kind, value)
        machine.write(name, encode(kind, value, width))

    return _guard(instruction, step)
