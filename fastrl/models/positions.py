"""Multimodal RoPE positions of a prompt, computed once and carried with it.

Qwen2-VL's scheme (arXiv:2409.12191 §2.1): text advances all three axes together. An image's tokens have the same time
position and spread over height and width; the text after it starts after the larger side. Positions never depend on
state of the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def image_tokens(grid: Sequence[int], merge: int) -> int:
    """Number of tokens of an image of ``grid`` (t, h, w) patches, ``merge`` x ``merge`` patches to a token."""
    t, h, w = grid
    return t * (h // merge) * (w // merge)


def mrope_positions(
    length: int, slots: Sequence[tuple[int, int]], grids: Sequence[Sequence[int]], merge: int, start: int = 0
) -> Tensor:
    """Positions [3, length] int64 (time, height, width) of a token row with images.

    Args:
        length: number of tokens.
        slots: (start, length) of each image's run of placeholder tokens, in order and not overlapping.
        grids: (t, h, w) of each image, in patches.
        merge: patches per token along one side (``spatial_merge_size``).
        start: position of the first token.

    Raises:
        ValueError: a slot overlaps another, exceeds the row, or does not have its grid's number of tokens.
    """
    if len(slots) != len(grids):
        raise ValueError(f"slots: {len(slots)} runs of image tokens for {len(grids)} images")
    positions = torch.empty(3, length, dtype=torch.int64)
    at, position = 0, start
    for (slot, run), grid in zip(slots, grids, strict=True):
        if slot < at or slot + run > length or run != image_tokens(grid, merge):
            raise ValueError(
                f"slots: image run at {slot} of {run} tokens does not fit a row of {length} tokens (free from {at}) "
                f"and an image of {image_tokens(grid, merge)} tokens"
            )
        positions[:, at:slot] = torch.arange(position, position + slot - at)
        position += slot - at
        t, h, w = grid[0], grid[1] // merge, grid[2] // merge
        axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        positions[:, slot : slot + run] = torch.stack(axes).reshape(3, -1) + position
        position += max(h, w)
        at = slot + run
    positions[:, at:] = torch.arange(position, position + length - at)
    return positions
