"""Data sheets of GPUs: memory, bandwidth and dense bfloat16 rate."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

GIB = 2**30
HOST_BANDWIDTH = 100e9  # bytes/s of host memory on a server


@dataclass(frozen=True)
class Gpu:
    """One device: ``memory`` in bytes as reported by the driver, rates from the data sheet (dense, without sparsity).

    ``link``: bytes/s to the host in one direction.
    """

    name: str
    memory: float
    bandwidth: float  # bytes/s
    flops: float  # bfloat16 FLOP/s
    link: float = 25e9

    @property
    def reserve(self) -> float:
        """Bytes to leave free for the context, libraries and fragmentation of the caching allocator."""
        return reserve(self.memory)


def reserve(memory: float) -> float:
    """Bytes of a device's memory that are not planned with (see ``Gpu.reserve``)."""
    return 1.0 * GIB + 0.04 * memory


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("rtx3090", 24.0 * GIB, 936e9, 71e12),
        Gpu("rtx4090", 24.0 * GIB, 1008e9, 165e12),
        Gpu("rtx5090", 31.8 * GIB, 1792e9, 209e12, 50e9),
        Gpu("a10g", 22.5 * GIB, 600e9, 70e12),
        Gpu("l4", 22.5 * GIB, 300e9, 121e12),
        Gpu("l40s", 45.0 * GIB, 864e9, 362e12),
        Gpu("a100-40", 39.4 * GIB, 1555e9, 312e12),
        Gpu("a100-80", 79.3 * GIB, 2039e9, 312e12),
        Gpu("h100-80", 79.6 * GIB, 3350e9, 989e12, 50e9),
        Gpu("h200", 140.4 * GIB, 4800e9, 989e12, 50e9),
        Gpu("b200", 178.0 * GIB, 8000e9, 2250e12, 50e9),
    )
}


def gpu_named(name: str) -> Gpu:
    """A GPU by name. For an unknown one, raises ``ValueError`` with the nearest names."""
    found = GPUS.get(name.lower().replace("_", "-"))
    if found is not None:
        return found
    begun = [known for known in GPUS if name and known.startswith(name.lower())]  # h100 matches h100-80
    near = begun or difflib.get_close_matches(name.lower(), GPUS, n=3, cutoff=0.3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"unknown GPU {name!r}{hint} Known: {', '.join(GPUS)}")
