"""Truncated pictures with a valid header: found with ``deep``, skipped when they are drawn, otherwise named in an
error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastrl.data import DataError, load_data
from fastrl.data.decodable_stream import DecodableStream
from fastrl.run.logs import read_rows
from fastrl.trainer import TrainingError, train
from tests.helpers.training import make_recipe, steady_rows

Folder = Callable[[str], Path]


def write_rows(folder: Path, broken: set[int], n: int = 6) -> str:
    """OCR rows of noise pictures, some truncated, and the spec that loads them."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        file = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (56, 56, 3), dtype=np.uint8)).save(file)
        if i in broken:
            file.write_bytes(file.read_bytes()[:600])
        rows.append({"id": f"r{i}", "image": file.name, "text": f"word {i}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"ocr:{folder / 'rows.jsonl'}"


def test_headers_alone_are_read_unless_deep(tmp_path: Path) -> None:
    spec = write_rows(tmp_path, {2, 5})
    assert len(load_data(spec)) == 6
    with pytest.raises(DataError, match=r"rows\.jsonl:3: image cannot be read: .*2\.png") as error:
        load_data(spec, deep=True)
    assert [problem.where[-1] for problem in error.value.problems] == ["3", "6"]
    data = load_data(spec, deep=True, skip_bad=True)
    assert [record.id for record in data] == ["r0", "r1", "r3", "r4"]
    assert data.reasons == {"broken picture": 2}


def test_frames_of_clips_are_decoded_too(tmp_path: Path) -> None:
    write_rows(tmp_path, {3})
    boxes = {"1": [1, 1, 9, 9], "2": [1, 1, 9, 9]}
    rows = [
        {"id": f"c{n}", "frames": [f"{n}.png", f"{n + 1}.png"], "subjects": [{"id": 1, "name": "x", "boxes": boxes}]}
        for n in (0, 2, 4)
    ]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = f"tracks:{tmp_path / 'clips.jsonl'}"
    assert len(load_data(spec)) == 3
    data = load_data(spec, deep=True, skip_bad=True)
    assert [record.id for record in data] == ["c0", "c4"]
    assert data.reasons == {"broken picture": 1}
    assert len(data[1:]) == 1


def test_the_stream_passes_over_them_in_order_and_goes_on_exactly(tmp_path: Path) -> None:
    records = load_data(write_rows(tmp_path, {0, 3}))
    stream = DecodableStream(records, order="file")
    assert [r.id for r in stream.peek(3)] == ["r1", "r2", "r4"]
    assert [r.id for r in stream.take(3)] == ["r1", "r2", "r4"]
    assert stream.broken == 2
    assert [p.where[-1] for p in stream.unreported] == ["1", "4"]
    state = stream.state()
    want = [r.id for r in stream.take(6)]
    assert want == ["r5", "r1", "r2", "r4", "r5", "r1"]
    assert stream.broken == 5  # counted every time, reported once
    assert len(stream.unreported) == 2
    again = DecodableStream(records, order="file")
    again.load(state, None)
    assert [r.id for r in again.take(6)] == want
    assert again.broken == 5


def test_nothing_but_broken_pictures_is_an_error(tmp_path: Path) -> None:
    records = load_data(write_rows(tmp_path, {0, 1, 2}, n=3))
    for ask in ("take", "peek"):
        with pytest.raises(DataError, match="3 problems"):
            getattr(DecodableStream(records), ask)(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_skips_and_counts_or_names_the_file_and_the_way_on(
    tiny_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    spec = write_rows(tmp_path, {4})
    changes = {"data__spec": spec, "data__order": "file", "data__workers": workers, "optim__steps": 3}
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path / "run", checkpoint__every=1, **changes)
    with pytest.raises(TrainingError, match=r"step 2: record 'r4' .*rows\.jsonl:5.*4\.png.*--resume --skip-bad"):
        train(recipe, show=False)
    skipping = make_recipe(
        tiny_folder("qwen2_5"), tmp_path / "run", data__skip_bad=True, checkpoint__every=1, **changes
    )
    train(skipping, resume=True)  # added when the run is resumed
    assert "skipped " + str(tmp_path / "rows.jsonl:5") in capsys.readouterr().err
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [row.get("data/broken") for row in rows] == [None, 1, 1]
    whole = make_recipe(tiny_folder("qwen2_5"), tmp_path / "whole", data__skip_bad=True, **changes)
    train(whole, show=False)
    steady = [{k: v for k, v in row.items() if k != "data/broken"} for row in steady_rows(tmp_path / "run")]
    assert steady == [{k: v for k, v in r.items() if k != "data/broken"} for r in steady_rows(tmp_path / "whole")]
