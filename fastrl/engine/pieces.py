"""Checkpoints of sharded weights and moments: one safetensors file per rank, readable by any number of ranks.

```
engine/engine.json           number of ranks and of updates, the shape of every trained parameter, which have moments
engine/rank-N.safetensors    rank N's rows of every trained parameter (weight.NAME) and of its moments (state.KEY.NAME)
```

A tensor is cut along its first axis into pieces of equal length, the last ones shorter or empty, as torch's
``Shard(0)`` does. Another number of ranks cuts it elsewhere, so a rank reads the rows that it needs from the files that
have them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastrl.engine.ranks import Ranks

FOLDER = "engine"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Layout(NamedTuple):
    """The contents of ``engine.json``. ``moments``: the parameters that have some, with their number of updates."""

    ranks: int
    updates: int
    shapes: Mapping[str, Sequence[int]]
    moments: Mapping[str, int]


class Piece(NamedTuple):
    """One rank's rows of a parameter, and of its moments (none before its first update)."""

    weight: Tensor
    moments: Mapping[str, Tensor]


def rows_of(count: int, rank: int, ranks: int) -> tuple[int, int]:
    """First row, and the one after the last, that a rank holds of a tensor with ``count`` rows."""
    length = -(-count // ranks)
    return min(rank * length, count), min((rank + 1) * length, count)


def write_pieces(folder: Path, rank: int, pieces: Mapping[str, Piece]) -> None:
    """Write one rank's file."""
    from safetensors.torch import save_file

    tensors = {f"weight.{name}": piece.weight for name, piece in pieces.items()}
    tensors |= {f"state.{key}.{name}": part for name, piece in pieces.items() for key, part in piece.moments.items()}
    (folder / FOLDER).mkdir(exist_ok=True)
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, _file(folder, rank))


def write_layout(folder: Path, layout: Layout) -> None:
    """Write what the first rank knows of all."""
    (folder / FOLDER).mkdir(exist_ok=True)
    (folder / FOLDER / "engine.json").write_text(json.dumps(layout._asdict()))


def read_layout(folder: Path, shapes: Mapping[str, Sequence[int]]) -> Layout:
    """Read ``engine.json``.

    Args:
        shapes: of the parameters that are trained now.

    Raises:
        ValueError: the file cannot be read, or was written for other parameters; the message begins with its path.
    """
    path = folder / FOLDER / "engine.json"
    try:
        value = json.loads(path.read_text())
        layout = Layout(*(value[name] for name in Layout._fields))
        counts = [layout.ranks, layout.updates, *layout.moments.values()]
        good = layout.ranks > 0 and all(isinstance(count, int) and count >= 0 for count in counts)
        saved = {name: list(shape) for name, shape in layout.shapes.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
    if not good:
        raise ValueError(f"{path}: ranks, updates or moments are not counts")
    if odd := sorted(saved.keys() ^ shapes.keys()):
        raise ValueError(f"{path}: saved for other trainable parameters; {len(odd)} differ, the first: {odd[0]}")
    for name, shape in shapes.items():
        if saved[name] != list(shape):
            raise ValueError(f"{path}: {name} was saved with shape {saved[name]}, but is now {list(shape)}")
    return layout


def read_pieces(folder: Path, layout: Layout, rank: int, ranks: int) -> dict[str, Piece]:
    """The rows of every parameter that rank ``rank`` of ``ranks`` holds, float32.

    Raises:
        ValueError: a file is missing, damaged or incomplete; the message begins with its path.
    """
    with _Files(folder, layout) as files:
        return {
            name: Piece(
                files.rows(f"weight.{name}", name, rows_of(shape[0], rank, ranks)),
                {
                    key: files.rows(f"state.{key}.{name}", name, rows_of(shape[0], rank, ranks))
                    for key in (MOMENTS if name in layout.moments else ())
                },
            )
            for name, shape in layout.shapes.items()
        }


def read_together(folder: Path, shapes: Mapping[str, Sequence[int]], ranks: Ranks) -> tuple[Layout, dict[str, Piece]]:
    """The layout and this rank's rows of a checkpoint that all ranks read.

    Raises:
        ValueError: on all ranks, if one cannot read its rows; see :func:`read_layout` and :func:`read_pieces`.
    """
    fault, layout, pieces = "", None, {}
    try:
        layout = read_layout(folder, shapes)
        pieces = read_pieces(folder, layout, ranks.rank, ranks.world_size)
    except ValueError as error:
        fault = str(error)
    for found in ranks.gather(fault):
        if found:
            raise ValueError(found)
    assert layout is not None
    return layout, pieces


class _Files:
    """The files of all ranks that wrote a checkpoint, opened when they are read."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout
        self._open: dict[int, Any] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)

    def rows(self, key: str, name: str, wanted: tuple[int, int]) -> Tensor:
        """Rows ``wanted`` of a tensor that is like the parameter ``name``."""
        shape = self.layout.shapes[name]
        parts = [self._part(rank, key, shape, *rows) for rank, *rows in self._holders(shape[0], wanted)]
        return torch.cat(parts) if parts else torch.empty(0, *shape[1:])

    def _holders(self, count: int, wanted: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
        """(rank, first, last) of the wanted rows that each file has, counted from the file's own first row."""
        for rank in range(self.layout.ranks):
            start, stop = rows_of(count, rank, self.layout.ranks)
            first, last = max(start, wanted[0]), min(stop, wanted[1])
            if first < last:
                yield rank, first - start, last - start

    def _part(self, rank: int, key: str, shape: Sequence[int], first: int, last: int) -> Tensor:
        from safetensors import SafetensorError, safe_open

        path = _file(self.folder, rank)
        try:
            if rank not in self._open:
                self._open[rank] = safe_open(path, "pt").__enter__()
            found = self._open[rank].get_slice(key)
            start, stop = rows_of(shape[0], rank, self.layout.ranks)
            if found.get_shape() != [stop - start, *shape[1:]] or found.get_dtype() != "F32":
                raise ValueError(f"{key} is {found.get_dtype()} of shape {found.get_shape()}, not float32 rows of it")
            return found[first:last]
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None


def _file(folder: Path, rank: int) -> Path:
    return folder / FOLDER / f"rank-{rank}.safetensors"
