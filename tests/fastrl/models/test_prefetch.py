"""Images of the coming step are preprocessed in threads; only the time changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastrl.data.records import Dataset
from fastrl.data.stream import RecordStream
from fastrl.models.families.qwen2_vl import QwenPreprocessor, load_image_processor
from fastrl.trainer import TrainingError, train
from tests.helpers.training import make_recipe, make_records, steady_rows


@pytest.fixture
def preprocessor(tiny_folder: Callable[[str], Path]) -> QwenPreprocessor:
    return QwenPreprocessor(load_image_processor(tiny_folder("qwen2_5")))


def test_the_same_pixels_from_threads_in_any_order(
    preprocessor: QwenPreprocessor, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    pictures: list[Any] = [Image.new("RGB", (60 + i, 70), (i, 2 * i, 9)) for i in range(6)]
    pictures[0].save(tmp_path / "a.png")
    pictures.append(tmp_path / "a.png")
    plain = QwenPreprocessor(load_image_processor(tiny_folder("qwen2_5")))
    threads: set[str] = set()
    real = preprocessor._preprocess

    def noted(image: Any, among: int) -> Any:
        threads.add(threading.current_thread().name)
        return real(image, among)

    preprocessor._preprocess = noted  # type: ignore[method-assign]
    preprocessor.prefetch(pictures, 2)
    preprocessor.prefetch(pictures[:3], 2)  # already started
    for picture in reversed(pictures):
        (ours, size), (theirs, expected) = preprocessor(picture), plain(picture)
        assert torch.equal(ours.pixel_values, theirs.pixel_values)
        assert (ours.key, ours.shape, size) == (theirs.key, theirs.shape, expected)
    assert all(name.startswith("images") for name in threads)
    preprocessor.close()


def test_a_bad_picture_is_reported_when_it_is_asked_for(preprocessor: QwenPreprocessor, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    preprocessor.prefetch([tmp_path / "bad.png", tmp_path / "none.png"], 1)
    for name in ("bad.png", "none.png"):
        with pytest.raises(OSError, match=name):
            preprocessor(tmp_path / name)
    preprocessor.close()


def test_what_is_looked_at_is_taken_and_made_once() -> None:
    made: list[int] = []

    class Counted(list):
        def __getitem__(self, index: Any) -> Any:
            made.append(index)
            return super().__getitem__(index)

    records = Counted(make_records(5))
    stream, plain = RecordStream(records, seed=3), RecordStream(make_records(5), seed=3)
    seen = []
    for _ in range(4):  # across epochs
        coming = stream.peek(2)
        taken = stream.take(2)
        assert all(a is b for a, b in zip(coming, taken, strict=True))
        seen += [record.id for record in taken]
    assert seen == [record.id for _ in range(4) for record in plain.take(2)]
    assert len(made) == 8
    assert (stream.consumed, stream.epoch, stream.position) == (plain.consumed, plain.epoch, plain.position)


def test_a_run_with_workers_is_the_run_without(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    rows = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        recipe = make_recipe(tiny_folder("qwen2_5"), out, data__workers=workers, optim__steps=2)
        train(recipe, records=make_records(), show=False)
        rows.append(steady_rows(out))
    assert rows[0] == rows[1]


def test_a_bad_image_of_a_coming_step_stops_that_step_and_names_its_record(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    records = make_records(4)
    records[2] = replace(records[2], images=(tmp_path / "gone.png",))
    recipe = make_recipe(
        tiny_folder("qwen2_5"), tmp_path / "run", data__prompts_per_step=2, data__order="file", optim__steps=2
    )
    with pytest.raises(TrainingError, match=r"record 'r2'.*gone\.png"):
        train(recipe, records=Dataset(records), show=False)  # as if it was there when the data was read
    assert [row["step"] for row in steady_rows(tmp_path / "run")] == [1]
