"""The shipped recipes train on real COCO images, expressions, counts and OCR lines, and the protocols score them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fastrl.evaluate.run import run_evaluation
from fastrl.recipe import load_recipe
from fastrl.trainer import train

SPECS = {
    "grounding": "refexp:{data}/refexp/spare/expressions.jsonl?images={data}",
    "counting": "pixmo:{data}/counting/counts.jsonl?images={data}",
    "detection": "coco:{data}/coco/instances.json?images={data}/coco/images",
    "ocr": "ocr:{data}/ocr/lines_uw3/lines.jsonl?images={data}",
}
KEYS = {
    "grounding": {"acc@0.5", "acc@0.75", "acc@0.95", "mean_iou"},
    "counting": {"accuracy"},
    "detection": {"AP", "AP50", "AP75"},
    "ocr": {"edit_distance", "f1", "precision", "recall", "bleu", "meteor"},
}
SMALL = {
    "optim.steps": 20,
    "data.prompts_per_step": 2,
    "rollout.group_size": 4,
    "rollout.max_new_tokens": 16,
    "model.max_pixels": 28 * 28 * 16,
    "log.tensorboard": False,
}


@pytest.mark.parametrize("task", sorted(SPECS))
def test_a_tiny_recipe_trains_on_real_data_and_is_scored(task: str, data_dir: Path, tmp_path: Path) -> None:
    spec = SPECS[task].format(data=data_dir)
    changes = {**SMALL, "data.spec": spec, "out": str(tmp_path / "run")}
    summary = train(load_recipe(f"perception-r1-{task}-tiny", changes), show=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["reward/mean"]) for row in rows)
    assert summary.model is not None
    metrics = run_evaluation(task, spec, model=str(summary.model), limit=6, max_new_tokens=16)
    assert set(metrics) >= KEYS[task] | {"n", "unparsable"}
    assert metrics["n"] == 6
    assert all(math.isfinite(metrics[name]) for name in KEYS[task])
