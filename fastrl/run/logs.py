"""A run's logs with one JSON row per line: reading them, and truncating them to a step while reporting lost rows."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from fastrl.data.disk import replace_file, writing


class Appended:
    """A file to which pieces are appended atomically. It is created by the first one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None

    def write(self, text: str) -> None:
        """Append. Raises ``OSError`` with the path and the bytes needed, in which case nothing is appended."""
        data = text.encode("utf-8")
        with writing(self.path, len(data)):
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)
            end = os.fstat(self._file.fileno()).st_size
            left = memoryview(data)
            try:
                while left:
                    left = left[self._file.write(left) :]
            except OSError:
                with contextlib.suppress(OSError):  # only regular files can be truncated
                    os.ftruncate(self._file.fileno(), end)
                raise

    def sync(self) -> None:
        """Flush to the disk."""
        if self._file is not None:
            with writing(self.path, 0):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Cut(NamedTuple):
    """The result of :func:`cut_rows`: number of removed rows of later steps, and of lines moved to ``bad``."""

    later: int
    unreadable: int
    bad: Path

    def __str__(self) -> str:
        parts = []
        if self.later:
            parts.append(f"{_count(self.later, 'row')} of steps that are done again cut from {self.bad.stem}")
        if self.unreadable:
            lines = _count(self.unreadable, "line")
            parts.append(f"{lines} of {self.bad.stem} that cannot be read as a row set aside in {self.bad}")
        return "; ".join(parts)


def scan(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """(number from 1, line, row) of each non-blank line; row None: the line is not an object with a step."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line, _row(line)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a log, without a last line that is still being written. Raises ``ValueError`` for other invalid lines."""
    rows = []
    for number, line, row in scan(path):
        if row is not None:
            rows.append(row)
        elif line.endswith(b"\n"):
            raise ValueError(f"{path}:{number}: not a row of a run's log: {line[:60].decode('utf-8', 'replace')!r}")
    return rows


def read_anyhow(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Every JSON object in a log, and the number of other lines."""
    rows, others = [], 0
    with path.open("rb") as file:
        for line in filter(bytes.strip, file):
            value = _parsed(line)
            others += not isinstance(value, dict)
            if isinstance(value, dict):
                rows.append(value)
    return rows, others


def cut_rows(path: Path, step: int) -> Cut:
    """Keep a log's rows of steps up to ``step``, in order. Lines that are not rows are moved to ``NAME.jsonl.bad``."""
    bad = path.with_name(f"{path.name}.bad")
    if not path.is_file():
        return Cut(0, 0, bad)
    good: list[bytes] = []
    broken: list[bytes] = []
    later = 0
    for _, line, row in scan(path):
        line = line if line.endswith(b"\n") else line + b"\n"
        if row is None:
            broken.append(line)
        elif row["step"] <= step:
            good.append(line)
        else:
            later += 1
    if broken:
        _append(bad, b"".join(broken))
    if later or broken:
        replace_file(path, b"".join(good))
    return Cut(later, len(broken), bad)


def steps_without_row(path: Path, done: int) -> int:
    """The number of the first ``done`` steps that have no row in a log; all, if there is no log."""
    rows = scan(path) if path.is_file() else ()
    return done - len({row["step"] for _, _, row in rows if row is not None and 1 <= row["step"] <= done})


def has_rows(path: Path) -> bool:
    """Whether a log is not empty."""
    return path.is_file() and path.stat().st_size > 0


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _row(line: bytes) -> dict[str, Any] | None:
    row = _parsed(line)
    return row if isinstance(row, dict) and is_step(row.get("step")) else None


def is_step(value: Any) -> bool:
    """Whether a JSON value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def _append(path: Path, data: bytes) -> None:
    with writing(path, len(data)), path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
