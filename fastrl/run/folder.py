"""A run's folder: refused where it holds another run, else made ready to begin or to go on."""

from __future__ import annotations

from pathlib import Path

from fastrl.data.files import write_atomically
from fastrl.recipe import Recipe, differences, load_recipe
from fastrl.run import checkpoint
from fastrl.run.checkpoint import CheckpointError


def open_run_folder(recipe: Recipe, resume: bool, writes: bool) -> Path | None:
    """Check the run folder, write the resolved recipe, cut logs back; the checkpoint to resume from, if any."""
    out = recipe.folder
    stored = out / "recipe.yaml"
    found = checkpoint.latest_checkpoint(out) if resume or writes else None
    if not writes:
        return found
    log = out / "metrics.jsonl"
    if not resume and (found is not None or (log.exists() and log.stat().st_size > 0)):
        raise CheckpointError(f"{out} already holds a run: go on with --resume, or choose another --out")
    if resume and found is not None and stored.is_file():
        _check_same_run(recipe, stored)
    write_atomically(stored, recipe.dump())
    step = checkpoint.step_of(found) if found is not None else 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        checkpoint.truncate_rows(out / name, step)
    return found


def _check_same_run(recipe: Recipe, stored: Path) -> None:
    """A resumed run may be longer and log otherwise; whatever else changes makes it another run."""
    old = load_recipe(stored)
    free = (
        "optim.steps",
        "checkpoint.",
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
    )
    changed = {k: v for k, v in differences(old, recipe).items() if not k.startswith(free)}
    if changed:
        listed = "\n".join(f"  {key}: was {was!r}, is {now!r}" for key, (was, now) in changed.items())
        raise CheckpointError(f"{stored.parent}: cannot resume with other settings than the run began with:\n{listed}")
