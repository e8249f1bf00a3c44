"""Pickle files of plain data, read without running code from them.

A pickle is a program: it may name any function of the process and call it. Here none can be named, and what is left
must be what JSON has as well: None, booleans, numbers, texts, lists and dictionaries (and bytes). A few bytes could
still claim gigabytes or hours: by the number of a memory cell, by tuples within tuples as a key (whose hash visits each
of them), by lists that hold the same list twice again and again. So the file's instructions are looked through before
it is read, and its value afterwards; that takes some seconds for a file of RefCOCO's size.
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
DEEPEST = 32  # lists and dictionaries within each other
_ENDS = ("GLOBAL", "STACK_GLOBAL", "INST")  # name something, which is refused: nothing after them is carried out
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")


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


def _check_instructions(data: bytes) -> None:
    """Refuse tuples, and a memory cell ("memo") with a number above that of the instructions before it.

    Raises:
        ValueError: damaged data.
        pickle.UnpicklingError: a tuple or such a cell.
    """
    for number, (name, argument) in enumerate(_instructions(data), start=1):
        if name in _ENDS:
            return
        if name in _TUPLES:
            raise _Refused(f"instruction {number} makes a tuple")
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


def _check_value(value: Any, most: int) -> None:
    """Refuse a value that is no plain data, whose lists and dictionaries are nested more than ``DEEPEST`` deep, or
    which written out has more than ``most`` entries.

    Raises:
        pickle.UnpicklingError: such a value.
    """
    seen, waiting = 0, [(value, 0)]
    while waiting:
        each, depth = waiting.pop()
        seen += 1
        if isinstance(each, list | dict):
            inside = [*each, *each.values()] if isinstance(each, dict) else each
            if depth == DEEPEST:
                raise _Refused(f"its lists are nested more than {DEEPEST} deep")
            if seen + len(waiting) + len(inside) > most:
                raise _Refused("its lists hold the same lists too often")
            waiting += [(entry, depth + 1) for entry in inside]
        elif isinstance(each, int) and each.bit_length() > 64:
            raise _Refused(f"it holds an integer of {each.bit_length()} bits")
        elif not isinstance(each, bool | int | float | str | bytes | None):
            raise _Refused(f"it holds a {type(each).__name__}")


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
        _check_instructions(data)
        value = _PlainUnpickler(io.BytesIO(data), fix_imports=False, encoding="utf-8").load()
        _check_value(value, most=len(data))  # each entry has an instruction of its own, unless it is repeated
        return value
    except _Refused as error:
        message = (
            f"{error}; only plain data is read from a pickle, since anything else could run code or fill the memory"
        )
        raise fail(str(path), "unsafe pickle", message) from None
    except (  # what damaged or hostile bytes lead to
        *(pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError),
        *(OverflowError, MemoryError, RecursionError, OSError),
    ) as error:
        raise fail(
            str(path), "unreadable file", f"cannot be read as a pickle ({type(error).__name__}: {error})"
        ) from None
