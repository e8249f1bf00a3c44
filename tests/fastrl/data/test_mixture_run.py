"""A run over a mixture: a reward for each part, metrics of each, and going on exactly where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastrl.recipe import Recipe
from fastrl.run.logs import read_rows
from fastrl.trainer import train
from tests.helpers.training import make_recipe, steady_rows

Folder = Callable[[str], Path]


def recipe(tiny_folder: Folder, out: Path, **changes: Any) -> Recipe:
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    table, picture = out.parent / "words.parquet", out.parent / "w.png"
    if not table.is_file():
        Image.new("RGB", (56, 56), "blue").save(picture)
        bytes_of = {"bytes": picture.read_bytes(), "path": None}
        rows = [{"image": bytes_of, "text": f"the fox {i}", "level": i % 5} for i in range(12)]
        pq.write_table(pa.Table.from_pylist(rows), table, row_group_size=4)
    values: dict[str, Any] = {
        "data__spec": "",
        "data__mix": [
            {"name": "words", "spec": f"ocr:{table}", "weight": {0: 1.0, 4: 3.0}},
            {"name": "boxes", "spec": "scenes:grounding?n=10&size=56", "reward": {"options": {"format": "none"}}},
        ],
        "data__prompts_per_step": 4,
        "data__shuffle_buffer": 4,
        "optim__steps": 6,
        "checkpoint__every": 2,
        **changes,
    }
    return make_recipe(tiny_folder("qwen2_5"), out, **values)


def test_a_mixture_runs_with_a_reward_for_each_part_and_goes_on_exactly(tiny_folder: Folder, tmp_path: Path) -> None:
    train(recipe(tiny_folder, tmp_path / "whole"), show=False)
    rows = read_rows(tmp_path / "whole/metrics.jsonl")
    assert all(row["source/words/prompts"] + row["source/boxes/prompts"] == 4 for row in rows)
    assert rows[0]["source/words/prompts"] < rows[-1]["source/words/prompts"]
    assert {"source/words/reward/text", "source/boxes/reward/iou", "source/boxes/reward/mean"} <= set(rows[0])
    assert "source/boxes/reward/format" not in rows[0]
    samples = [json.loads(line) for line in (tmp_path / "whole/samples.jsonl").read_text().splitlines()]
    assert {str(sample["id"]).split("/")[0] for sample in samples} <= {"words", "boxes"}
    train(recipe(tiny_folder, tmp_path / "parts", optim__steps=2), show=False)
    train(recipe(tiny_folder, tmp_path / "parts"), resume=True, show=False)
    assert steady_rows(tmp_path / "parts") == steady_rows(tmp_path / "whole")


def test_a_curriculum_of_one_data_set_begins_easy(tiny_folder: Folder, tmp_path: Path) -> None:
    recipe(tiny_folder, tmp_path / "x")
    changes = {
        "data__spec": f"ocr:{tmp_path / 'words.parquet'}",
        "data__mix": [],
        "data__curriculum": {"by": "level", "steps": 20, "start": 0.1},
        "optim__steps": 2,
        "log__samples_every": 1,
        "log__samples": 4,
    }
    train(recipe(tiny_folder, tmp_path / "easy", **changes), show=False)
    samples = [json.loads(line) for line in (tmp_path / "easy/samples.jsonl").read_text().splitlines()]
    assert {int(sample["id"]) % 5 for sample in samples} == {0}  # level 0 alone
