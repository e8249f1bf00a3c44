"""The order of records as a function of seed and epoch only, so that a data position is a number."""

from __future__ import annotations

import torch


def shuffled(n: int, seed: int, epoch: int = 0, *, buffer: int | None = None) -> list[int]:
    """The numbers below ``n``, shuffled.

    With ``buffer``, rows are shuffled within blocks of that many neighbours, and the blocks among each other, so that
    rows read together are close together in a large file.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    if buffer is None or buffer >= n:
        return torch.randperm(n, generator=generator).tolist()
    order: list[int] = []
    for block in torch.randperm(-(-n // buffer), generator=generator).tolist():
        first, size = block * buffer, min(buffer, n - block * buffer)
        order += (torch.randperm(size, generator=generator) + first).tolist()
    return order
