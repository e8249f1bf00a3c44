"""A resumed run equals an uninterrupted one: the same weights to the bit and the same metrics, for any interruption."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastrl.run import keeping
from fastrl.run.integrity import CheckpointError
from fastrl.run.logs import read_rows
from fastrl.trainer import train
from tests.helpers.training import make_recipe, make_records, same_ending, steady_rows

Folder = Callable[[str], Path]
REPO = Path(__file__).resolve().parents[3]


class Stop(Exception):
    """Ends a run between two steps."""


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__schedule": "cosine", "optim__warmup": 1, "rollout__keep_prompts": "on"},
        {"optim__updates_per_batch": 2, "method__beta": 0.05, "method__aggregate": "token"},
        {"optim__updates_per_batch": 2, "method__beta": 0.05, "model__lora": {"rank": 2, "dropout": 0.1}},
        {
            "method__zero_variance": "resample",
            "rollout__max_new_tokens": 2,
            "model__gradient_checkpointing": True,
            "rollout__keep_prompts": "on",
        },
        {"optim__states": "8bit", "optim__token_budget": 96},
        {"optim__states": "offload", "model__gradient_checkpointing": True, "model__offload_activations": True},
        {"optim__gradient_release": True, "optim__clip_norm": None, "model__dtype": "bfloat16"},
    ],
    ids=["plain", "two-updates", "lora-two-updates", "resample", "8bit", "offload", "release"],
)
def test_resumed_equals_never_stopped(tiny_folder: Folder, tmp_path: Path, changes: dict[str, Any]) -> None:
    model = tiny_folder("qwen2_5")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(make_recipe(model, whole, **changes), records=make_records(), show=False)

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:  # a step after the checkpoint: it is logged, lost and repeated
            raise Stop

    recipe = make_recipe(model, parts, **changes)
    with pytest.raises(Stop):
        train(recipe, records=make_records(), on_step=stop, show=False)
    assert len(steady_rows(parts)) == 3
    summary = train(recipe, records=make_records(), resume=True, show=False)
    assert summary.steps == 4
    same_ending(whole, parts)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_run_goes_on_only_from_the_weights_it_began_with(tiny_folder: Folder, tmp_path: Path, lora: Any) -> None:
    """Training cannot resume from the trained model: the reference would change, an adapter would be applied twice."""
    changes: dict[str, Any] = {"model__lora": lora, "method__beta": 0.1, "optim__steps": 2, "optim__lr": 1e-2}
    out = tmp_path / "run"
    train(make_recipe(tiny_folder("qwen2_5"), out, **changes), records=make_records(), show=False)
    changes["optim__steps"] = 3
    with pytest.raises(CheckpointError, match="started with other weights"):
        train(make_recipe(out / "model", out, **changes), records=make_records(), resume=True, show=False)
    moved = shutil.copytree(tiny_folder("qwen2_5"), tmp_path / "moved")
    assert train(make_recipe(moved, out, **changes), records=make_records(), resume=True, show=False).steps == 3


@pytest.fixture(scope="module")
def never_stopped(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the killed ones must equal."""
    out = tmp_path_factory.mktemp("never_stopped")
    train(make_recipe(tiny_folder("qwen2_5"), out, checkpoint__keep=1), records=make_records(), show=False)
    return out


CHILD = """
    import os, signal, sys
    from pathlib import Path
    import torch
    torch.set_num_threads({threads})  # sums are split among threads: another number rounds otherwise
    sys.path.insert(0, {tests!r})
    from tests.helpers.training import make_recipe, make_records
    from fastrl.run import checkpoint, keeping
    from fastrl.trainer import train

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    point, saved, flush = {point!r}, [], checkpoint._flush
    if point == "writing":  # in the middle of the second checkpoint
        checkpoint._flush = lambda folder: die() if saved else (saved.append(1), flush(folder))
    recipe = make_recipe(Path({model!r}), Path({out!r}), checkpoint__keep=1)
    on_step = lambda row: die() if point == "logged" and row["step"] == 3 else None
    train(recipe, records=make_records(), on_step=on_step, show=False)
"""


@pytest.fixture(scope="module")
def killed(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs that kill themselves at a point, by its name; the processes run in parallel."""
    folders = {point: tmp_path_factory.mktemp(point) for point in ("logged", "writing")}
    started = []
    for point, out in folders.items():
        values = {
            "tests": str(REPO),
            "threads": torch.get_num_threads(),
            "point": point,
            "model": str(tiny_folder("qwen2_5")),
            "out": str(out),
        }
        script = textwrap.dedent(CHILD).format(**values)
        started.append(subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True))
    for process in started:
        _, errors = process.communicate(timeout=1200)
        assert process.returncode == -signal.SIGKILL, errors
    return folders


@pytest.mark.gate
@pytest.mark.parametrize("point", ["logged", "writing"])
def test_kill_9_loses_at_most_the_steps_since_the_checkpoint(
    tiny_folder: Folder, never_stopped: Path, killed: dict[str, Path], point: str
) -> None:
    out = killed[point]
    assert [row["step"] for row in steady_rows(out)][-1] == {"logged": 3, "writing": 4}[point]
    assert keeping.list_checkpoints(out)[-1].name == "step-00000002"
    recipe = make_recipe(tiny_folder("qwen2_5"), out, checkpoint__keep=1)
    summary = train(recipe, records=make_records(), resume=True, show=False)
    assert summary.steps == 4
    same_ending(never_stopped, out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000004"]


def test_resume_without_a_checkpoint_begins_anew(tiny_folder: Folder, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, optim__steps=1)

    def stop(row: dict[str, Any]) -> None:
        raise Stop

    with pytest.raises(Stop):
        train(recipe, records=make_records(), on_step=stop, show=False)
    train(recipe, records=make_records(), resume=True, show=False)
    assert [row["step"] for row in steady_rows(tmp_path)] == [1]


def test_finished_run_can_be_made_longer_but_not_another(tiny_folder: Folder, tmp_path: Path) -> None:
    model = tiny_folder("qwen2_5")
    train(make_recipe(model, tmp_path, optim__steps=1), records=make_records(), show=False)
    again = train(make_recipe(model, tmp_path, optim__steps=1), records=make_records(), resume=True, show=False)
    assert (again.steps, again.last) == (1, {})
    with pytest.raises(CheckpointError, match=r"optim\.lr: was 0\.001, is 0\.5"):
        train(make_recipe(model, tmp_path, optim__lr=0.5), records=make_records(), resume=True, show=False)
    with pytest.raises(ValueError, match="5 records where there were 6; gone: 'r5'"):
        train(make_recipe(model, tmp_path, optim__steps=2), records=make_records(5), resume=True, show=False)
    longer = train(make_recipe(model, tmp_path, optim__steps=2), records=make_records(), resume=True, show=False)
    assert longer.steps == 2
    assert [row["step"] for row in steady_rows(tmp_path)] == [1, 2]


# States of a folder that can be resumed


@pytest.fixture(scope="module")
def two_checkpoints(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps with the checkpoints of steps 2 and 4. Copy it, do not write to it."""
    out = tmp_path_factory.mktemp("two") / "run"
    train(make_recipe(tiny_folder("qwen2_5"), out), records=make_records(), show=False)
    return out


@pytest.fixture
def run(two_checkpoints: Path, tmp_path: Path) -> Path:
    return shutil.copytree(two_checkpoints, tmp_path / "run", symlinks=True)


def state_of(out: Path) -> dict[str, bytes]:
    """Every file of a run's folder."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def notes(out: Path) -> str:
    return "\n".join(row["note"] for row in read_rows(out / "notes.jsonl"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    ["optimizer.safetensors", "optimizer.json", "rank-0.json", "rank-0.safetensors", "data.json", "model/config.json"],
)
def test_a_damaged_checkpoint_is_named_and_the_last_sound_one_is_offered(
    tiny_folder: Folder, run: Path, name: str
) -> None:
    newest = run / "checkpoints" / "step-00000004"
    flip(newest / name)
    before = state_of(run)
    recipe = make_recipe(tiny_folder("qwen2_5"), run)
    with pytest.raises(CheckpointError) as error:
        train(recipe, records=make_records(), resume=True, show=False)
    message = (
        f"{newest / name}: damaged: its checksum is not the one in state.json; the last intact checkpoint is of step 2"
    )
    assert str(error.value) == f"{message}: --resume --from-step 2"
    assert state_of(run) == before
    if name != "optimizer.safetensors":
        return
    flip(run / "checkpoints" / "step-00000002" / name)
    with pytest.raises(CheckpointError, match="no earlier checkpoint is intact"):
        train(recipe, records=make_records(), resume=True, show=False)


def test_going_on_from_an_earlier_checkpoint_ends_where_the_run_would_have(
    tiny_folder: Folder, never_stopped: Path, run: Path
) -> None:
    flip(run / "checkpoints" / "step-00000004" / "optimizer.safetensors")
    recipe = make_recipe(tiny_folder("qwen2_5"), run)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; available: 2, 4"):
        train(recipe, records=make_records(), resume=True, from_step=3, show=False)
    with pytest.raises(ValueError, match="--from-step, --accept-changed-data"):
        train(recipe, records=make_records(), from_step=2, show=False)
    summary = train(recipe, records=make_records(), resume=True, from_step=2, show=False)
    assert summary.steps == 4
    same_ending(never_stopped, run)
    assert (run / "checkpoints" / "aside-step-00000004").is_dir()
    assert "resuming after step 2" in notes(run)
    assert "2 rows of steps that are done again cut from metrics.jsonl" in notes(run)


def test_damage_that_no_checksum_covers_is_offered_the_last_sound_one_too(tiny_folder: Folder, run: Path) -> None:
    newest = run / "checkpoints" / "step-00000004"
    for path in newest.glob("*.json"):
        path.write_text(path.read_text().replace('"files":', '"other":').replace('"python":', '"snake":'))
    (newest / "data.json").unlink()
    with pytest.raises(CheckpointError, match=r"rank-0.json: python is missing .*: --resume --from-step 2$"):
        train(make_recipe(tiny_folder("qwen2_5"), run), records=make_records(), resume=True, show=False)


def test_a_failed_resume_changes_nothing(tiny_folder: Folder, run: Path) -> None:
    """Settings, data, or an earlier step for which logs would be cut: on any error, recipe and logs are unchanged."""
    before = state_of(run)
    longer = make_recipe(tiny_folder("qwen2_5"), run, optim__steps=9)
    for changes in ({"records": make_records(5)}, {"records": make_records(5), "from_step": 2}):
        with pytest.raises(ValueError, match="data has changed since the run started"):
            train(longer, resume=True, show=False, **changes)
    with pytest.raises(FileNotFoundError):
        train(make_recipe(Path("/nowhere"), run, optim__steps=9), records=make_records(), resume=True, show=False)
    assert state_of(run) == before


@pytest.mark.parametrize("how", ["folder", "inside", "no rows"])
def test_checkpoints_that_vanished_are_noticed(tiny_folder: Folder, run: Path, how: str) -> None:
    shutil.rmtree(run / "checkpoints")
    if how == "inside":
        (run / "checkpoints").mkdir()
    recipe = make_recipe(tiny_folder("qwen2_5"), run, optim__steps=1)
    if how == "no rows":  # there is nothing to lose by starting again
        for name in ("metrics.jsonl", "samples.jsonl"):
            (run / name).unlink()
        assert train(recipe, records=make_records(), resume=True, show=False).steps == 1
        return
    before = state_of(run)
    with pytest.raises(
        CheckpointError, match=r"checkpoints: missing, though .*metrics.jsonl belongs to an earlier run"
    ):
        train(recipe, records=make_records(), resume=True, show=False)
    assert state_of(run) == before


def test_lines_of_a_log_that_are_no_rows_are_set_aside_and_said(tiny_folder: Folder, run: Path) -> None:
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines[:2], "garbage\n", *lines[2:], '{"ste']))
    train(make_recipe(tiny_folder("qwen2_5"), run), records=make_records(), resume=True, show=False)
    assert log.read_text() == "".join(lines)
    assert (run / "metrics.jsonl.bad").read_text() == 'garbage\n{"ste\n'
    assert "2 lines of metrics.jsonl that cannot be read as a row set aside in" in notes(run)


def test_rows_that_are_gone_are_said(tiny_folder: Folder, run: Path) -> None:
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    recipe = make_recipe(tiny_folder("qwen2_5"), run)
    log.write_text("".join(lines[1:]))
    train(recipe, records=make_records(), resume=True, show=False)
    assert f"{log} has no row of 1 of the {len(lines)} steps that were done" in notes(run)
    log.unlink()
    train(recipe, records=make_records(), resume=True, show=False)
    assert f"{log} has no row of {len(lines)} of the {len(lines)} steps that were done" in notes(run)


def test_changed_data_is_named_and_may_be_accepted(tiny_folder: Folder, run: Path) -> None:
    changed = [replace(record, target={"text": "other"}) for record in make_records()]
    recipe = make_recipe(tiny_folder("qwen2_5"), run, optim__steps=5)
    with pytest.raises(ValueError, match=r"other target of 'r0', 'r1', 'r2' and 3 more. .*--accept-changed-data"):
        train(recipe, records=changed, resume=True, show=False)
    summary = train(recipe, records=changed, resume=True, accept_changed_data=True, show=False)
    assert summary.steps == 5
    assert "continuing with changed data: other target of 'r0'" in notes(run)
    assert train(recipe, records=changed, resume=True, show=False).steps == 5  # it is now the run's data


def test_a_bad_row_may_be_removed_or_skipped_on_resume(tiny_folder: Folder, run: Path) -> None:
    left = [record for record in make_records() if record.id != "r4"]
    model = tiny_folder("qwen2_5")
    recipe = make_recipe(model, run, optim__steps=5)
    with pytest.raises(ValueError, match=r"gone: 'r4'.*--accept-changed-data"):
        train(recipe, records=left, resume=True, show=False)
    skipping = make_recipe(model, run, optim__steps=5, data__skip_bad=True)  # as for a row that has become bad
    assert train(skipping, records=left, resume=True, show=False).steps == 5
    assert "gone: 'r4'" in notes(run)


def test_the_last_checkpoint_before_all_rewards_were_equal_is_kept_and_named(
    tiny_folder: Folder, tmp_path: Path
) -> None:
    """Without a learning signal weights may drift; the checkpoint from before is the way back, so rotation keeps it."""
    hopeless = [replace(record, target={"text": "漢字漢字漢字漢字漢字漢字"}) for record in make_records()]
    model = tiny_folder("qwen2_5")
    changes = {"checkpoint__keep": 1, "checkpoint__every": 1}
    train(make_recipe(model, tmp_path, optim__steps=1, **changes), records=make_records(), show=False)
    recipe = make_recipe(model, tmp_path, optim__steps=3, **changes)
    train(recipe, records=hopeless, resume=True, accept_changed_data=True, show=False)
    assert [path.name[-1] for path in keeping.list_checkpoints(tmp_path)] == ["1", "3"]
    assert f"equal rewards; the checkpoint from before, {tmp_path}/checkpoints/step-00000001, is kept" in notes(
        tmp_path
    )


# The exact keys that a run of the first layout wrote into recipe.yaml, state.json and rank-0.json.
FIRST = {
    "model": "path dtype device lora freeze gradient_checkpointing offload_activations liger min_pixels max_pixels",
    "data": "spec prompts_per_step order seed skip_bad frames sample workers blank_images",
    "engine": "kind zero_stage offload_optimizer",
}


def as_first_written(out: Path) -> None:
    """Rewrites a run with one checkpoint to the form before files moved into folders."""
    values = yaml.safe_load((out / "recipe.yaml").read_text())
    for section, keys in FIRST.items():
        values[section] = {key: values[section][key] for key in keys.split()}
    (out / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    (folder,) = keeping.list_checkpoints(out)
    (folder / "data.json").unlink()
    state = json.loads((folder / "state.json").read_text())
    first = {key: state[key] for key in ("version", "step", "world_size", "torch")}
    (folder / "state.json").write_text(json.dumps(first))
    (folder / "optimizer.json").write_text(json.dumps({"updates": first["step"]}))
    rank = json.loads((folder / "rank-0.json").read_text())
    rank = {key: rank[key] for key in ("base", "stream", "python", "numpy", "method") if key in rank}
    ids = "".join(f"ocr\0r{i}\0" for i in range(6))  # then the fingerprint covered tasks and ids only
    rank["stream"] |= {"fingerprint": hashlib.sha256(ids.encode()).hexdigest()[:16]}
    (folder / "rank-0.json").write_text(json.dumps(rank))
    for path in out.iterdir():
        if path.name not in ("checkpoints", "metrics.jsonl", "model", "recipe.yaml", "samples.jsonl"):
            path.unlink()


def test_a_run_of_the_first_layout_goes_on_to_the_same_weights(
    tiny_folder: Folder, two_checkpoints: Path, run: Path
) -> None:
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    as_first_written(run)
    summary = train(make_recipe(tiny_folder("qwen2_5"), run), records=make_records(), resume=True, show=False)
    assert summary.steps == 4
    same_ending(two_checkpoints, run)
