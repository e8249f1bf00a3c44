"""Checks of a DeepSpeed checkpoint's files before DeepSpeed reads them.

DeepSpeed silently skips missing weights and moments, and a damaged file raises on one rank only, while the others wait.
A checkpoint's folder holds ``mp_rank_00_model_states.pt`` (the trained weights; without ZeRO the moments too) and, with
ZeRO, ``…zero_pp_rank_N_mp_rank_00_optim_states.pt`` of each rank.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MODEL = "mp_rank_00_model_states.pt"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Expected(NamedTuple):
    """Names and shapes in the engine that will load a checkpoint."""

    shapes: Mapping[str, Sequence[int]]  # of the trained parameters, by name
    known: frozenset[str]  # names of all of the model's weights and buffers
    ordered: Sequence[Sequence[int]]  # the same shapes, in the order of the optimizer's groups
    parts: Sequence[int] | None  # with ZeRO: elements of each parameter group that this rank updates


def fault(folder: Path, rank: int, world_size: int, expected: Expected) -> str | None:
    """Why a rank cannot load its part of the checkpoint in ``folder``: one line that begins with the file, or None."""
    try:
        model = _read(folder / MODEL)
        updates = _check_model(folder / MODEL, model, expected)
        if expected.parts is None:
            _check_moments(folder / MODEL, model, updates, expected.ordered)
        else:
            files = [_shard(folder, each) for each in range(world_size)]
            _check_parts(files[rank], _read(files[rank]), updates, expected.parts)
    except _Unusable as error:
        return str(error)
    return None


class _Unusable(ValueError):
    pass


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise _Unusable(f"{path}: missing")
    try:  # with the options DeepSpeed uses; tensors stay on disk
        value = torch.load(path, map_location="cpu", weights_only=False, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise _Unusable(f"{path}: cannot be read ({type(error).__name__}: {reason})") from None
    if not isinstance(value, Mapping):
        raise _Unusable(f"{path}: expected a dictionary, got {type(value).__name__}")
    return value


def _shard(folder: Path, rank: int) -> Path:
    name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    found = sorted(folder.glob(f"*{name}"))
    if not found:
        raise _Unusable(f"{folder / name}: missing; it has the moments of rank {rank}")
    return found[0]


def _check_model(path: Path, state: Mapping[str, Any], expected: Expected) -> int:
    """Return the number of updates. Raises if the weights are not those of the trained parameters."""
    weights, updates = state.get("module"), state.get("updates")
    if not isinstance(updates, int) or isinstance(updates, bool) or updates < 0:
        raise _Unusable(f"{path}: updates is {updates!r:.60}, not a count")
    if not isinstance(weights, Mapping) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise _Unusable(f"{path}: has no weights")
    odd = sorted((expected.shapes.keys() - weights.keys()) | (weights.keys() - expected.known))
    if odd:
        raise _Unusable(f"{path}: saved for other trainable parameters; {len(odd)} differ, the first: {odd[0]}")
    for name, shape in expected.shapes.items():
        _check_shape(path, name, weights[name], shape)
    return updates


def _check_moments(path: Path, state: Mapping[str, Any], updates: int, shapes: Sequence[Sequence[int]]) -> None:
    """Without ZeRO: the moments of each parameter that ever had a gradient."""
    optimizer = state.get("optimizer")
    inner = optimizer.get("optimizer_state_dict", optimizer) if isinstance(optimizer, Mapping) else None
    found = inner.get("state") if isinstance(inner, Mapping) else None
    had = state.get("moments", 1)  # parameters with moments; missing in older checkpoints
    if not isinstance(found, Mapping) or (updates and len(found) < had):
        missing = had - len(found) if isinstance(found, Mapping) and "moments" in state else len(shapes)
        raise _Unusable(f"{path}: the moments of {missing} parameters are missing")
    for place, entry in found.items():
        if not isinstance(place, int) or not 0 <= place < len(shapes):
            raise _Unusable(f"{path}: has moments of parameter {place!r:.60}; allowed: 0 to {len(shapes) - 1}")
        _check_entry(path, f"of parameter {place}", entry, shapes[place])


def _check_parts(path: Path, shard: Mapping[str, Any], updates: int, parts: Sequence[int]) -> None:
    """With ZeRO: a flat piece of each parameter group, and its moments."""
    state = shard.get("optimizer_state_dict")
    held = state.get("single_partition_of_fp32_groups") if isinstance(state, Mapping) else None
    if not isinstance(state, Mapping) or not isinstance(held, Sequence) or len(held) != len(parts):
        raise _Unusable(f"{path}: does not have the weights of {len(parts)} parameter groups")
    base = state.get("base_optimizer_state")
    found = base.get("state") if isinstance(base, Mapping) else None
    for place, (piece, numel) in enumerate(zip(held, parts, strict=True)):
        what = f"of parameter group {place}"
        _check_shape(path, f"the piece {what}", piece, (numel,))
        if not updates:
            continue
        if not isinstance(found, Mapping) or place not in found:
            raise _Unusable(f"{path}: the moments {what} are missing")
        _check_entry(path, what, found[place], (numel,))


def _check_entry(path: Path, what: str, entry: Any, shape: Sequence[int]) -> None:
    for name in MOMENTS:
        if not isinstance(entry, Mapping) or name not in entry:
            raise _Unusable(f"{path}: the moments {what} are missing")
        _check_shape(path, f"{name} {what}", entry[name], shape)


def _check_shape(path: Path, what: str, value: Any, shape: Sequence[int]) -> None:
    found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if found != list(shape):
        raise _Unusable(f"{path}: {what} was saved with shape {found}, but is now {list(shape)}")
