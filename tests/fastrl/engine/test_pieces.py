"""Sharded checkpoints: read by another number of ranks, and damage that is one line with the file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastrl.engine.pieces import (
    MOMENTS,
    Layout,
    Piece,
    read_layout,
    read_pieces,
    read_together,
    rows_of,
    write_layout,
    write_pieces,
)

SHAPES = {"wide": [7, 3], "bias": [5], "few": [1, 4]}


def whole() -> dict[str, dict[str, Tensor]]:
    """The weight and moments of each parameter; ``few`` was never updated."""
    rng = torch.Generator().manual_seed(0)
    keys = {"wide": ("weight", *MOMENTS), "bias": ("weight", *MOMENTS), "few": ("weight",)}
    return {name: {key: torch.randn(SHAPES[name], generator=rng) for key in keys[name]} for name in SHAPES}


def written(folder: Path, ranks: int) -> Path:
    for rank in range(ranks):
        cut = {}
        for name, parts in whole().items():
            rows = slice(*rows_of(SHAPES[name][0], rank, ranks))
            cut[name] = Piece(parts["weight"][rows], {key: parts[key][rows] for key in MOMENTS if key in parts})
        write_pieces(folder, rank, cut)
    write_layout(folder, Layout(ranks, 4, SHAPES, {"wide": 4, "bias": 3}))
    return folder


@pytest.mark.parametrize("before", [1, 2, 3, 8])
@pytest.mark.parametrize("now", [1, 2, 5])
def test_any_number_of_ranks_reads_the_same_bits(tmp_path: Path, before: int, now: int) -> None:
    layout = read_layout(written(tmp_path, before), SHAPES)
    assert (layout.updates, layout.moments) == (4, {"wide": 4, "bias": 3})
    ranks = [read_pieces(tmp_path, layout, rank, now) for rank in range(now)]
    for name, parts in whole().items():
        assert torch.equal(torch.cat([pieces[name].weight for pieces in ranks]), parts["weight"])
        for key in MOMENTS:
            found = [pieces[name].moments[key] for pieces in ranks if key in pieces[name].moments]
            assert len(found) == (now if key in parts else 0)
            if found:
                assert torch.equal(torch.cat(found), parts[key])


def test_rows_are_cut_as_torch_does() -> None:
    for count in (1, 4, 7, 9):
        for ranks in (1, 2, 3, 8):
            expected = [len(part) for part in torch.arange(count).chunk(ranks)]
            expected += [0] * (ranks - len(expected))
            assert [stop - start for start, stop in (rows_of(count, r, ranks) for r in range(ranks))] == expected


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


LAYOUTS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda v: v.pop("moments"), "engine.json: cannot be read (KeyError: 'moments')"),
    (lambda v: v.update(ranks=0), "engine.json: ranks, updates or moments are not counts"),
    (lambda v: v.update(updates=-1), "engine.json: ranks, updates or moments are not counts"),
    (lambda v: v.update(ranks="2"), "engine.json: cannot be read (TypeError: "),
    (lambda v: v["shapes"].pop("few"), "saved for other trainable parameters; 1 differ, the first: few"),
    (lambda v: v["shapes"].update(bias=[6]), "bias was saved with shape [6], but is now [5]"),
]


@pytest.mark.parametrize(("change", "message"), LAYOUTS)
def test_a_layout_that_does_not_fit_is_one_line(tmp_path: Path, change: Any, message: str) -> None:
    changed(written(tmp_path, 2) / "engine" / "engine.json", change)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_layout(tmp_path, SHAPES)
    assert str(error.value).startswith(f"{tmp_path}/engine/engine.json: ")


def drop(path: Path) -> None:
    tensors = load_file(path)
    del tensors["state.exp_avg.wide"]
    save_file(tensors, path)


def shorten(path: Path) -> None:
    save_file(load_file(path) | {"weight.wide": torch.zeros(2, 3)}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read ("),
        (drop, "state.exp_avg.wide"),
        (shorten, "weight.wide is F32 of shape [2, 3], not float32 rows of it"),
    ],
)
def test_a_damaged_piece_is_one_line(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    path = written(tmp_path, 2) / "engine" / "rank-1.safetensors"
    damage(path)
    layout = read_layout(tmp_path, SHAPES)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_pieces(tmp_path, layout, 0, 1)
    assert str(error.value).startswith(f"{path}: cannot be read (")
    assert "\n" not in str(error.value)


def test_a_piece_that_one_rank_cannot_read_is_an_error_on_all(tmp_path: Path) -> None:
    """Of two ranks, as they meet in the gathering: the first reads its rows, and is told of the second's file."""
    path = written(tmp_path, 2) / "engine" / "rank-1.safetensors"
    path.unlink()
    heard: list[str] = []

    def gather(fault: str) -> list[str]:
        heard.append(fault)
        return ["", heard[0]]

    for rank in (1, 0):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_together(tmp_path, SHAPES, SimpleNamespace(rank=rank, world_size=2, gather=gather))  # type: ignore[arg-type]
    assert heard[1] == ""
    written(tmp_path, 2)
    ranks: Any = SimpleNamespace(rank=0, world_size=2, gather=lambda fault: [fault, ""])
    layout, pieces = read_together(tmp_path, SHAPES, ranks)
    assert layout.updates == 4
    assert torch.equal(pieces["bias"].weight, whole()["bias"]["weight"][:3])
