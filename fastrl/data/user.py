"""Records from a function of a user's own: ``my_data.py:rows`` or ``package.module:rows``, or one that is registered.

It is called as ``rows(path, **query)`` (a registered one as ``load(path, query)``) and yields ``Record`` objects, which
are checked as those of the adapters are: each is a record, no id comes twice, picture files are there and not too
large, and the messages have a place for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastrl.config.usercode import UserCodeError, load_function, where_it_raised
from fastrl.data.records import Dataset, Record
from fastrl.data.rows import READING, Result, collect, reading
from fastrl.data.validate import ImageFolder, Problem, fail, short


def load(name: str, path: str, query: Mapping[str, str]) -> Dataset:
    """The records that the function ``name`` yields. Raises ``DataError``, also for what the function raises."""
    try:
        function = load_function(name)
    except UserCodeError as error:
        raise fail(name, "bad adapter", str(error)) from None
    own = {key: value for key, value in query.items() if key not in READING}
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
        if not isinstance(found, Iterable):
            raise fail(name, "bad adapter", f"must yield records, gave {short(found)}")
        yield from found


@contextmanager
def _located(name: str) -> Iterator[None]:
    """Inside: what a user's code raises becomes a ``DataError`` that says where; one of our own stays as it is."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith("fastrl."):
            raise
        raise fail(name, "bad adapter", f"{where_it_raised(error)}{type(error).__name__}: {error}") from error


def _checked(found: Iterator[Any], name: str, images: ImageFolder) -> Iterator[Result]:
    for number, record in enumerate(found):
        where = f"{name}:record {number}"
        if not isinstance(record, Record):
            raise fail(where, "bad adapter", f"must be a fastrl.data.Record, got {short(record)}")
        record = replace(record, source=record.source or where)
        problems = list(_problems(record, images))
        pictures = tuple(images.picture(Path(i)) if isinstance(i, str | Path) else i for i in record.images)
        yield problems or replace(record, images=pictures)


def _problems(record: Record, images: ImageFolder) -> Iterator[Problem]:
    if not isinstance(record.id, str) or not record.id or not isinstance(record.target, Mapping):
        yield Problem(record.source, "wrong type", "a record needs an id, a non-empty string, and a target, a mapping")
        return
    for image in record.images:
        path = isinstance(image, str | Path)
        header = images.header(Path(image)) if path else images.check(image, record.source)
        if isinstance(header, str):
            yield Problem(record.source, "missing image" if "not found" in header else "bad image", header)
    parts = [part for message in record.messages for part in _parts(message)]
    places = sum(part.get("type") == "image" for part in parts)
    if places != len(record.images):
        message = f"{len(record.images)} images, but the messages have {places} image places"
        yield Problem(record.source, "image places", message)


def _parts(message: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    content = message["content"]
    return () if isinstance(content, str) else content
