"""Checkpoints: written whole or not at all, the last few kept, and everything a run needs to go on bit for bit.

```
OUT/checkpoints/step-00000020/
    model/                  an ordinary Hugging Face folder
    optimizer.safetensors   weights as the optimizer holds them, and its moments (or DeepSpeed's own files)
    rank-0.json, rank-0.safetensors   data position and random states of each rank
    state.json              step, versions
OUT/model -> checkpoints/step-…/model
```

A checkpoint is written under a temporary name, flushed to the disk, and renamed: a process killed at any moment leaves
the last complete one. What the log says about later steps is cut off on resume, so no step is logged twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from fastrl.data.stream import RecordStream
    from fastrl.engine.base import Engine
    from fastrl.methods import Method
    from fastrl.models.load import Policy

VERSION = 1
_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".writing-"


class CheckpointError(RuntimeError):
    """A run folder or checkpoint that cannot be used."""


@dataclass
class RunState:
    """The parts of a run that a checkpoint holds."""

    policy: Policy
    engine: Engine
    stream: RecordStream
    rng: torch.Generator
    method: Method | None = None
    base: str = ""  # fingerprint of the weights the run began with: those of its reference, or under its adapters


def save_checkpoint(out: Path, step: int, run: RunState, *, keep: int) -> Path:
    """Write the checkpoint of ``step``, drop all but the last ``keep``, return its folder. Every rank calls this."""
    root = out / "checkpoints"
    folder, temporary = root / f"step-{step:08d}", root / f"{_TEMPORARY}{step:08d}"
    if folder.exists():
        return folder  # complete, by the way it got its name, and a step is the same however often it is reached
    first = run.engine.rank == 0
    run.engine.barrier()
    if first:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with _no_progress_bars():
            run.policy.save(temporary / "model")
    run.engine.barrier()
    _save_rank(temporary, run)
    if first or run.engine.world_size > 1:
        run.engine.save(temporary)
    run.engine.barrier()
    if first:
        state = {"version": VERSION, "step": step, "world_size": run.engine.world_size, "torch": str(torch.__version__)}
        (temporary / "state.json").write_text(json.dumps(state))
        _flush(temporary)
        os.rename(temporary, folder)
        _flush_directory(root)
        _link(out / "model", Path("checkpoints") / folder.name / "model")
        for old in list_checkpoints(out)[:-keep]:
            dropped = old.with_name(f"{_TEMPORARY}dropped-{old.name}")
            os.rename(old, dropped)  # a kill now leaves no half-deleted folder that looks complete
            shutil.rmtree(dropped)
    run.engine.barrier()
    return folder


def load_checkpoint(folder: Path, run: RunState) -> int:
    """Put a run back to where the checkpoint was written; returns its step.

    Raises:
        CheckpointError: not a complete checkpoint, another version, another number of ranks, or of a run that began
            with other weights.
        ValueError: other parameters or other data than those it was written with.
    """
    state = _read_json(folder / "state.json")
    if state.get("version") != VERSION:
        raise CheckpointError(f"{folder}: checkpoint version {state.get('version')!r}, this fastrl reads {VERSION}")
    if state["world_size"] != run.engine.world_size:
        raise CheckpointError(f"{folder}: written by {state['world_size']} ranks, this run has {run.engine.world_size}")
    run.engine.load(folder)
    _load_rank(folder, run)
    return int(state["step"])


def fingerprint(core: torch.nn.Module) -> str:
    """A hash of a few numbers of every weight, adapters left out, the same whether they are loaded in 16 or 32 bits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in core.named_parameters():
        if ".lora_" not in name:
            few = weight.detach().flatten()[:64].to(torch.bfloat16).view(torch.int16)
            digest.update(few.cpu().numpy().tobytes())
    return digest.hexdigest()


def list_checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    root = out / "checkpoints"
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def step_of(folder: Path) -> int:
    """The step a checkpoint folder's name says."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder}: not a checkpoint's name (step-00000020)")
    return int(match[1])


def latest_checkpoint(out: Path) -> Path | None:
    """The last complete checkpoint of a run, if there is one; what a killed process left half-written is removed."""
    for path in (out / "checkpoints").glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
    found = list_checkpoints(out)
    return found[-1] if found else None


def truncate_rows(path: Path, step: int) -> int:
    """Cut a JSONL log after its last row of a step up to ``step``; returns how many rows were cut.

    A half-written last line goes as well.
    """
    if not path.is_file():
        return 0
    end, position, cut = 0, 0, 0
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            try:
                row = json.loads(line)
                good = line.endswith(b"\n") and int(row["step"]) <= step
            except (ValueError, KeyError, TypeError):
                good = False
            if good and cut == 0:
                end = position
            else:
                cut += 1
    if cut:
        os.truncate(path, end)
    return cut


@contextlib.contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Hold a run folder for this process. Raises ``CheckpointError`` where another one trains in it."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: no lock, as on any other file there
        yield
        return
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"{out}: another process is training in this folder") from None
        yield  # released with the file, also by a kill


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Writing a model must not draw over the run's own display."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _save_rank(folder: Path, run: RunState) -> None:
    from safetensors.torch import save_file

    rank = run.engine.rank
    version, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=True)
    assert isinstance(legacy, tuple)
    name, array, *rest = legacy
    state = {
        "base": run.base,
        "stream": run.stream.state(),
        "python": [version, list(words), gauss],
        "numpy": [name, array.tolist(), *rest],
    }
    kept = run.method.state() if run.method is not None else {}
    if kept:
        state["method"] = kept
    (folder / f"rank-{rank}.json").write_text(json.dumps(state))
    tensors = {"torch": torch.get_rng_state(), "sampler": run.rng.get_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, folder / f"rank-{rank}.safetensors")


def _load_rank(folder: Path, run: RunState) -> None:
    from safetensors.torch import load_file

    rank = run.engine.rank
    state = _read_json(folder / f"rank-{rank}.json")
    if state.get("base", run.base) != run.base:
        raise CheckpointError(
            f"{folder}: the run began with other weights than the model it would go on with: model.path has to be that "
            "of the beginning (what was trained since is in the checkpoint)"
        )
    run.stream.load(state["stream"])
    if "method" in state and run.method is not None:
        run.method.load(state["method"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, array, *rest = state["numpy"]
    np.random.set_state((name, np.array(array, dtype=np.uint32), *rest))
    tensors = load_file(folder / f"rank-{rank}.safetensors")
    torch.set_rng_state(tensors["torch"])
    run.rng.set_state(tensors["sampler"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as a checkpoint's file: {error}") from None


def _link(link: Path, target: Path) -> None:
    """Point ``link`` at the newest model; where links are not allowed there is none."""
    if link.exists() and not link.is_symlink():
        return
    temporary = link.with_name(f".{link.name}.link")
    with contextlib.suppress(OSError, NotImplementedError):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target, target_is_directory=True)
        os.replace(temporary, link)


def _flush(folder: Path) -> None:
    """Everything below ``folder`` onto the disk."""
    for path, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(path, name), "rb") as file:
                os.fsync(file.fileno())
        _flush_directory(Path(path))


def _flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some file systems cannot flush a directory
    finally:
        os.close(descriptor)
