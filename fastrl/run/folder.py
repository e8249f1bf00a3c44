"""A run's folder: refused if it contains another run or damaged files, otherwise prepared for starting or resuming."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fastrl.data.disk import nothing_empty_left, remove_empty, replace_file
from fastrl.recipe import Recipe, differences, load_recipe
from fastrl.run.integrity import CheckpointError, Damaged, inspect
from fastrl.run.keeping import clear_unfinished, kept, list_checkpoints, set_aside, step_of
from fastrl.run.logs import cut_rows, has_rows, steps_without_row

LOGS = ("metrics.jsonl", "samples.jsonl", "eval.jsonl")
# Files that a run and its loggers write before the first step is done
BEGUN = (
    *("recipe.yaml", "notes.jsonl", "samples.jsonl", "eval.jsonl"),
    *("tensorboard", "wandb", "wandb-id", "rollout"),
)
PROMPTS = "data.prompts_per_step"
# A resumed run may change its length, logging and location; any other change makes it another run.
FREE = (
    "optim.steps",
    "checkpoint.",
    "eval.",
    "log.",
    "out",
    "name",
    "model.path",
    "model.device",
    "rollout.server",
    "rollout.shared",
    "optim.token_budget",
    "data.workers",
    "data.skip_bad",
    "data.max_image_pixels",
    "data.identity",
    "engine.timeout",
    "reward.timeout",
    *(f"reward.judge.{key}" for key in ("url", "timeout", "retries", "concurrency", "cache", "key_env")),
)


class Opened(NamedTuple):
    """A usable run folder: the checkpoint to resume from, if any, and notes for the user."""

    checkpoint: Path | None
    notes: list[str]


@contextmanager
def nothing_left(out: Path) -> Iterator[None]:
    """Remove the files of a run that fails in the block before its first step is done, and its folder if then empty.
    Does nothing if the folder existed and was not empty."""
    new = not out.is_dir() or not any(out.iterdir())
    with nothing_empty_left(out):
        out.mkdir(parents=True, exist_ok=True)
        try:
            yield
        except BaseException:
            if new and not has_rows(out / LOGS[0]) and not list_checkpoints(out):
                for name in BEGUN:
                    _remove(out / name)
                for name in (".lock", "checkpoints"):
                    remove_empty(out / name)
            raise


def open_run_folder(recipe: Recipe, *, resume: bool, writes: bool, from_step: int | None = None) -> Opened:
    """Check the folder and choose the checkpoint to resume from, without changing anything.

    Args:
        recipe: its ``folder`` is used.
        resume: resume the run in the folder.
        writes: whether this rank writes; it checks the files, the others choose the same checkpoint.
        from_step: resume from the checkpoint of this step instead of the newest.

    Raises:
        CheckpointError: the folder contains a run and ``resume`` is off; the run started with other settings; or the
            checkpoint is damaged (the message names the file and the last intact one), missing, or was deleted.
    """
    out = recipe.folder
    found = list_checkpoints(out)
    if not resume:
        if writes and (found or has_rows(out / LOGS[0])):
            raise CheckpointError(f"{out} already contains a run: continue with --resume, or choose another --out")
        return Opened(None, [])
    chosen = _choose(out, found, from_step)
    if not writes:
        return Opened(chosen, [])
    if chosen is None:
        _check_nothing_vanished(out)
        return Opened(None, ["no checkpoint yet: starting from the beginning"])
    notes = _check_same_run(recipe, out / "recipe.yaml")
    kept(out)
    try:
        inspect(chosen, step_of(chosen))
    except Damaged as error:
        raise offer_earlier(out, chosen, error) from None
    return Opened(chosen, [f"resuming after step {step_of(chosen)}", *notes])


def begin_run(recipe: Recipe, done: int) -> list[str]:
    """Prepare the folder for continuing after step ``done``: write the resolved recipe, truncate logs, and set
    checkpoints of later steps aside. Returns notes for the user."""
    out = recipe.folder
    clear_unfinished(out)
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    notes = [f"set aside, as its step will be done again: {path}" for path in set_aside(out, done)]
    last = done if done else -1  # a new run keeps no rows, not even of an evaluation before the first step
    notes += [str(cut) for cut in (cut_rows(out / name, last) for name in LOGS) if str(cut)]
    if lost := steps_without_row(out / LOGS[0], done):
        notes.append(f"{out / LOGS[0]} has no row of {lost} of the {done} steps that were done; they are not repeated")
    replace_file(out / "recipe.yaml", recipe.dump().encode())
    return notes


def offer_earlier(out: Path, damaged: Path, error: Exception) -> CheckpointError:
    """The error of a damaged checkpoint, with the last intact one before it."""
    for path in reversed([p for p in list_checkpoints(out) if step_of(p) < step_of(damaged)]):
        try:
            inspect(path, step_of(path))
        except CheckpointError:
            continue
        step = step_of(path)
        return CheckpointError(f"{error}; the last intact checkpoint is of step {step}: --resume --from-step {step}")
    return CheckpointError(f"{error}; no earlier checkpoint is intact: restore the file, or start in another --out")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _choose(out: Path, found: list[Path], from_step: int | None) -> Path | None:
    if from_step is None:
        return found[-1] if found else None
    for path in found:
        if step_of(path) == from_step:
            return path
    there = ", ".join(str(step_of(path)) for path in found) or "none"
    raise CheckpointError(f"{out}: no checkpoint of step {from_step}; available: {there}")


def _check_nothing_vanished(out: Path) -> None:
    """Raise if files are gone: a run creates ``checkpoints`` when it starts, and ``model`` with its first
    checkpoint."""
    if not any(has_rows(out / name) for name in LOGS):
        return
    if not (out / "checkpoints").is_dir() or os.path.islink(out / "model"):
        raise CheckpointError(
            f"{out / 'checkpoints'}: missing, though {out / LOGS[0]} belongs to an earlier run: restore it, or start "
            "again with another --out"
        )


def _check_same_run(recipe: Recipe, stored: Path) -> list[str]:
    if not stored.exists():
        return [f"{stored} is missing: the settings were not compared with those the run started with"]
    changes = differences(load_recipe(stored), recipe)
    changed = {key: values for key, values in changes.items() if not key.startswith(FREE)}
    notes = []
    if recipe.engine.shards_weights and PROMPTS in changed:  # of each rank, whose number may change
        was, now = changed.pop(PROMPTS)
        notes.append(f"{PROMPTS}, of each rank, was {was} and is {now}")
    if changed:
        listed = "\n".join(f"  {key}: was {was!r}, is {now!r}" for key, (was, now) in changed.items())
        raise CheckpointError(f"{stored.parent}: cannot resume with settings that have changed since:\n{listed}")
    return notes
