"""Damaged DeepSpeed checkpoints: a one-line error with the file, before DeepSpeed ignores the damage or raises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.engine.shards import MODEL, Expected, fault

SHAPES = {"a.weight": (4, 3), "a.bias": (4,)}
KNOWN = frozenset({*SHAPES, "frozen.weight", "a.mean"})
FLAT = Expected(SHAPES, KNOWN, list(SHAPES.values()), [8])
WHOLE = Expected(SHAPES, KNOWN, list(SHAPES.values()), None)
SHARD = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def moments(*shape: int) -> dict[str, Any]:
    return {"step": torch.tensor(2.0), "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}


def model(zero: bool) -> dict[str, Any]:
    state: dict[str, Any] = {"module": {name: torch.zeros(shape) for name, shape in SHAPES.items()}, "updates": 2}
    if not zero:
        state["moments"] = 2
        state["optimizer"] = {"state": {0: moments(4, 3), 1: moments(4)}, "param_groups": []}
    return state


def shard() -> dict[str, Any]:
    inner = {"single_partition_of_fp32_groups": [torch.zeros(8)], "base_optimizer_state": {"state": {0: moments(8)}}}
    return {"optimizer_state_dict": inner}


def written(folder: Path, zero: bool, change: Callable[[dict[str, Any]], object] = lambda files: None) -> Path:
    """Both ranks' files; ``change`` gets their contents by name, or removes one."""
    files: dict[str, Any] = {MODEL: model(zero)}
    if zero:
        files |= {SHARD.format(rank): shard() for rank in range(2)}
    change(files)
    for name, value in files.items():
        if isinstance(value, bytes):
            (folder / name).write_bytes(value)
        else:
            torch.save(value, folder / name)
    return folder


def test_sound_files_are_sound(tmp_path: Path) -> None:
    for zero, expected in ((True, FLAT), (False, WHOLE)):
        folder = tmp_path / str(zero)
        folder.mkdir()
        assert [fault(written(folder, zero), rank, 2, expected) for rank in range(2)] == [None, None]
    # as written by a version without the number of moments
    assert fault(written(tmp_path, False, lambda files: files[MODEL].pop("moments")), 0, 1, WHOLE) is None


ZERO: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda f: f.pop(MODEL), "mp_rank_00_model_states.pt: missing"),
    (
        lambda f: f.pop(SHARD.format(1)),
        "zero_pp_rank_1_mp_rank_00_optim_states.pt: missing; it has the moments of rank 1",
    ),
    (lambda f: f.update({MODEL: b"no pickle"}), "model_states.pt: cannot be read (UnpicklingError: "),
    (lambda f: f.update({MODEL: b""}), "model_states.pt: cannot be read (EOFError: "),
    (lambda f: f.update({MODEL: b"PK\x03\x04 cut"}), "model_states.pt: cannot be read ("),
    (lambda f: f.update({MODEL: [1]}), "model_states.pt: expected a dictionary, got list"),
    (lambda f: f[MODEL].pop("updates"), "updates is None, not a count"),
    (lambda f: f[MODEL].update(updates=True), "updates is True, not a count"),
    (lambda f: f[MODEL].update(updates="2"), "updates is '2', not a count"),
    (lambda f: f[MODEL].update(module=[1]), "has no weights"),
    (lambda f: f[MODEL]["module"].pop("a.bias"), "1 differ, the first: a.bias"),
    (lambda f: f[MODEL]["module"].update(b=torch.zeros(1)), "1 differ, the first: b"),
    (
        lambda f: f[MODEL]["module"].update({"a.bias": torch.zeros(5)}),
        "a.bias was saved with shape [5], but is now [4]",
    ),
    (lambda f: f.update({SHARD.format(0): b"x"}), "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt: cannot be read"),
    (lambda f: f[SHARD.format(0)].clear(), "does not have the weights of 1 parameter groups"),
    (
        lambda f: f[SHARD.format(0)]["optimizer_state_dict"].pop("base_optimizer_state"),
        "the moments of parameter group 0 are missing",
    ),
    (
        lambda f: f[SHARD.format(0)]["optimizer_state_dict"]["base_optimizer_state"]["state"][0].pop("exp_avg_sq"),
        "the moments of parameter group 0 are missing",
    ),
    (
        lambda f: f[SHARD.format(0)]["optimizer_state_dict"]["base_optimizer_state"]["state"].update({0: moments(9)}),
        "exp_avg of parameter group 0 was saved with shape [9], but is now [8]",
    ),
    (
        lambda f: f[SHARD.format(0)]["optimizer_state_dict"].update(single_partition_of_fp32_groups=[torch.ones(3)]),
        "the piece of parameter group 0 was saved with shape [3], but is now [8]",
    ),
]
ALONE: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda f: f[MODEL].pop("optimizer"), "the moments of 2 parameters are missing"),
    (lambda f: f[MODEL]["optimizer"]["state"].clear(), "the moments of 2 parameters are missing"),
    (lambda f: f[MODEL]["optimizer"]["state"].pop(1), "the moments of 1 parameters are missing"),
    (lambda f: f[MODEL]["optimizer"]["state"].update({7: moments(1)}), "has moments of parameter 7; allowed: 0 to 1"),
    (lambda f: f[MODEL]["optimizer"]["state"][1].pop("exp_avg"), "the moments of parameter 1 are missing"),
    (
        lambda f: f[MODEL]["optimizer"]["state"].update({1: moments(5)}),
        "parameter 1 was saved with shape [5], but is now [4]",
    ),
]


@pytest.mark.parametrize(("change", "message"), ZERO)
def test_damage_with_zero_is_one_line(tmp_path: Path, change: Any, message: str) -> None:
    check(fault(written(tmp_path, True, change), 0, 2, FLAT), tmp_path, message)


@pytest.mark.parametrize(("change", "message"), ALONE)
def test_damage_without_zero_is_one_line(tmp_path: Path, change: Any, message: str) -> None:
    check(fault(written(tmp_path, False, change), 0, 1, WHOLE), tmp_path, message)


def check(found: str | None, folder: Path, message: str) -> None:
    assert found is not None
    assert message in found
    assert found.startswith(f"{folder}/")
    assert "\n" not in found
