"""A run over a mixture of a table, whose pictures are read on access, and of drawn scenes; with evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastrl.recipe import Recipe
from tests.helpers.training import make_recipe


def mixture(model: Path, out: Path, **changes: Any) -> Recipe:
    """Its recipe; the table is beside the run's folder ``out``."""
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
    return make_recipe(model, out, **values)


def evaluated(model: Path, out: Path) -> Recipe:
    """The same, evaluated on the table's first rows, greedily and with samples."""
    section = {"spec": f"ocr:{out.parent / 'words.parquet'}", "every": 2, "n": 3, "max_new_tokens": 6, "patience": 9}
    return mixture(model, out, eval=section, checkpoint__keep=1)
