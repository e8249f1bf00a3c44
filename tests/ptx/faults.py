"""What the interpreter reports. Each says the source line, the instruction, the program and the thread."""

from __future__ import annotations


class Fault(Exception):
    """A program did what no correct program does."""


class OutOfBounds(Fault):
    """An access outside every buffer of the launch, or to bytes that are not the tensor's."""


class Misaligned(Fault):
    """An address that is not a multiple of the access's width."""


class Race(Fault):
    """Two warps meet in memory without a barrier between them."""


class Uninitialised(Fault):
    """Something never written decides what is stored, where, or which way the program goes."""


class Divergent(Fault):
    """Threads part where they have to stay together: at a barrier, in a shuffle, in a matrix product."""


class Unsupported(Exception):
    """An instruction or argument that is not interpreted: no statement about the program is made."""
