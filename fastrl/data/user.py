"""Records from a function of a user's own: ``my_data.py:rows`` or ``package.module:rows``, or one that is registered.

It is called as ``rows(path, **query)`` (a registered one as ``load(path, query)``) and yields ``Record`` objects, which
are checked as those of the adapters are: each is a record, no id comes twice, picture files are there and not too
large, and what ``made`` checks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastrl.config.usercode import UserCodeError, load_function, same_folder, where_it_raised
from fastrl.data.made import problems_of
from fastrl.data.records import Dataset, Record
from fastrl.data.rows import READING, Result, collect, reading
from fastrl.data.validate import ImageFolder, fail, short


def load(name: str, path: str, query: Mapping[str, str]) -> Dataset:
    """The records that the function ``name`` yields. Raises ``DataError``, also for what the function raises."""
    try:
        function = load_function(name)
    except UserCodeError as error:
        raise fail(name, "bad adapter", str(error)) from None
    own = {key: value for key, value in query.items() if key not in READING}
    try:
        inspect.signature(function).bind(path, **own)
    except TypeError as error:
        raise fail(name, "bad adapter", f"is called as {name.rpartition(':')[2]}(path, **query): {error}") from None
    except ValueError:  # of no Python function
        pass
    return _collected(_called(lambda: function(path, **own), name), name, path, query)


def load_registered(
    function: Callable[[str, dict[str, str]], Iterable[Record]], name: str, path: str, query: Mapping[str, str]
) -> Dataset:
    """The records of a registered adapter. Raises ``DataError``, also for what it raises."""
    own = {key: value for key, value in query.items() if key not in READING}
    with _located(name):
        found = function(path, own)
    if isinstance(found, Dataset):
        return found
    if isinstance(found, Sequence) and not isinstance(found, list | tuple | str):
        return Dataset(found)  # makes its records when they are asked for: looking at them would make them all
    return _collected(_called(lambda: found, name), name, path, query)


def _collected(found: Iterator[Any], name: str, path: str, query: Mapping[str, str]) -> Dataset:
    images = ImageFolder(Path(), reading(query, path))
    return collect(_checked(found, name, images), None, path, images)


def _called(call: Callable[[], Any], name: str) -> Iterator[Any]:
    with _located(name):
        found = call()
        if not isinstance(found, Iterable) and not hasattr(found, "__getitem__"):
            raise fail(name, "bad adapter", f"must yield records, gave {short(found)}")
        yield from found


@contextmanager
def _located(name: str) -> Iterator[None]:
    """Inside: what a user's code raises becomes a ``DataError`` that says where; one of our own stays as it is."""
    try:
        with same_folder():
            yield
    except UserCodeError as error:
        raise fail(name, "bad adapter", str(error)) from None
    except (Exception, SystemExit) as error:
        if type(error).__module__.startswith("fastrl."):
            raise
        raise fail(name, "bad adapter", f"{where_it_raised(error)}{type(error).__name__}: {error}") from error


def _checked(found: Iterator[Any], name: str, images: ImageFolder) -> Iterator[Result]:
    for number, record in enumerate(found):
        where = f"{name}:record {number}"
        if not isinstance(record, Record):
            raise fail(where, "bad adapter", f"must be a fastrl.data.Record, got {short(record)}")
        record = replace(record, source=record.source or where)
        problems = problems_of(record, images, record.source)
        if problems:
            yield problems
            continue
        pictures = tuple(images.picture(Path(i)) if isinstance(i, str | Path) else i for i in record.images)
        yield replace(record, images=pictures, messages=tuple(record.messages))
