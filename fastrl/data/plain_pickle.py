"""Pickle files of plain data, read without running code from them.

A pickle is a program: it may name any function of the process and call it. Here none can be named, so that only what
the format itself builds is left: None, booleans, numbers, texts, bytes, lists, tuples, dictionaries (and sets, in newer
protocols). Before it is read, the file is looked through for numbers of memory cells that it does not fill, since one
instruction of five bytes could claim gigabytes; that takes some seconds for a file of RefCOCO's size.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from fastrl.data.validate import fail

MAX_BYTES = 1 << 29  # of a file; RefCOCO's largest has 32 MB


class _Refused(pickle.UnpicklingError):
    """The file names something other than plain data."""


class _PlainUnpickler(pickle.Unpickler):
    """Builds the format's own values and nothing else."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        """Refuse every name: a class or function, whatever it is."""
        raise _Refused(f"it names {module_name}.{global_name}")

    def persistent_load(self, pid: Any, /) -> NoReturn:
        """Refuse references to things outside the file."""
        raise _Refused("it refers to an object outside the file")


def _check_cells(data: bytes) -> None:
    """Refuse a memory cell ("memo") with a number above that of the instructions before it.

    Raises:
        ValueError: damaged data (``UnpicklingError`` for such a cell).
    """
    for number, (name, argument) in enumerate(_instructions(data), start=1):
        if name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= argument <= number:
            raise _Refused(f"instruction {number} fills memory cell {argument}")


def _instructions(data: bytes) -> Iterator[tuple[str, Any]]:
    """Name and argument of each instruction, none of which is carried out; of a Python 2 text no argument (the standard
    library's own reader takes ASCII alone)."""
    file, known = io.BytesIO(data), {code.code: code for code in pickletools.opcodes}
    while True:
        code = known.get(file.read(1).decode("latin-1"))
        if code is None:
            raise ValueError(f"no instruction at byte {file.tell() - 1}")
        if code.name == "STRING":
            file.readline()
        yield code.name, code.arg.reader(file) if code.arg is not None and code.name != "STRING" else None
        if code.name == "STOP":
            return


def read_plain_pickle(path: Path) -> Any:
    """The value in a pickle file of plain data; texts of Python 2 are read as UTF-8.

    Raises:
        DataError: there is no such file, it is too large or damaged, or it holds anything but plain data.
    """
    if not path.is_file():
        raise fail(str(path), "missing file", "no such file")
    if path.stat().st_size > MAX_BYTES:
        raise fail(str(path), "unreadable file", f"has {path.stat().st_size} bytes; a pickle of at most {MAX_BYTES}")
    try:
        data = path.read_bytes()
        _check_cells(data)
        return _PlainUnpickler(io.BytesIO(data), fix_imports=False, encoding="utf-8").load()
    except _Refused as error:
        message = f"{error}; only plain data is read from a pickle, since anything else could run code"
        raise fail(str(path), "unsafe pickle", message) from None
    except (  # what damaged or hostile bytes lead to
        *(pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError),
        *(OverflowError, MemoryError, RecursionError, OSError),
    ) as error:
        raise fail(
            str(path), "unreadable file", f"cannot be read as a pickle ({type(error).__name__}: {error})"
        ) from None
