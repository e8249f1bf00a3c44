"""Faults that the interpreter reports. Each names the source line, the instruction, the program and the thread."""

from __future__ import annotations


class Fault(Exception):
    """An action that no correct program takes."""


class OutOfBounds(Fault):
    """An access outside every buffer of the launch, or to bytes that are not the tensor's."""


class Misaligned(Fault):
    """An address that is not a multiple of the access's width."""


class Race(Fault):
    """Two warps access the same memory without a barrier between them."""


class Uninitialised(Fault):
    """A value that was never written decides what is stored, where, or which branch is taken."""


class Divergent(Fault):
    """Threads diverge where they must stay together: at a barrier, in a shuffle, in a matrix product."""


class Unsupported(Exception):
    """An instruction or argument that is not supported: no statement about the program is made."""
