"""Checks that a checkpoint is intact: the checksum of every file in ``state.json``, and that all files are readable."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

VERSION = 1
STATE = "state.json"
READERS = 4  # files read at once


class CheckpointError(RuntimeError):
    """A run folder or checkpoint that cannot be used."""


class Damaged(CheckpointError):
    """A file of a checkpoint is not as it was written; the message begins with its path."""


class Header(NamedTuple):
    """The contents of ``state.json``. ``checked``: it has checksums, and those of all files are correct."""

    step: int
    world_size: int
    checked: bool


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of every file below ``folder``, by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(READERS) as pool:
        digests = list(pool.map(_sha256, paths))
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }


def inspect(folder: Path, step: int) -> Header:
    """Check every file of the checkpoint of ``step``.

    Raises:
        Damaged: a file is missing, does not match its size or checksum, or is not valid JSON or safetensors; or the
            state belongs to another step.
        CheckpointError: the checkpoint has another version.
    """
    header = read_header(folder, step)
    listed = read_json(folder / STATE).get("files")
    if listed is not None:
        _check_sums(folder, listed)
    ranks = range(header.world_size)
    needed = ["model/config.json", *(f"rank-{rank}.{kind}" for rank in ranks for kind in ("json", "safetensors"))]
    if not (folder / "engine").is_dir():  # DeepSpeed's own files
        needed += ["optimizer.json", "optimizer.safetensors"]
    for name in needed:
        if not (folder / name).is_file():
            raise Damaged(f"{folder / name}: missing")
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            _load_json(path)
        elif path.suffix == ".safetensors":
            _open_tensors(path)
    return header


def read_header(folder: Path, step: int) -> Header:
    """Read ``state.json``. Raises like :func:`inspect`."""
    path = folder / STATE
    state = read_json(path)
    if state.get("version") != VERSION:
        raise CheckpointError(f"{path}: checkpoint version {state.get('version')!r}, this fastrl reads {VERSION}")
    for name in ("step", "world_size"):
        if not is_count(state.get(name)):
            raise Damaged(f"{path}: {name} is {state.get(name)!r}, not a count")
    if state["step"] != step:
        raise Damaged(f"{path}: has step {state['step']}, but its folder is {folder.name}")
    return Header(step, state["world_size"], "files" in state)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ``Damaged`` if the file is unreadable or has another JSON type."""
    value = _load_json(path)
    if not isinstance(value, dict):
        raise Damaged(f"{path}: expected an object, got {_kind(value)}")
    return value


def is_count(value: Any) -> bool:
    """Whether a JSON value is a non-negative integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_sums(folder: Path, listed: Any) -> None:
    if not isinstance(listed, dict) or not all(
        isinstance(entry, dict) and is_count(entry.get("bytes")) and isinstance(entry.get("sha256"), str)
        for entry in listed.values()
    ):
        raise Damaged(f"{folder / STATE}: its checksums are not readable")
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{path}: missing")
        if path.stat().st_size != entry["bytes"]:
            raise Damaged(f"{path}: damaged: {path.stat().st_size:,} bytes, {entry['bytes']:,} were written")
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(_sha256, [folder / name for name in listed])
        for (name, entry), digest in zip(listed.items(), found, strict=True):
            if digest != entry["sha256"]:
                raise Damaged(f"{folder / name}: damaged: its checksum is not the one in {STATE}")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Damaged(f"{path}: cannot be read ({error.strerror or error})") from None


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path}: not readable as JSON ({type(error).__name__}: {error})") from None


def _open_tensors(path: Path) -> None:
    """Read the header only, which determines the length of the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{path}: not readable as safetensors ({error})") from None


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
