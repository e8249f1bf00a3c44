"""RePer on real captions: dialogues of five models' captions of COCO pictures train a policy, which is scored."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastrl.batch import Completion
from fastrl.build.reper import BuildOptions, build_dialogues
from fastrl.critics import RuleCritic
from fastrl.data import load_data
from fastrl.data.records import Record, question
from fastrl.data.reflection import dialogue_of
from fastrl.evaluate.reflect import evaluate_reflection
from fastrl.recipe import load_recipe
from fastrl.trainer import train


@pytest.fixture
def real(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any]]:
    """A dialogue file of the models' captions, scored against the human ones, and the build's summary. The captioned
    pictures are not in the data set, so other COCO pictures are used."""
    lines = (data_dir / "text" / "pope_model_captions.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["human_captions"]]
    pictures = sorted((data_dir / "coco" / "images").iterdir())
    message = {str(row["image_id"]): [c["caption"][:300] for c in row["model_captions"]] for row in rows}
    records = [
        Record(str(row["image_id"]), "caption", (picture,), question("caption"), {"references": row["human_captions"]})
        for row, picture in zip(rows, pictures, strict=False)
    ]

    class Session:
        """Returns the models' captions, one for each temperature."""

        def __init__(self, prompts: Sequence[Record]) -> None:
            self.prompts, self.turn = prompts, 0

        def generate(self, sampling: Any, rng: Any) -> list[list[Any]]:
            self.turn += 1
            return [[Completion(None, text=message[r.id][self.turn - 1])] for r in self.prompts]  # type: ignore[arg-type]

    monkeypatch.setattr("fastrl.rollout.Generator", lambda policy: SimpleNamespace(session=Session))
    out = tmp_path / "dialogues.jsonl"
    options = BuildOptions(
        "five models", "real", "rule", temperatures=tuple(n / 10 for n in range(10)), min_best=0.3, min_gap=0.15
    )
    policy: Any = SimpleNamespace(encode=lambda record: (record, record))
    summary = build_dialogues(options, out, policy=policy, critic=RuleCritic(), records=records)
    monkeypatch.undo()
    return out, summary


def test_dialogues_of_real_captions_go_from_bad_to_good(real: tuple[Path, dict[str, Any]]) -> None:
    out, summary = real
    records = load_data(f"reflection:{out}")
    assert len(records) == summary["kept"] > 15
    assert summary["mean_best"] > summary["mean_worst"] + 0.15
    for record in records:
        scores = [turn.score for turn in dialogue_of(record)]
        assert scores == sorted(scores)
        assert scores[-1] == max(record.target["list"].rewards)


@pytest.mark.parametrize("method", [{"kind": "reper"}, {"kind": "sft"}, {"kind": "dpo"}, {"kind": "lipo"}])
def test_real_dialogues_train_and_the_policy_is_evaluated(
    real: tuple[Path, dict[str, Any]], method: dict[str, Any], data_dir: Path, tmp_path: Path
) -> None:
    changes = {
        "method": method,
        "data.spec": f"reflection:{real[0]}",
        "data.prompts_per_step": 2,
        "model.max_pixels": 28 * 28 * 16,
        "optim.steps": 3,
        "optim.lr": 1e-4,
        "log.tensorboard": False,
        "out": str(tmp_path / "run"),
    }
    summary = train(load_recipe("reper-caption-tiny", changes), show=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    if method["kind"] != "reper":
        return
    coco = data_dir / "coco"
    spec = f"captions:{coco / 'captions.json'}?instances={coco / 'instances.json'}&images={coco / 'images'}&limit=2"
    metrics = evaluate_reflection(spec, model=str(summary.model), turns=2, max_new_tokens=8)
    assert metrics["turn1/n"] == metrics["turn2/n"] == 2
    assert metrics.pop("matching").startswith("rules")
    assert all(math.isfinite(value) for value in metrics.values())
