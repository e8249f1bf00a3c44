"""Global and shared memory: every access is checked for bounds, alignment, and a barrier between warps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.ptx.faults import Misaligned, OutOfBounds, Race, Uninitialised
from tests.ptx.values import UNSIGNED, Raw

_SEGMENT = 36  # a tensor's bytes start at a multiple of 2^36, so no overrun reaches another tensor
_NOBODY, _EVERYBODY = -1, -(1 << 30)

Index = NDArray[Any]


class Threads(NamedTuple):
    """The accessing threads: one entry per access."""

    warp: Index  # number within the launch
    program: Index
    thread: Index  # number within the program
    epoch: Index  # barriers the program has passed
    warps: int  # per program

    def name(self, at: int) -> str:
        return f"program {self.program[at]}, thread {self.thread[at]}"


class Buffer:
    """Bytes with a record of who wrote and read each ``grain`` of them last.

    Two accesses to the same grain, one of them a write, are in order if they come from one warp, or from one program
    with a barrier between. All else is a race (programs have no order among each other), but for warps of one program
    that store the same value: Triton's threads that hold copies of an element do.
    """

    def __init__(
        self, name: str, size: int, grain: int, *, lead: int = 0, allowed: NDArray[np.bool_] | None = None
    ) -> None:
        self.name, self.size, self.grain = name, size, grain
        self.lead = lead  # guard bytes in front
        self.data = np.zeros(-(-size // 16) * 16, "u1")
        self.allowed = allowed  # per byte; None: all
        grains = -(-self.data.size // grain)
        self.writer, self.reader = np.full(grains, _NOBODY, "i4"), np.full(grains, _NOBODY, "i4")
        self.written, self.read = np.zeros(grains, "i4"), np.zeros(grains, "i4")  # epochs

    def check(self, offset: Index, size: int, who: Threads, what: str) -> None:
        """Raise unless ``[offset, offset + size)`` is inside, aligned to ``size`` and the buffer's own."""
        torn = offset % size != 0
        if torn.any():
            at = int(torn.argmax())
            raise Misaligned(f"{who.name(at)}: {what} of {size} bytes at byte {offset[at] - self.lead} of {self.name}")
        outside = (offset < self.lead) | (offset + size > self.size)
        if self.allowed is not None and not outside.any():
            outside = ~self.allowed[offset[:, None] + np.arange(size)].all(1)
        if outside.any():
            at = int(outside.argmax())
            inside = self.lead <= offset[at] <= self.size - size
            raise OutOfBounds(
                f"{who.name(at)}: {what} of {size} bytes at byte {offset[at] - self.lead} of {self.name}, "
                + ("which are not its elements" if inside else f"which has {self.size - self.lead}")
            )

    def load(self, offset: Index, size: int, count: int, who: Threads) -> list[Raw]:
        """``count`` values of ``size`` bytes from each offset, which has been checked."""
        self._record_read(self._grains(offset, size * count), who)
        first = offset // size
        values = self.data.view(UNSIGNED[size])
        return [values[first + i] for i in range(count)]

    def store(self, offset: Index, size: int, values: Sequence[Raw], who: Threads) -> None:
        """``values`` of ``size`` bytes one after another at each offset, which has been checked."""
        first = offset // size
        memory = self.data.view(UNSIGNED[size])
        again = np.ones(offset.size, bool)  # nothing changes
        for i, value in enumerate(values):
            again &= memory[first + i] == value
        self._record_write(self._grains(offset, size * len(values)), who, again)
        for i, value in enumerate(values):
            memory[first + i] = value
            lost = memory[first + i] != value
            if lost.any():
                at = int(lost.argmax())
                raise Race(f"{who.name(at)}: two threads store different values at byte {offset[at]} of {self.name}")

    def touched(self) -> tuple[int, int]:
        """Different bytes read, and different bytes written."""
        read, written = (int((record != _NOBODY).sum()) * self.grain for record in (self.reader, self.writer))
        return read, written

    def _grains(self, offset: Index, size: int) -> Index:
        return (offset // self.grain)[:, None] + np.arange(max(size // self.grain, 1))

    def _record_read(self, grains: Index, who: Threads) -> None:
        warp, program, epoch = who.warp[:, None], who.program[:, None], who.epoch[:, None]
        self._meet(self.writer[grains], self.written[grains], warp, program, epoch, who, "reads what", "wrote")
        before, then = self.reader[grains], self.read[grains]
        owner = _program_of(before, who.warps)
        past = (owner == program) & (then != epoch)
        several = np.where(owner == program, -2 - program, _EVERYBODY)
        now = np.where((before == _NOBODY) | (before == warp) | past, warp, several).astype("i4")
        self.reader[grains], self.read[grains] = now, epoch
        shared = self.reader[grains] != now  # by another warp in this very instruction
        if shared.any():
            same = _program_of(self.reader[grains], who.warps) == program
            self.reader[grains[shared]] = np.where(same, -2 - program, _EVERYBODY)[shared]

    def _record_write(self, grains: Index, who: Threads, again: Index) -> None:
        """``again``: the accesses that store the value already there, which do not conflict with another write."""
        warp, program, epoch = who.warp[:, None], who.program[:, None], who.epoch[:, None]
        others = self.writer[grains]
        others = np.where(again[:, None] & (_program_of(others, who.warps) == program), _NOBODY, others)
        self._meet(others, self.written[grains], warp, program, epoch, who, "overwrites what", "wrote")
        self._meet(self.reader[grains], self.read[grains], warp, program, epoch, who, "overwrites what", "read")
        self.writer[grains], self.written[grains] = warp, epoch
        clash = (_program_of(self.writer[grains], who.warps) != program).any(1)
        if clash.any():
            raise Race(f"{who.name(int(clash.argmax()))}: two programs store to the same place of {self.name}")

    def _meet(
        self, other: Index, then: Index, warp: Index, program: Index, epoch: Index, who: Threads, verb: str, did: str
    ) -> None:
        apart = (other != _NOBODY) & (other != warp)
        if apart.any():
            owner = _program_of(other, who.warps)
            bad = apart & ((owner != program) | (then == epoch))
            if bad.any():
                at, grain = (int(x) for x in np.unravel_index(int(bad.argmax()), bad.shape))
                rival = int(owner[at, grain])
                names = "other warps" if other[at, grain] < 0 else f"warp {other[at, grain] % who.warps}"
                if rival != who.program[at]:
                    names = "other programs" if rival < 0 else f"program {rival}"
                raise Race(f"{who.name(at)}: {verb} {names} {did} in {self.name} without a barrier between")


def _program_of(code: Index, warps: int) -> Index:
    """Of a warp's number, or of -2 - program (several warps of it); negative: nobody, or several programs."""
    return np.where(code >= 0, code // warps, np.where(code > _EVERYBODY, -2 - code, -1))


class Shared(Buffer):
    """The shared memory of several programs side by side; what was never written cannot be read."""

    def __init__(self, size: int, programs: int, grain: int) -> None:
        self.stride = -(-size // 16) * 16
        super().__init__("shared memory", self.stride * programs, grain)
        self.own = size
        self.in_flight = np.zeros(self.writer.size, bool)  # by cp.async, not yet waited for

    def place(self, offset: Index, size: int, who: Threads, what: str, first_program: int) -> Index:
        """Offsets within a program's part, checked, to offsets within all."""
        outside = (offset < 0) | (offset + size > self.own)
        if outside.any():
            at = int(outside.argmax())
            raise OutOfBounds(
                f"{who.name(at)}: {what} of {size} bytes at byte {offset[at]} of shared memory, which has {self.own}"
            )
        offset = offset + (who.program - first_program) * self.stride
        self.check(offset, size, who, what)
        return offset

    def launch(self, offset: Index, size: int, who: Threads) -> None:
        """Start a cp.async to these bytes: until it has been waited for, no thread may access them."""
        grains = self._grains(offset, size)
        self._record_write(grains, who, np.zeros(offset.size, bool))
        self.in_flight[grains] = True

    def land(self, offset: Index, data: NDArray[np.uint8], who: Threads) -> None:
        """A cp.async has been waited for."""
        grains = self._grains(offset, data.shape[1])
        self.in_flight[grains] = False
        self._record_write(grains, who, np.zeros(offset.size, bool))
        self.data[offset[:, None] + np.arange(data.shape[1])] = data

    def _record_read(self, grains: Index, who: Threads) -> None:
        self._settled(grains, who, "reads")
        never = (self.writer[grains] == _NOBODY).any(1)
        if never.any():
            raise Uninitialised(f"{who.name(int(never.argmax()))}: reads shared memory that was never written")
        super()._record_read(grains, who)

    def _record_write(self, grains: Index, who: Threads, again: Index) -> None:
        self._settled(grains, who, "overwrites")
        super()._record_write(grains, who, again)

    def _settled(self, grains: Index, who: Threads, verb: str) -> None:
        flying = self.in_flight[grains].any(1)
        if flying.any():
            raise Race(f"{who.name(int(flying.argmax()))}: {verb} what a cp.async has not been waited for")


class Segment(Buffer):
    """The storage behind one or more tensor arguments. Only elements of those tensors may be touched."""

    def __init__(self, tensors: dict[str, Tensor], number: int) -> None:
        some = next(iter(tensors.values()))
        storage = some.untyped_storage()
        lead = storage.data_ptr() % 256  # so that an address is as aligned as the tensor is
        size = lead + storage.nbytes()
        allowed = np.zeros(size, bool)
        for tensor in tensors.values():
            _mark(allowed, lead, tensor)
        grain = min(tensor.element_size() for tensor in tensors.values())
        super().__init__("/".join(tensors), size, grain, lead=lead, allowed=allowed)
        self.base = (number + 1) << _SEGMENT
        self.host = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        self.data[lead:size] = self.host

    def address(self, tensor: Tensor) -> int:
        return self.base + self.lead + tensor.data_ptr() - tensor.untyped_storage().data_ptr()

    def write_back(self) -> None:
        """The bytes that were stored, to the tensors."""
        touched = np.repeat(self.writer != _NOBODY, self.grain)[self.lead : self.size]
        np.copyto(self.host, self.data[self.lead : self.size], where=touched)


def _mark(allowed: NDArray[np.bool_], lead: int, tensor: Tensor) -> None:
    """Set the bytes of a strided tensor's elements."""
    if tensor.numel() == 0:
        return
    width = tensor.element_size()
    start = lead + tensor.storage_offset() * width
    strides = [stride * width for stride in tensor.stride()]
    view = np.lib.stride_tricks.as_strided(allowed[start:], (*tensor.shape, width), (*strides, 1))
    view[...] = True


class Global:
    """The tensors of a launch, each storage in its own address range."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        by_storage: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), {})[name] = tensor
        self.segments = [Segment(group, number) for number, group in enumerate(by_storage.values())]
        self._of = dict(zip(by_storage, self.segments, strict=True))

    def address(self, tensor: Tensor) -> int:
        return self._of[tensor.untyped_storage().data_ptr()].address(tensor)

    def load(self, address: Index, size: int, count: int, who: Threads) -> list[Raw]:
        out = [np.zeros(address.size, UNSIGNED[size]) for _ in range(count)]
        for segment, chosen in self._split(address, who, "read"):
            part = _part(who, chosen)
            offset = address[chosen] - segment.base
            segment.check(offset, size * count, part, "read")
            for target, value in zip(out, segment.load(offset, size, count, part), strict=True):
                target[chosen] = value
        return out

    def store(self, address: Index, size: int, values: Sequence[Raw], who: Threads) -> None:
        for segment, chosen in self._split(address, who, "write"):
            part = _part(who, chosen)
            offset = address[chosen] - segment.base
            segment.check(offset, size * len(values), part, "write")
            segment.store(offset, size, [value[chosen] for value in values], part)

    def touched(self) -> tuple[int, int]:
        """Different bytes read, and different bytes written, of all tensors."""
        each = [segment.touched() for segment in self.segments]
        return sum(read for read, _ in each), sum(written for _, written in each)

    def write_back(self) -> None:
        for segment in self.segments:
            segment.write_back()

    def _split(self, address: Index, who: Threads, what: str) -> list[tuple[Segment, slice | NDArray[np.bool_]]]:
        """The segments of these addresses, each with the threads that access it."""
        number = ((address + (1 << _SEGMENT - 1)) >> _SEGMENT) - 1  # so that what lies just before belongs to it too
        if number.size == 0:
            return []
        first = int(number[0])
        if (number == first).all() and 0 <= first < len(self.segments):
            return [(self.segments[first], slice(None))]
        wild = (number < 0) | (number >= len(self.segments))
        if wild.any():
            at = int(wild.argmax())
            raise OutOfBounds(f"{who.name(at)}: {what} at {int(address[at]):#x}, which is no argument's")
        return [(self.segments[n], number == n) for n in np.unique(number)]


def _part(who: Threads, chosen: slice | NDArray[np.bool_]) -> Threads:
    return Threads(who.warp[chosen], who.program[chosen], who.thread[chosen], who.epoch[chosen], who.warps)
