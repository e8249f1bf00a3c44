"""Checkpoints: written atomically, the last few kept, with everything that a bitwise identical continuation needs.

```
OUT/checkpoints/step-00000020/
    model/                  a standard Hugging Face folder, adapters merged in
    adapter/                only the adapters, in peft's format (with model.lora)
    optimizer.safetensors   the optimizer's copy of the weights, and its moments (or DeepSpeed's own files)
    rank-0.json, rank-0.safetensors   data position and random states of each rank
    data.json               identity of the data (fastrl.data.identity)
    state.json              step, versions, the checksum of every other file
OUT/model -> checkpoints/step-…/model, OUT/adapter
```

A checkpoint is written under a temporary name, flushed to disk, and renamed: a process killed at any time leaves the
last complete one. ``keeping`` decides which ones are kept; ``integrity`` checks that one is complete.
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
    """A part of a run with state to save in checkpoints."""

    def state(self) -> dict[str, Any]:
        """JSON-serialisable state for :meth:`load`; empty if there is none."""
        ...

    def load(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class RunState:
    """The parts of a run that a checkpoint contains."""

    policy: Policy
    engine: Engine
    stream: RecordStream
    rng: torch.Generator
    method: Method | None = None
    # fingerprint of the weights that the run started with: those of its reference, or under its adapters
    base: str = ""
    evaluation: Keeps | None = None


class Loaded(NamedTuple):
    """The step of a loaded checkpoint, and notes for the user."""

    step: int
    notes: list[str]


def save_checkpoint(out: Path, step: int, run: RunState, *, keep: int) -> Path:
    """Write the checkpoint of ``step``, remove those that are not kept, and return its folder. Every rank calls this.

    Raises:
        CheckpointError: it does not fit on the disk (checked before anything is written), or cannot be written; earlier
            checkpoints are kept, and nothing of this one remains.
    """
    root = out / "checkpoints"
    folder, temporary = folder_of(out, step), root / f"{TEMPORARY}{step:08d}"
    if folder.exists():
        return folder  # complete, as only complete ones get their name, and repeating a step gives the same result
    first = run.engine.rank == 0
    needed = bytes_needed(run)

    def begin() -> None:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        require_space(folder, needed)
        temporary.mkdir()
        run.policy.save(temporary / "model")
        if run.policy.peft is not None:
            run.policy.save_adapter(temporary / "adapter")
        (temporary / DATA).write_text(json.dumps(run.stream.identity().plain()))

    def finish() -> None:
        state = {"version": VERSION, "step": step, "world_size": run.engine.world_size, "torch": str(torch.__version__)}
        (temporary / STATE).write_text(json.dumps({**state, "files": checksums(temporary)}))
        _flush(temporary)
        os.rename(temporary, folder)
        _flush_directory(root)
        for name in ("model", "adapter"):
            if (folder / name).is_dir():
                link(out / name, Path("checkpoints") / folder.name / name)

    try:
        _on_all_ranks(run.engine, begin if first else None)
        _on_all_ranks(run.engine, lambda: _save_rank(temporary, run))
        _on_all_ranks(run.engine, lambda: run.engine.save(temporary) if first or run.engine.world_size > 1 else None)
        _on_all_ranks(run.engine, finish if first else None)
    except _WriteError as error:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        earlier = list_checkpoints(out)
        stays = f"the last checkpoint, {earlier[-1].name}, is kept" if earlier else "there is no earlier checkpoint"
        raise CheckpointError(f"{folder}: not written: {error}; {sizes(folder, needed)}; {stays}") from error
    try:
        _on_all_ranks(run.engine, (lambda: rotate(out, keep)) if first else None)
    except _WriteError as error:
        raise CheckpointError(f"{folder}: written, but no older checkpoint could be removed: {error}") from error
    return folder


def bookmark(run: RunState) -> Callable[[], None]:
    """Returns a function that restores data position, random states and the method's state to their current values."""
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
    """Approximate size of a checkpoint in bytes."""
    return run.policy.saved_bytes + run.engine.saved_bytes()


def load_checkpoint(
    folder: Path, run: RunState, *, accept_changed_data: bool = False, accept_gone_rows: bool = False
) -> Loaded:
    """Restore a run from a checkpoint.

    Args:
        folder: a checkpoint whose files were checked (``fastrl.run.integrity.inspect``).
        run: a run of the same recipe.
        accept_changed_data: continue with changed data.
        accept_gone_rows: continue if rows are gone and nothing else differs.

    Raises:
        CheckpointError: the checkpoint is incomplete, has another version, or a number of ranks from which this run
            cannot continue, or belongs to a run that started with other weights.
        ValueError: the parameters or the data differ from those of the checkpoint.
    """
    header = read_header(folder, step_of(folder))
    here, ranks = run.engine.world_size, header.world_size
    if ranks != here and not run.engine.any_ranks:
        raise CheckpointError(
            f"{folder}: written by {ranks} ranks, but this run has {here} (only fsdp2 and zero_stage 3 continue so)"
        )
    notes = [] if header.checked else [f"{folder} has no checksums (an older version): its files were not verified"]
    if ranks == here:
        state = _read_rank(folder, run, run.engine.rank)
    else:
        state = _read_others(folder, run, ranks)
        notes.append(
            f"{folder} was written by {ranks} ranks, now {here}: answers are sampled with other random numbers"
        )
    change = _load_position(folder, state, run, accept_changed_data, accept_gone_rows)
    if change:
        notes.append(f"continuing with changed data: {change}")
    run.engine.load(folder)
    _load_parts(folder, state, run)
    if ranks == here:
        _load_random(folder, state, run)
    else:
        _new_random(run, header.step)
    return Loaded(header.step, notes)


def fingerprint(core: torch.nn.Module) -> str:
    """A hash of a few numbers of every weight except adapters, the same for weights loaded in 16 and 32 bits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in core.named_parameters():
        if ".lora_" not in name:
            few = weight.detach().flatten()[:64].to(torch.bfloat16).view(torch.int16)
            digest.update(few.cpu().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Lock a run folder for this process. Raises ``CheckpointError`` if another process trains in it."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: no lock
        yield
        return
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"{out}: another process is training in this folder") from None
        yield  # the lock is released with the file, even if the process is killed


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


def _read_others(folder: Path, run: RunState, ranks: int) -> dict[str, Any]:
    """What this rank goes on with of a checkpoint by another number of ranks."""
    states = [_read_rank(folder, run, rank) for rank in range(ranks)]
    if any(state.get("method", {}).get("steps_left") for state in states):
        raise CheckpointError(
            f"{folder}: each of its {ranks} ranks has answers for its own next steps, so it is only continued by "
            f"{ranks} ranks; or take a checkpoint before the next sampling (--from-step)"
        )
    try:
        position = run.stream.merged([state["stream"] for state in states])
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return {**states[0], "stream": position}


def _read_rank(folder: Path, run: RunState, rank: int) -> dict[str, Any]:
    """A rank's JSON, its parts of the right types."""
    path = folder / f"rank-{rank}.json"
    state = read_json(path)
    for name, kind in (("stream", dict), ("python", list), ("numpy", list)):
        if not isinstance(state.get(name), kind):
            raise Damaged(f"{path}: {name} is missing or of the wrong type")
    if state.get("base", run.base) != run.base:
        raise CheckpointError(
            f"{folder}: the run started with other weights than those of model.path: set model.path to the model that "
            "the run started with (the trained weights are in the checkpoint)"
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
        raise DataChanged(f"{error}. Restore it, or continue with --accept-changed-data") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / f'rank-{run.engine.rank}.json'}: {error}") from None


def _new_random(run: RunState, step: int) -> None:
    """Random states after a change of the number of ranks: those of no step before, and different on every rank."""
    seed = (run.rng.initial_seed() + 1_000_003 * step) % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    run.rng.manual_seed(seed)


def _load_parts(folder: Path, state: dict[str, Any], run: RunState) -> None:
    """The states of the method and of evaluations."""
    path = folder / f"rank-{run.engine.rank}.json"
    if "method" in state and run.method is not None:
        with _usable(path, "the method's state"):
            run.method.load(state["method"])
    if "evaluation" in state and run.evaluation is not None:
        with _usable(path, "the state of evaluations"):
            run.evaluation.load(state["evaluation"])


def _load_random(folder: Path, state: dict[str, Any], run: RunState) -> None:
    from safetensors.torch import load_file

    path = folder / f"rank-{run.engine.rank}.json"
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
    """Turn any error while values of a file are used into a one-line error that names the file."""
    from safetensors import SafetensorError

    wrong = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError, SafetensorError)
    try:
        yield
    except wrong as error:
        raise Damaged(f"{path}: {what} cannot be used ({type(error).__name__}: {error})") from None


class _WriteError(RuntimeError):
    """A write failed on this or another rank."""


def _on_all_ranks(engine: Engine, work: Callable[[], object] | None) -> None:
    """Do the work and wait for the other ranks; if it fails on one rank it fails on all."""
    from safetensors import SafetensorError

    failed: Exception | None = None
    if work is not None:
        try:
            work()
        except (OSError, SafetensorError, RuntimeError) as error:  # types by which libraries report a full disk
            failed = error
    if engine.maximum(float(failed is not None)) > 0:
        if isinstance(failed, OSError) and failed.strerror:
            raise _WriteError(failed.strerror if failed.filename is None else f"{failed.filename}: {failed.strerror}")
        raise _WriteError(str(failed) if failed is not None else "another rank could not write its part") from failed


def _flush(folder: Path) -> None:
    """Flush everything below ``folder`` to disk."""
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
