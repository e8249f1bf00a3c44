"""A run's checkpoints, and which of them are kept: the last few, and those that ``checkpoints/keep.json`` names.

``keep.json`` maps a reason to a step. ``best`` is set after an evaluation (:func:`keep_best`): ``checkpoints/best``
then links to that checkpoint, and ``OUT/best`` to its model. :data:`BEFORE_EQUAL` is the last checkpoint before rewards
became equal within all groups of a step, which may mean that the policy has collapsed; training can be continued from
it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

from fastrl.data.disk import replace_file
from fastrl.run.integrity import CheckpointError, is_count, read_json

BEST = "best"
BEFORE_EQUAL = "before-equal-rewards"
TEMPORARY = ".writing-"
ASIDE = "aside-"
_KEPT = "keep.json"
_NAME = re.compile(r"step-(\d{8,})")


def list_checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    root = out / "checkpoints"
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder}: not a checkpoint's name (step-00000020)")
    return int(match[1])


def folder_of(out: Path, step: int) -> Path:
    """Folder of a run's checkpoint of ``step``, whether or not it exists."""
    return out / "checkpoints" / f"step-{step:08d}"


def latest_checkpoint(out: Path) -> Path | None:
    """The last complete checkpoint of a run, if any; removes incomplete ones left by a killed process."""
    clear_unfinished(out)
    found = list_checkpoints(out)
    return found[-1] if found else None


def clear_unfinished(out: Path) -> None:
    """Remove partly written or partly deleted checkpoints left by a killed process."""
    for path in (out / "checkpoints").glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def kept(out: Path) -> dict[str, int]:
    """Steps whose checkpoints are kept, by reason. Raises ``CheckpointError`` if ``keep.json`` cannot be read."""
    path = out / "checkpoints" / _KEPT
    if not path.exists():
        return {}
    steps = read_json(path)
    if not all(is_count(step) for step in steps.values()):
        raise CheckpointError(f"{path}: must map reasons to steps, got {json.dumps(steps)[:80]}")
    return steps


def keep(out: Path, reason: str, step: int | None) -> None:
    """Keep the checkpoint of ``step`` for ``reason``, instead of the previous one (None: keep none)."""
    steps = kept(out)
    if steps.get(reason) == step:
        return
    steps = {name: other for name, other in steps.items() if name != reason}
    if step is not None:
        steps[reason] = step
    replace_file(out / "checkpoints" / _KEPT, f"{json.dumps(steps)}\n".encode())
    if reason == BEST:
        _link_best(out, step)


def keep_best(out: Path, step: int | None) -> str:
    """Keep the checkpoint of ``step`` as the best one (None: keep none). If it no longer exists, none is kept and a
    message is returned."""
    there = step is None or folder_of(out, step).is_dir()
    keep(out, BEST, step if there else None)
    return "" if there else f"the best checkpoint so far, of step {step}, no longer exists"


def _link_best(out: Path, step: int | None) -> None:
    inner, outer = out / "checkpoints" / BEST, out / BEST
    if step is not None:
        link(inner, Path(folder_of(out, step).name))
        link(outer, (folder_of(out, step) / "model").relative_to(out))
        return
    for place in (inner, outer):
        if place.is_symlink():
            place.unlink()


def watch_rewards(out: Path, equal: bool) -> str:
    """Call before a save; ``equal``: whether in a step since the last save all groups had equal rewards.

    If so, the newest checkpoint is kept until the first save without such a step before it. Returns a message when a
    checkpoint begins to be kept, else an empty string.
    """
    steps = kept(out)
    if not equal:
        keep(out, BEFORE_EQUAL, None)
        return ""
    found = list_checkpoints(out)
    if BEFORE_EQUAL in steps or not found:
        return ""
    keep(out, BEFORE_EQUAL, step_of(found[-1]))
    return f"all groups of a step had equal rewards; the checkpoint from before, {found[-1]}, is kept"


def rotate(out: Path, count: int) -> None:
    """Remove all but the last ``count`` checkpoints and those that are kept for a reason."""
    steps = set(kept(out).values())
    for old in list_checkpoints(out)[:-count]:
        if step_of(old) not in steps:
            dropped = old.with_name(f"{TEMPORARY}dropped-{old.name}")
            os.rename(old, dropped)  # if killed now, no partly deleted folder looks complete
            shutil.rmtree(dropped)


def set_aside(out: Path, after: int) -> list[Path]:
    """Rename the checkpoints of steps after ``after``, which will be repeated; returns their new paths."""
    moved = []
    for path in list_checkpoints(out):
        if step_of(path) > after:
            names = (f"{ASIDE}{path.name}" + (f"-{n}" if n else "") for n in range(10**6))
            to = next(place for name in names if not (place := path.with_name(name)).exists())
            os.rename(path, to)
            moved.append(to)
    for reason, step in kept(out).items():
        if step > after:
            keep(out, reason, None)
    return moved


def link(place: Path, target: Path) -> None:
    """Point the link ``place`` to a model; does nothing if links are not supported."""
    if place.exists() and not place.is_symlink():
        return
    temporary = place.with_name(f".{place.name}.link")
    with contextlib.suppress(OSError, NotImplementedError):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target, target_is_directory=True)
        os.replace(temporary, place)
