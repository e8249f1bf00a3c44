"""Shared by the trainer's tests: records on which a random byte-level model earns different rewards, a small recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from fastrl.data.records import Record
from fastrl.recipe import Recipe, build_recipe
from fastrl.run import keeping
from fastrl.run.logs import read_rows
from fastrl.run.metrics import VOLATILE

TEXT = "the quick brown fox jumps over the lazy dog 0123456789 (),.:;-"


def make_records(n: int = 6) -> list[Record]:
    """OCR records: a random model's characters match some of the text, so answers differ in reward."""
    records = []
    for i in range(n):
        image = Image.new("RGB", (56 + 28 * (i % 2), 56), (40 * i % 256, 90, 200 - 30 * i % 200))
        content = [{"type": "image"}, {"type": "text", "text": f"Read {i}."}]
        messages = ({"role": "user", "content": content},)
        records.append(Record(id=f"r{i}", task="ocr", images=(image,), messages=messages, target={"text": TEXT[i:]}))
    return records


def make_recipe(model: Path, out: Path, **changes: Any) -> Recipe:
    """A recipe for a few fast steps; ``changes`` are ``section__key=value``."""
    values: dict[str, Any] = {
        "method": {"kind": "perception-r1", "beta": 0.0},
        "model": {"path": str(model), "device": "cpu"},
        "data": {"spec": "given:records", "prompts_per_step": 3},
        "rollout": {"group_size": 4, "max_new_tokens": 8},
        "optim": {"steps": 4, "lr": 1e-3, "token_budget": 256},
        "log": {"tensorboard": False, "samples_every": 2},
        "checkpoint": {"every": 2},
        "out": str(out),
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values.setdefault(section, {})[name] = value
        else:
            values[section] = value
    return build_recipe(values)


def steady_rows(out: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics without times, speeds and memory."""
    rows = read_rows(out / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in rows]


def steady_evaluations(out: Path) -> list[dict[str, Any]]:
    """Rows of a run's evaluations without their times."""
    rows = read_rows(out / "eval.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in rows]


def same_ending(a: Path, b: Path) -> None:
    """The last checkpoints and the metrics of two runs are equal."""
    assert steady_rows(a) == steady_rows(b)
    first, second = keeping.latest_checkpoint(a), keeping.latest_checkpoint(b)
    assert first is not None
    assert second is not None
    assert first.name == second.name
    for name in ("optimizer.safetensors", "model/model.safetensors", "rank-0.safetensors"):
        left, right = load_file(first / name), load_file(second / name)
        assert left.keys() == right.keys()
        assert [key for key in left if not torch.equal(left[key], right[key])] == []
    assert (first / "rank-0.json").read_text() == (second / "rank-0.json").read_text()
