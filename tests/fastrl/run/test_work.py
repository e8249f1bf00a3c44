"""The work of a record before it is encoded, against the prompt that it becomes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fastrl.data.pictures import PictureError
from fastrl.data.records import Record, question
from fastrl.models import load_policy
from fastrl.run.work import Costs, RecordWork, costs_of
from tests.helpers.training import make_recipe


def picture(size: tuple[int, int], words: str = "Read it.") -> Record:
    messages = question("ocr", prompt=words)
    return Record(id="r", task="ocr", images=(Image.new("RGB", size),), messages=messages, target={"text": ""})


@pytest.fixture(scope="module")
def folder(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("qwen2_5")


def test_pictures_count_as_what_the_tower_sees(folder: Path) -> None:
    policy = load_policy(folder, device="cpu", max_pixels=1_000_000)
    rows = RecordWork(policy, Costs(token=0, patch=1))
    tokens = RecordWork(policy, Costs(token=1, patch=0))
    for size in ((448, 448), (1200, 300), (4000, 3000)):  # the last one is resized to the limit
        record = picture(size)
        (image,) = policy.encode(record)[0].images
        assert rows(record) == pytest.approx(policy.family.patches(image), rel=0.1)
        assert tokens(record) == pytest.approx(policy.family.tokens(image) + len("Read it.") / 4, rel=0.1)
    assert tokens(picture((56, 56), "x" * 400)) - tokens(picture((56, 56), "")) == 100


def test_a_picture_without_a_header_is_its_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    record = Record(id="r", task="ocr", images=(tmp_path / "a.png",), messages=question("ocr"), target={})
    with pytest.raises(PictureError, match=r"a\.png"):
        RecordWork(load_policy(folder, device="cpu"), Costs(1, 1))(record)


def test_costs_are_weights_times_passes(folder: Path, tmp_path: Path) -> None:
    """Rollout 1, reference 1, forward and backward 3; pictures are seen once if their tower is frozen."""
    policy = load_policy(folder, device="cpu", freeze=["vision", "projector"])
    parts = policy.family.parts(policy.core)
    language, vision = (sum(p.numel() for p in part.parameters()) for part in (parts.language, parts.vision))
    recipe = make_recipe(folder, tmp_path, method={"kind": "perception-r1", "beta": 0.1})
    assert costs_of(recipe, policy) == (5 * language, vision)
    recipe = make_recipe(folder, tmp_path, optim__updates_per_batch=2, model__gradient_checkpointing=True)
    assert costs_of(recipe, load_policy(folder, device="cpu")) == (9 * language, 9 * vision)
