"""Pixels on their way to the vision tower: rounded on the host, in one buffer."""

from __future__ import annotations

import pytest
import torch

from fastrl.batch import ImageInput
from fastrl.models.vision import joined_pixels, staged_pixels

PARTS = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) * 3 for n in (5, 1, 8)]
IMAGES = [ImageInput(part, (1, len(part), 1), str(n)) for n, part in enumerate(PARTS)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_staged_pixels_have_the_bits_of_pixels_cast_one_by_one(dtype: torch.dtype) -> None:
    want = torch.cat([part.to(dtype) for part in PARTS])
    staged = staged_pixels(PARTS, dtype, pinned=False)
    assert staged.is_contiguous()
    assert staged.untyped_storage().nbytes() == 14 * 6 * dtype.itemsize  # what crosses to the GPU: nothing in float32
    assert torch.equal(staged, want)
    assert torch.equal(joined_pixels(IMAGES, torch.device("cpu"), dtype), want)


def test_pixels_of_a_cpu_are_not_those_of_the_cache() -> None:
    joined_pixels(IMAGES[:1], torch.device("cpu"), torch.float32).zero_()
    assert PARTS[0].abs().sum() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_pixels_cross_once_and_without_waiting(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    want = torch.cat([part.to(dtype) for part in PARTS])
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = joined_pixels(IMAGES, device, dtype)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.cpu(), want)
