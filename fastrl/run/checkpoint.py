"""Checkpoints: written whole or not at all, the last few kept, and everything a run needs to go on bit for bit.

```
OUT/checkpoints/step-00000020/
    model/                  an ordinary Hugging Face folder
    optimizer.safetensors   weights as the optimizer holds them, and its moments (or DeepSpeed's own files)
    rank-0.json, rank-0.safetensors   data position and random states of each rank
    data.json               what the data was (fastrl.data.identity)
    state.json              step, versions, the checksum of every other file
OUT/model -> checkpoints/step-…/model
```

A checkpoint is written under a temporary name, flushed to the disk, and renamed: a process killed at any moment leaves
the last complete one. Which ones stay: ``keeping``; whether one is whole: ``integrity``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from fastrl.data.disk import require_space, sizes
from fastrl.data.identity import Change, read_identity
from fastrl.data.stream import DataChanged, RecordStream
from fastrl.run.integrity import STATE, VERSION, CheckpointError, Damaged, checksums, read_header, read_json
from fastrl.run.keeping import TEMPORARY, folder_of, link, list_checkpoints, rotate, step_of

if TYPE_CHECKING:
    from fastrl.engine.base import Engine
    from fastrl.methods import Method
    from fastrl.models.load import Policy

DATA = "data.json"


class Keeps(Protocol):
    """A part of a run that knows something between steps."""

    def state(self) -> dict[str, Any]:
        """What :meth:`load` needs, as JSON has it; empty: nothing."""
        ...

    def load(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class RunState:
    """The parts of a run that a checkpoint holds."""

    policy: Policy
    engine: Engine
    stream: RecordStream
    rng: torch.Generator
    method: Method | None = None
    base: str = ""  # fingerprint of the weights the run began with: those of its reference, or under its adapters
    evaluation: Keeps | None = None


class Loaded(NamedTuple):
    """What was loaded: the checkpoint's step, and what a user should know about it."""

    step: int
    notes: list[str]


def save_checkpoint(out: Path, step: int, run: RunState, *, keep: int) -> Path:
    """Write the checkpoint of ``step``, drop those that are not kept, return its folder. Every rank calls this.

    Raises:
        CheckpointError: it does not fit on the disk (seen before anything is written), or cannot be written; earlier
            checkpoints stay, and nothing of this one is left.
    """
    root = out / "checkpoints"
    folder, temporary = folder_of(out, step), root / f"{TEMPORARY}{step:08d}"
    if folder.exists():
        return folder  # complete, by the way it got its name, and a step is the same however often it is reached
    first = run.engine.rank == 0
    needed = bytes_needed(run)

    def begin() -> None:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        require_space(folder, needed)
        temporary.mkdir()
        with _no_progress_bars():
            run.policy.save(temporary / "model")
        (temporary / DATA).write_text(json.dumps(run.stream.identity().plain()))

    def finish() -> None:
        state = {"version": VERSION, "step": step, "world_size": run.engine.world_size, "torch": str(torch.__version__)}
        (temporary / STATE).write_text(json.dumps({**state, "files": checksums(temporary)}))
        _flush(temporary)
        os.rename(temporary, folder)
        _flush_directory(root)
        link(out / "model", Path("checkpoints") / folder.name / "model")

    try:
        _on_all_ranks(run.engine, begin if first else None)
        _on_all_ranks(run.engine, lambda: _save_rank(temporary, run))
        _on_all_ranks(run.engine, lambda: run.engine.save(temporary) if first or run.engine.world_size > 1 else None)
        _on_all_ranks(run.engine, finish if first else None)
    except _WriteError as error:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        earlier = list_checkpoints(out)
        stays = f"the last checkpoint, {earlier[-1].name}, stays" if earlier else "there is no earlier checkpoint"
        raise CheckpointError(f"{folder}: not written: {error}; {sizes(folder, needed)}; {stays}") from error
    try:
        _on_all_ranks(run.engine, (lambda: rotate(out, keep)) if first else None)
    except _WriteError as error:
        raise CheckpointError(f"{folder}: written, but no older checkpoint could be removed: {error}") from error
    return folder


def bookmark(run: RunState) -> Callable[[], None]:
    """What puts data position, random states and what the method keeps back to where they are now."""
    stream, kept = run.stream.state(), run.method.state() if run.method is not None else {}
    python, legacy, generator, sampler = (
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
        run.rng.get_state(),
    )
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def go_back() -> None:
        run.stream.load(stream, run.stream.identity())
        if kept and run.method is not None:
            run.method.load(kept)
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(generator)
        run.rng.set_state(sampler)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)

    return go_back


def bytes_needed(run: RunState) -> int:
    """About how many bytes a checkpoint takes on the disk."""
    return sum(p.numel() * p.element_size() for p in run.policy.core.parameters()) + run.engine.saved_bytes()


def load_checkpoint(
    folder: Path, run: RunState, *, accept_changed_data: bool = False, accept_gone_rows: bool = False
) -> Loaded:
    """Put a run back to where the checkpoint was written.

    Args:
        folder: of a checkpoint whose files were checked (``fastrl.run.integrity.inspect``).
        run: of the same recipe.
        accept_changed_data: go on with other data; accept_gone_rows: where rows are gone and nothing else differs.

    Raises:
        CheckpointError: not a complete checkpoint, another version, another number of ranks, or of a run that began
            with other weights.
        ValueError: other parameters or other data than those it was written with.
    """
    header = read_header(folder, step_of(folder))
    if header.world_size != run.engine.world_size:
        raise CheckpointError(f"{folder}: written by {header.world_size} ranks, this run has {run.engine.world_size}")
    notes = [] if header.checked else [f"{folder} is older than checksums: its files were not compared with any"]
    state = _read_rank(folder, run)
    change = _load_position(folder, state, run, accept_changed_data, accept_gone_rows)
    if change:
        notes.append(f"going on with other data than before: {change}")
    run.engine.load(folder)
    _load_rank(folder, state, run)
    return Loaded(header.step, notes)


def fingerprint(core: torch.nn.Module) -> str:
    """A hash of a few numbers of every weight, adapters left out, the same whether they are loaded in 16 or 32 bits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in core.named_parameters():
        if ".lora_" not in name:
            few = weight.detach().flatten()[:64].to(torch.bfloat16).view(torch.int16)
            digest.update(few.cpu().numpy().tobytes())
    return digest.hexdigest()


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
    for part, kept in (("method", run.method), ("evaluation", run.evaluation)):
        if kept is not None and (found := kept.state()):
            state[part] = found
    (folder / f"rank-{rank}.json").write_text(json.dumps(state))
    tensors = {"torch": torch.get_rng_state(), "sampler": run.rng.get_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, folder / f"rank-{rank}.safetensors")


def _read_rank(folder: Path, run: RunState) -> dict[str, Any]:
    """A rank's JSON, its parts of the right types."""
    path = folder / f"rank-{run.engine.rank}.json"
    state = read_json(path)
    for name, kind in (("stream", dict), ("python", list), ("numpy", list)):
        if not isinstance(state.get(name), kind):
            raise Damaged(f"{path}: {name} is missing or of the wrong type")
    if state.get("base", run.base) != run.base:
        raise CheckpointError(
            f"{folder}: the run began with other weights than the model it would go on with: model.path has to be that "
            "of the beginning (what was trained since is in the checkpoint)"
        )
    return state


def _load_position(
    folder: Path, state: dict[str, Any], run: RunState, accept: bool, accept_gone: bool
) -> Change | None:
    path = folder / DATA
    before = None
    if path.is_file():
        try:
            before = read_identity(read_json(path))
        except ValueError as error:
            raise Damaged(f"{path}: {error}") from None
    try:
        return run.stream.load(state["stream"], before, accept=accept, accept_gone=accept_gone)
    except DataChanged as error:
        raise DataChanged(f"{error}. Restore it, or go on with it by --accept-changed-data") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / f'rank-{run.engine.rank}.json'}: {error}") from None


def _load_rank(folder: Path, state: dict[str, Any], run: RunState) -> None:
    from safetensors.torch import load_file

    path = folder / f"rank-{run.engine.rank}.json"
    if "method" in state and run.method is not None:
        with _usable(path, "what the method kept"):
            run.method.load(state["method"])
    if "evaluation" in state and run.evaluation is not None:
        with _usable(path, "what evaluations found"):
            run.evaluation.load(state["evaluation"])
    with _usable(path, "the random state of Python"):
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
    with _usable(path, "the random state of NumPy"):
        name, array, *rest = state["numpy"]
        np.random.set_state((name, np.array(array, dtype=np.uint32), *rest))
    path = path.with_suffix(".safetensors")
    with _usable(path, "the random state of torch"):
        tensors = load_file(path)
        torch.set_rng_state(tensors["torch"])
        run.rng.set_state(tensors["sampler"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])


@contextlib.contextmanager
def _usable(path: Path, what: str) -> Iterator[None]:
    """Inside: values of a file are put to use; whatever is wrong with them is one line with the file."""
    from safetensors import SafetensorError

    wrong = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError, SafetensorError)
    try:
        yield
    except wrong as error:
        raise Damaged(f"{path}: {what} cannot be used ({type(error).__name__}: {error})") from None


class _WriteError(RuntimeError):
    """Something could not be written, here or on another rank."""


def _on_all_ranks(engine: Engine, work: Callable[[], object] | None) -> None:
    """Do the work and wait for the others'. Where it fails on one rank it fails on all."""
    from safetensors import SafetensorError

    failed: Exception | None = None
    if work is not None:
        try:
            work()
        except (OSError, SafetensorError, RuntimeError) as error:  # as which libraries report a disk that is full
            failed = error
    if engine.maximum(float(failed is not None)) > 0:
        if isinstance(failed, OSError) and failed.strerror:
            raise _WriteError(failed.strerror if failed.filename is None else f"{failed.filename}: {failed.strerror}")
        raise _WriteError(str(failed) if failed is not None else "another rank could not write its part") from failed


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
