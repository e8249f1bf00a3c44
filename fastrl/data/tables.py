"""Parquet and Arrow files as rows: read in order, a few rows at a time; pictures are read again when needed.

A table is a ``.parquet`` or ``.arrow`` file, a folder of such files, or a folder saved by the ``datasets`` library
(with ``split`` if it has several). Pictures are not kept in memory: a record refers to its place in the table.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastrl.data.pictures import base64_picture
from fastrl.data.validate import TableRow, fail, nearest, short

SUFFIXES = (".parquet", ".arrow")
BATCH = 64  # rows in memory at once while a table is read
CACHE_BYTES = 256 << 20  # size of the cache of row groups from which pictures are read again


def is_table(path: Path) -> bool:
    """Whether a path is a Parquet or Arrow file, or a folder of such."""
    if path.is_dir():
        return (path / "dataset_dict.json").is_file() or any(_files(path))
    return path.suffix in SUFFIXES


def table_rows(path: Path, split: str | None = None) -> Iterator[tuple[int, str, TableRow]]:
    """(number from 0, ``file:row`` from 1, columns) of each row.

    Raises:
        DataError: a file is damaged or missing, no split is chosen of several, or pyarrow is not installed.
    """
    number = 0
    for file in table_files(path, split):
        table = _open(file)
        for place, fields in enumerate(table.rows()):
            row = TableRow(fields)
            row.file, row.cell = file, _Cell(table, place)
            yield number, f"{file}:row {place + 1}", row
            number += 1


def table_files(path: Path, split: str | None = None) -> list[Path]:
    """The files of a table, in order. Raises ``DataError``."""
    if not path.is_dir():
        if not path.is_file():
            raise fail(str(path), "missing file", "no such file or folder")
        return [path]
    splits = _splits(path)
    if split is not None and split not in splits:
        raise fail(str(path), "bad option", f"no split {short(split)}{nearest(split, splits)}")
    if split is None and len(splits) > 1:
        raise fail(str(path), "bad option", f"holds the splits {', '.join(splits)}: choose with split=")
    return splits[split if split is not None else next(iter(splits))]


def _splits(folder: Path) -> dict[str, list[Path]]:
    """Files by split: the folders of a saved ``DatasetDict``, or file names without ``-00000-of-00002``."""
    listed = folder / "dataset_dict.json"
    if listed.is_file():
        names = json.loads(listed.read_text(encoding="utf-8"))["splits"]
        return {name: _files(folder / name) for name in names}
    files = _files(folder)
    if (folder / "state.json").is_file():  # one saved data set
        return {"train": files}
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(file.stem.split("-")[0], []).append(file)
    return splits


def _files(folder: Path) -> list[Path]:
    """Table files of a folder, or of its folder ``data`` as on the Hugging Face hub."""
    state = folder / "state.json"
    if state.is_file():
        return [folder / entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    found = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)
    data = folder / "data"
    return found or (sorted(p for p in data.iterdir() if p.suffix in SUFFIXES) if data.is_dir() else [])


class _Cell:
    """The place of one row in a table."""

    def __init__(self, table: _Parquet | _Arrow, place: int) -> None:
        self._table, self._place = table, place

    def __call__(self, column: str, index: int | None) -> Callable[[], bytes]:
        def read() -> bytes:
            value = self._table.value(column, self._place)
            value = value if index is None else value[index]
            value = value["bytes"] if isinstance(value, dict) else value
            return (base64_picture(value) or b"") if isinstance(value, str) else value

        return read


def _open(file: Path) -> _Parquet | _Arrow:
    try:
        import pyarrow
    except ModuleNotFoundError:
        message = "reading Parquet and Arrow files needs pyarrow: pip install 'fastrl[data]'"
        raise fail(str(file), "missing package", message) from None
    try:
        return _Parquet(file) if file.suffix == ".parquet" else _Arrow(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise fail(str(file), "unreadable file", f"cannot be read as a table ({error})") from None


class _Parquet:
    """A Parquet file. Pictures are read again by whole row groups, of which the last few are cached."""

    def __init__(self, file: Path) -> None:
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(file)
        metadata = self._file.metadata
        self._starts = [0]
        for group in range(metadata.num_row_groups):
            self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
        self._kept: OrderedDict[tuple[int, str], Any] = OrderedDict()
        self._lock = threading.Lock()  # pictures are fetched from several threads

    def rows(self) -> Iterator[dict[str, Any]]:
        with self._lock:
            batches = self._file.iter_batches(batch_size=BATCH)
        for batch in batches:
            yield from batch.to_pylist()

    def value(self, column: str, place: int) -> Any:
        from bisect import bisect_right

        group = bisect_right(self._starts, place) - 1
        with self._lock:
            key = (group, column)
            found = self._kept.get(key)
            if found is None:
                found = self._file.read_row_group(group, columns=[column]).column(0)
                self._kept[key] = found
                held = sum(each.nbytes for each in self._kept.values())
                while held > CACHE_BYTES and len(self._kept) > 1:
                    held -= self._kept.popitem(last=False)[1].nbytes
            self._kept.move_to_end(key)
        return found[place - self._starts[group]].as_py()


class _Arrow:
    """An Arrow file or stream, mapped into memory."""

    def __init__(self, file: Path) -> None:
        import pyarrow as pa

        source = pa.memory_map(str(file))
        try:
            self._table = pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            self._table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()

    def rows(self) -> Iterator[dict[str, Any]]:
        for batch in self._table.to_batches(max_chunksize=BATCH):
            yield from batch.to_pylist()

    def value(self, column: str, place: int) -> Any:
        return self._table.column(column)[place].as_py()
