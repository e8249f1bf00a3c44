"""A run over a mixture: a reward and metrics for each part, and exact resumption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastrl.run import keeping
from fastrl.run.logs import read_rows
from fastrl.trainer import train
from tests.helpers.mixture import evaluated, mixture
from tests.helpers.training import make_recipe, same_ending, steady_evaluations, steady_rows

Folder = Callable[[str], Path]
REPO = Path(__file__).resolve().parents[3]


CHILD = """
    import os, signal, sys
    from pathlib import Path
    import torch
    torch.set_num_threads({threads})
    from fastrl.trainer import train
    from tests.helpers.mixture import evaluated

    def die(row):
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    train(evaluated(Path({model!r}), Path({out!r})), on_step=die, show=False)
"""


class Stop(Exception):
    """Ends a run between two steps."""


@pytest.fixture(scope="module")
def whole(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("mixture") / "whole"
    train(evaluated(tiny_folder("qwen2_5"), out), show=False)
    return out


def test_a_mixture_runs_with_a_reward_for_each_part(whole: Path) -> None:
    rows = read_rows(whole / "metrics.jsonl")
    assert all(row["source/words/prompts"] + row["source/boxes/prompts"] == 4 for row in rows)
    assert rows[0]["source/words/prompts"] < rows[-1]["source/words/prompts"]
    assert {"source/words/reward/text", "source/boxes/reward/iou", "source/boxes/reward/mean"} <= set(rows[0])
    assert "source/boxes/reward/format" not in rows[0]
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert {str(sample["id"]).split("/")[0] for sample in samples} <= {"words", "boxes"}


def goes_on_as(whole: Path, out: Path, model: Path) -> None:
    """A run that ended after step 3 and is resumed equals the uninterrupted one bit for bit, with its evaluations."""
    assert [row["step"] for row in steady_rows(out)] == [1, 2, 3]
    assert train(evaluated(model, out), resume=True, show=False).steps == 6
    same_ending(whole, out)
    assert steady_evaluations(out) == steady_evaluations(whole)
    assert [row["step"] for row in steady_evaluations(out)] == [0, 2, 4, 6]
    best = [(folder / "checkpoints" / "best").resolve() for folder in (whole, out)]
    assert best[0].name == best[1].name
    assert keeping.kept(whole) == keeping.kept(out)


def test_a_mixture_with_a_table_and_evaluations_goes_on_exactly(tiny_folder: Folder, whole: Path) -> None:
    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:  # after a checkpoint, so this step is lost and repeated
            raise Stop

    model, out = tiny_folder("qwen2_5"), whole.parent / "parts"
    with pytest.raises(Stop):
        train(evaluated(model, out), on_step=stop, show=False)
    goes_on_as(whole, out, model)


@pytest.mark.gate
def test_a_mixture_with_a_table_and_evaluations_survives_kill_9(tiny_folder: Folder, whole: Path) -> None:
    model, out = tiny_folder("qwen2_5"), whole.parent / "killed"
    values = {"threads": torch.get_num_threads(), "model": str(model), "out": str(out)}
    script = textwrap.dedent(CHILD).format(**values)
    places = [str(REPO), str(REPO / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    goes_on_as(whole, out, model)


def test_a_curriculum_of_one_data_set_begins_easy(tiny_folder: Folder, tmp_path: Path) -> None:
    mixture(tiny_folder("qwen2_5"), tmp_path / "x")
    changes = {
        "data__spec": f"ocr:{tmp_path / 'words.parquet'}",
        "data__mix": [],
        "data__curriculum": {"by": "level", "steps": 20, "start": 0.1},
        "optim__steps": 2,
        "log__samples_every": 1,
        "log__samples": 4,
    }
    train(mixture(tiny_folder("qwen2_5"), tmp_path / "easy", **changes), show=False)
    samples = [json.loads(line) for line in (tmp_path / "easy/samples.jsonl").read_text().splitlines()]
    assert {int(sample["id"]) % 5 for sample in samples} == {0}  # only level 0


def test_a_run_over_a_mixture_notes_the_rows_that_each_part_skips(tiny_folder: Folder, tmp_path: Path) -> None:
    Image.new("RGB", (56, 56), "blue").save(tmp_path / "w.png")
    rows = [{"image": "w.png", "text": text} for text in ("read me", 3, "read me, too")]
    for name, kept in (("clean", rows[::2]), ("damaged", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    mix = [{"spec": f"ocr:{tmp_path / name}.jsonl"} for name in ("clean", "damaged")]
    changes = {"data__spec": "", "data__mix": mix, "data__skip_bad": True, "optim__steps": 1}
    train(make_recipe(tiny_folder("qwen2_5"), tmp_path / "out", **changes), show=False)
    notes = [row["note"] for row in read_rows(tmp_path / "out" / "notes.jsonl")]
    assert [note for note in notes if "skipped" in note] == ["damaged: skipped 1 of 3 rows: wrong type 1"]


def test_a_part_that_the_reward_does_not_fit_is_named(tiny_folder: Folder, tmp_path: Path) -> None:
    wrong = {"options": {"metric": "iou"}}
    mix = [
        {"spec": "scenes:grounding?n=2&size=56"},
        {"name": "words", "spec": "scenes:ocr?n=2&size=56", "reward": wrong},
    ]
    recipe = make_recipe(tmp_path / "no model", tmp_path / "out", data__spec="", data__mix=mix)
    with pytest.raises(ValueError, match=r"data\.mix, words: the data is ocr, .*unknown option 'metric'"):
        train(recipe, show=False)
