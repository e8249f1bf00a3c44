"""Records from a function of a user's own: ``my_data.py:rows`` or ``package.module:rows``.

It is called as ``rows(path, **query)`` and yields ``Record`` objects, which are checked as those of the adapters are:
each is a record, no id comes twice, picture files are there and not too large, and the messages have a place for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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
    images = ImageFolder(Path(), reading(query, path))
    own = {key: value for key, value in query.items() if key not in READING}
    return collect(_checked(_called(function, name, path, own), name, images), None, path, images)


def _called(function: Callable[..., Any], name: str, path: str, query: Mapping[str, str]) -> Iterator[Any]:
    try:
        found = function(path, **query)
        if not isinstance(found, Iterable):
            raise fail(name, "bad adapter", f"must yield records, gave {short(found)}")
        yield from found
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
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
