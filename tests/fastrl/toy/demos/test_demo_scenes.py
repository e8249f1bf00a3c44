"""Held-out scenes of a demo: distributed like the recipe's, but different."""

from __future__ import annotations

import pytest

from fastrl.data import load_data
from fastrl.recipe import load_recipe
from fastrl.toy.demos.scenes import HELD_OUT_SEED, scenes_like


@pytest.mark.parametrize(
    "name", ["perception-r1-grounding-tiny", "perception-r1-counting-tiny", "perpo-grounding-tiny"]
)
def test_held_out_scenes_are_of_the_recipes_kind_and_another_seed(name: str) -> None:
    spec = load_recipe(name).data.spec
    trained, held_out = load_data(spec), load_data(scenes_like(spec, n=5))
    assert len(held_out) == 5
    assert held_out[0].task == trained[0].task
    assert held_out[0].images[0].size == trained[0].images[0].size  # type: ignore[union-attr]
    assert f"-{HELD_OUT_SEED}-" in held_out[0].id  # a scene depends on its id only
    assert f"-{HELD_OUT_SEED}-" not in trained[0].id


def test_only_what_is_asked_for_changes() -> None:
    assert scenes_like("scenes:ocr?difficulty=3&seed=1&size=84", n=7, seed=2) == (
        "scenes:ocr?difficulty=3&seed=2&size=84&n=7"
    )
