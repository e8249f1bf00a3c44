"""In which order records come: functions of a seed and an epoch's number alone, so that a position is a number."""

from __future__ import annotations

import torch


def shuffled(n: int, seed: int, epoch: int = 0, *, buffer: int | None = None) -> list[int]:
    """The numbers below ``n``, shuffled.

    With ``buffer`` rows are shuffled among that many neighbours and these blocks among each other: what is read at one
    time lies close together, as a large file wants it.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    if buffer is None or buffer >= n:
        return torch.randperm(n, generator=generator).tolist()
    order: list[int] = []
    for block in torch.randperm(-(-n // buffer), generator=generator).tolist():
        first, size = block * buffer, min(buffer, n - block * buffer)
        order += (torch.randperm(size, generator=generator) + first).tolist()
    return order
