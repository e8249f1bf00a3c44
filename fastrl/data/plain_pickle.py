"""Pickle files of plain data, read without running code from them.

A pickle is a program: it may name any function of the process and call it. Here none can be named, so that only what
the format itself builds is left: None, booleans, numbers, texts, bytes, lists, tuples, dictionaries (and sets, in newer
protocols). A hostile file can at worst be refused, or cost the memory that it claims.
"""

from __future__ import annotations

import pickle
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
        with path.open("rb") as file:
            return _PlainUnpickler(file, fix_imports=False, encoding="utf-8").load()
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
