"""Positions: equal to each model's own ``get_rope_index``, and errors on runs that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastrl.models import load_policy
from fastrl.models.positions import image_tokens, mrope_positions


@pytest.mark.parametrize("style", ["qwen2_5", "qwen2"])
@pytest.mark.parametrize(
    ("gaps", "grids"),
    [
        ([7], []),
        ([3, 5], [(1, 4, 8)]),
        ([0, 1, 2, 4], [(1, 6, 2), (1, 2, 2), (1, 2, 10)]),
        ([1, 0], [(3, 4, 6)]),
    ],
    ids=["text", "one", "three", "frames"],
)
def test_positions_equal_the_models_own(
    style: str, gaps: list[int], grids: list[tuple[int, int, int]], tiny_folder: Callable[[str], Path]
) -> None:
    policy = load_policy(tiny_folder(style), device="cpu")
    kinds, slots = [0] * gaps[0], []
    for grid, gap in zip(grids, gaps[1:], strict=True):
        slots.append((len(kinds), image_tokens(grid, 2)))
        kinds += [1] * slots[-1][1] + [0] * gap
    got = mrope_positions(len(kinds), slots, grids, merge=2)
    kinds_row = torch.tensor([kinds])
    want, deltas = policy.core.model.get_rope_index(
        kinds_row, kinds_row.int(), image_grid_thw=torch.tensor(grids).reshape(-1, 3) if grids else None
    )
    assert torch.equal(got, want[:, 0])
    assert int(got.max()) + 1 == len(kinds) + int(deltas[0])


def test_neighbouring_images_stay_apart() -> None:
    """transformers would merge two adjacent runs of placeholders into one; slots do not."""
    got = mrope_positions(8, [(0, 4), (4, 4)], [(1, 4, 4)] * 2, merge=2)
    assert got[:, 0].tolist() == [0, 0, 0]
    assert got[:, 4].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("slots", "grids"),
    [([(2, 3)], [(1, 4, 4)]), ([(8, 4)], [(1, 4, 4)]), ([(0, 4), (3, 4)], [(1, 4, 4)] * 2), ([], [(1, 4, 4)])],
)
def test_image_runs_that_do_not_fit_are_errors(slots: list, grids: list) -> None:
    with pytest.raises(ValueError, match="slots"):
        mrope_positions(10, slots, grids, merge=2)
