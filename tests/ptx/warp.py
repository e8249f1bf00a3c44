"""Instructions in which the threads of a warp work together: shuffles, reductions, matrix products, async copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.ptx.faults import Unsupported
from tests.ptx.memory import Index
from tests.ptx.parser import Instruction
from tests.ptx.values import Raw, decode

if TYPE_CHECKING:
    from tests.ptx.machine import Machine, Mask, Poison

Step = Callable[["Machine"], None]
_LANE = np.arange(32)


def translate(instruction: Instruction) -> Step | None:
    """The step of a warp-wide instruction; None if it is none.

    Raises:
        Unsupported: a form that is not interpreted (``wgmma``, ``tcgen05``, ``mbarrier`` among them).
    """
    name, *modifiers = instruction.opcode.split(".")
    if name == "shfl":
        return _shuffle(instruction, modifiers)
    if name == "redux":
        return _reduce(instruction, modifiers)
    if name == "vote":
        return _vote(instruction, modifiers)
    if name == "mma":
        return _multiply(instruction, modifiers)
    if name in ("ldmatrix", "stmatrix"):
        return _matrix(instruction, name, modifiers)
    if name == "cp":
        return _copy(instruction, modifiers)
    if name in ("wgmma", "tcgen05", "mbarrier", "setmaxnreg", "elect"):
        raise Unsupported(f"{name} is not interpreted; compile for sm_80")
    return None


def _rows(machine: Machine, raw: Raw) -> Raw:
    return np.ascontiguousarray(np.broadcast_to(raw, (machine.lanes,))).reshape(-1, 32)


def _full(machine: Machine, operand: Any, mask: Mask | None) -> None:
    """The member mask must name all threads of the warp: nothing else occurs in Triton's code."""
    partial = machine.read(operand, 4) != 0xFFFFFFFF
    if (partial if mask is None else partial & mask).any():
        raise Unsupported("a member mask other than the whole warp")


def _shuffle(instruction: Instruction, modifiers: list[str]) -> Step:
    mode = modifiers[1]
    target, source, amount, clamp, member = instruction.operands
    if mode not in ("bfly", "idx", "up", "down") or "|" in str(target):
        raise Unsupported(f"instruction {instruction.opcode}")

    def step(machine: Machine) -> None:
        mask = machine.guarded(instruction)
        machine.whole_warps(mask, "a shuffle")
        _full(machine, member, mask)
        for operand in (amount, clamp):
            machine.demand(operand, mask, "a shuffle's lane")
        b = _rows(machine, machine.read(amount, 4)).astype("i8") & 31
        c = _rows(machine, machine.read(clamp, 4)).astype("i8")
        bound, segment = c & 31, (c >> 8) & 31
        highest = (_LANE & segment) | (bound & ~segment)
        lowest = _LANE & segment
        if mode == "bfly":
            lane = _LANE ^ b
            inside = lane <= highest
        elif mode == "idx":
            lane = lowest | (b & ~segment)
            inside = lane <= highest
        elif mode == "up":
            lane = _LANE - b
            inside = lane >= highest
        else:
            lane = _LANE + b
            inside = lane <= highest
        lane = np.where(inside, lane, _LANE)
        raw = _rows(machine, machine.read(source, 4))
        poison = machine.taint(source)
        if poison is not None:
            poison = np.take_along_axis(poison.reshape(-1, 32), lane, 1).ravel()
        machine.mask = mask
        machine.write(str(target), np.take_along_axis(raw, lane, 1).ravel(), poison)

    return step


_REDUCTIONS: dict[str, Any] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _reduce(instruction: Instruction, modifiers: list[str]) -> Step:
    _, mode, kind = modifiers
    target, source, member = instruction.operands
    combine = _REDUCTIONS[mode]

    def step(machine: Machine) -> None:
        mask = machine.guarded(instruction)
        machine.whole_warps(mask, "a reduction")
        _full(machine, member, mask)
        values = _rows(machine, decode(kind, machine.read(source, 4)))
        result = combine.reduce(values, axis=1, dtype=values.dtype)
        machine.mask = mask
        machine.write(str(target), np.repeat(result.view("u4"), 32), _of_warp(machine.taint(source)))

    return step


def _of_warp(poison: Poison | None) -> Poison | None:
    """One poisoned thread poisons what its warp makes together."""
    return None if poison is None else np.repeat(poison.reshape(-1, 32).any(1) * np.uint8(3), 32)


def _vote(instruction: Instruction, modifiers: list[str]) -> Step:
    target, source, member = instruction.operands
    mode = modifiers[1]
    if mode not in ("ballot", "any", "all"):
        raise Unsupported(f"instruction {instruction.opcode}")

    def step(machine: Machine) -> None:
        mask = machine.guarded(instruction)
        machine.whole_warps(mask, "a vote")
        _full(machine, member, mask)
        yes = _rows(machine, machine.read(source, 0))
        if mode == "ballot":
            result = (yes.astype("u8") << _LANE.astype("u8")).sum(1).astype("u4")
        else:
            result = yes.any(1) if mode == "any" else yes.all(1)
        machine.mask = mask
        machine.write(str(target), np.repeat(result, 32), _of_warp(machine.taint(source)))

    return step


# ---- matrix products -------------------------------------------------------------------------------------------------


def _multiply(instruction: Instruction, modifiers: list[str]) -> Step:
    """``mma.sync.aligned.m16n8kK.row.col.f32.A.B.f32``: the products in float64, added and rounded once to float32.

    A tensor core rounds (and truncates) more often; its own error is what the GPU tests are for.
    """
    shape, kinds = modifiers[2], tuple(modifiers[5:])
    depth = {"m16n8k16": 16, "m16n8k8": 8}.get(shape, 0)
    kind = kinds[1] if len(kinds) == 4 else ""
    fits = (kind in ("f16", "bf16") and depth) or (kind == "tf32" and depth == 8)
    if not fits or kinds != ("f32", kind, kind, "f32") or modifiers[:2] != ["sync", "aligned"]:
        raise Unsupported(f"instruction {instruction.opcode}")
    vectors = [operand for operand in instruction.operands if isinstance(operand, tuple)]
    if len(vectors) != 4:
        raise Unsupported("operands that are no vectors")
    targets, *sources = vectors
    group, pair = _LANE // 4, _LANE % 4

    def step(machine: Machine) -> None:
        mask = machine.guarded(instruction)
        machine.whole_warps(mask, "a matrix product")
        a, b, c = ([_rows(machine, machine.read(name, 4)) for name in names] for names in sources)
        left = np.zeros((a[0].shape[0], 16, depth))
        right = np.zeros((a[0].shape[0], depth, 8))
        if kind == "tf32":
            for i, raw in enumerate(a):
                left[:, group + 8 * (i % 2), pair + 4 * (i // 2)] = _tf32(raw)
            for i, raw in enumerate(b):
                right[:, pair + 4 * i, group] = _tf32(raw)
        else:
            for i, raw in enumerate(a):
                for half, value in enumerate(np.moveaxis(decode(f"{kind}x2", raw), -1, 0)):
                    left[:, group + 8 * (i % 2), 2 * pair + half + 8 * (i // 2)] = value
            for i, raw in enumerate(b):
                for half, value in enumerate(np.moveaxis(decode(f"{kind}x2", raw), -1, 0)):
                    right[:, 2 * pair + half + 8 * i, group] = value
        out = left @ right
        poison = _of_warp(machine.taint(*sources)) if machine.poison else None
        machine.mask = mask
        for i, name in enumerate(targets):
            row, column = group + 8 * (i // 2), 2 * pair + i % 2
            total = out[:, row, column] + c[i].view("f4")
            machine.write(name, total.astype("f4").view("u4").ravel(), poison)

    return step


def _tf32(raw: Raw) -> Raw:
    """The low 13 bits are ignored."""
    return (raw & np.uint32(0xFFFFE000)).view("f4")


def _matrix(instruction: Instruction, name: str, modifiers: list[str]) -> Step:
    """``ldmatrix`` / ``stmatrix``: 8x8 matrices of 16 bits; lanes 8i to 8i + 7 hold the row addresses of matrix i."""
    count = next((int(m[1:]) for m in modifiers if m in ("x1", "x2", "x4")), 0)
    if modifiers[:3] != ["sync", "aligned", "m8n8"] or modifiers[-2:] != ["shared", "b16"] or not count:
        raise Unsupported(f"instruction {instruction.opcode}")
    transposed = "trans" in modifiers
    data, address = instruction.operands if name == "ldmatrix" else instruction.operands[::-1]
    names = data if isinstance(data, tuple) else (str(data),)
    if len(names) != count:
        raise Unsupported(f"{len(names)} registers for {count} matrices")

    def step(machine: Machine) -> None:
        mask = machine.guarded(instruction)
        machine.whole_warps(mask, "a matrix access")
        givers = np.tile(8 * count > _LANE, machine.lanes // 32)
        givers = givers if mask is None else givers & mask
        if not givers.any():
            return
        who = machine.who(givers)
        places = machine.shared.place(machine.addresses(address, givers), 16, who, "matrix row", machine.first_program)
        machine.counts.shared_bytes += 16 * places.size
        warps = slice(None) if mask is None else mask.reshape(-1, 32).all(1)
        machine.mask = mask
        if name == "ldmatrix":
            words = np.stack(machine.shared.load(places, 2, 8, who), -1).reshape(-1, count, 8, 8)
            words = words.swapaxes(2, 3) if transposed else words
            for i, register in enumerate(names):
                mine = np.zeros((machine.lanes // 32, 32), "u4")
                mine[warps] = np.ascontiguousarray(words[:, i]).view("u4").reshape(-1, 32)
                machine.write(register, mine.ravel())
        else:
            rows = []
            for register in names:
                machine.demand(register, mask, "a stored value")
                halves = np.ascontiguousarray(_rows(machine, machine.read(register, 4))[warps]).view("u2")
                halves = halves.reshape(-1, 8, 8)
                rows.append(halves.swapaxes(1, 2) if transposed else halves)
            whole = np.stack(rows, 1).reshape(-1, 8)
            machine.shared.store(places, 2, list(whole.T), who)

    return step


# ---- asynchronous copies ---------------------------------------------------------------------------------------------


class _Flight(NamedTuple):
    """One cp.async: its thread, its destination, its data, and the group that it will be committed to."""

    lanes: Index
    places: Index
    data: NDArray[np.uint8]
    group: Index


class Copies:
    """The cp.async of all threads that have not been waited for."""

    def __init__(self, lanes: int) -> None:
        self.committed = np.zeros(lanes, "i4")  # groups of each thread
        self.flying: list[_Flight] = []


def _copy(instruction: Instruction, modifiers: list[str]) -> Step:
    if modifiers[0] != "async" or "bulk" in modifiers or "mbarrier" in modifiers:
        raise Unsupported(f"instruction {instruction.opcode}")
    if modifiers[1] == "commit_group":
        return _commit
    if modifiers[1] in ("wait_group", "wait_all"):
        left = int(str(instruction.operands[0]), 0) if modifiers[1] == "wait_group" else None
        return lambda machine: _wait(machine, left)
    target, source, *sizes = instruction.operands
    whole = int(str(sizes[0]), 0)

    def start(machine: Machine) -> None:
        mask = machine.guarded(instruction)
        lanes = np.arange(machine.lanes) if mask is None else mask.nonzero()[0]
        who = machine.who(mask)
        wanted = np.full(lanes.size, whole)
        if len(sizes) > 1:
            machine.demand(sizes[1], mask, "a copy's size")
            wanted = np.broadcast_to(machine.read(sizes[1], 4), (machine.lanes,))[lanes]
        if ((wanted != whole) & (wanted != 0)).any():
            raise Unsupported("a cp.async of part of its bytes")
        places = machine.addresses(target, mask)
        places = machine.shared.place(places, whole, who, "asynchronous write", machine.first_program)
        machine.shared.launch(places, whole, who)
        machine.counts.shared_bytes += whole * places.size
        data = np.zeros((lanes.size, whole), "u1")  # a copy of size 0 writes zeros
        reading = np.zeros(machine.lanes, bool)
        reading[lanes] = wanted != 0
        if reading.any():
            froms = machine.addresses(source, reading)
            machine.counts.read = machine.count_traffic(machine.counts.read, froms, reading, whole)
            words = np.stack(machine.memory.load(froms, 4, whole // 4, machine.who(reading)), -1)
            data[wanted != 0] = np.ascontiguousarray(words).view("u1").reshape(-1, whole)
        machine.copies.flying.append(_Flight(lanes, places, data, machine.copies.committed[lanes]))

    return start


def _commit(machine: Machine) -> None:
    machine.copies.committed = machine.copies.committed + (1 if machine.mask is None else machine.mask)


def _wait(machine: Machine, left: int | None) -> None:
    """Complete the copies of the waiting threads, except their last ``left`` groups (None: all)."""
    copies, still = machine.copies, []
    for flight in copies.flying:
        done = np.ones(flight.lanes.size, bool) if machine.mask is None else machine.mask[flight.lanes]
        if left is not None:
            done = done & (flight.group < copies.committed[flight.lanes] - left)
        if done.any():
            machine.shared.land(flight.places[done], flight.data[done], machine.who(flight.lanes[done]))
        if not done.all():
            still.append(_Flight(*(part[~done] for part in flight)))
    copies.flying = still
