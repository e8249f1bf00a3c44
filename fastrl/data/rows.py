"""Row files → records: reading, ordering and limiting, for all adapters of row files.

A row file is JSONL, a JSON list of objects, or a table (Parquet, Arrow, a folder of the ``datasets`` library).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastrl.data.pictures import MAX_PIXELS
from fastrl.data.records import Dataset, Record
from fastrl.data.tables import is_table, table_rows
from fastrl.data.validate import ImageFolder, Problem, Reading, Row, fail, find_image_folder, short

READING = ("orient", "max_image_pixels", "pictures")  # query keys of every adapter that opens picture files
KEYS = ("images", "split", "limit", "seed", *READING)  # query keys every row adapter takes
IMAGE_FIELDS = ("image", "image_path", "file_name")
PICTURES = ("image", "images", "binary")  # columns that may contain pictures as well as file names
LOOKED_AT = 64  # rows of a file that is not held in memory, from whose image names the folder is found
T = TypeVar("T")


class LeftOut(NamedTuple):
    """The reason why a valid row has nothing to train on."""

    kind: str
    message: str


Build = Callable[[Row], Record | LeftOut | None]
Result = Record | list[Problem] | tuple[Problem, ...]  # a record, the problems of a bad row, or why a row is left out


def int_option(query: Mapping[str, str], key: str, where: str, minimum: int = 0) -> int | None:
    """The integer value of a query key, or None if it is not given. Raises ``DataError``."""
    if key not in query:
        return None
    try:
        value = int(query[key])
    except ValueError:
        value = None
    if value is None or value < minimum:
        raise fail(where, "bad option", f"{key} must be an integer of at least {minimum}, got {short(query[key])}")
    return value


def choice_option(query: Mapping[str, str], key: str, allowed: Sequence[str], where: str) -> str:
    """The value of a query key among ``allowed``; default the first of them. Raises ``DataError``."""
    value = query.get(key, allowed[0])
    if value not in allowed:
        raise fail(where, "bad option", f"{key} must be one of {', '.join(allowed)}, got {short(value)}")
    return value


def reading(query: Mapping[str, str], where: str) -> Reading:
    """How to read pictures, from ``orient``, ``max_image_pixels`` and ``pictures``. Raises ``DataError``."""
    turned = choice_option(query, "orient", ("stored", "exif"), where) == "exif"
    stated = choice_option(query, "pictures", ("files", "stated"), where) == "stated"
    return Reading(turned, int_option(query, "max_image_pixels", where, 1) or MAX_PIXELS, stated)


def ordered(items: Sequence[T], seed: int | None) -> list[T]:
    """``items`` in their own order, or shuffled with ``seed``."""
    result = list(items)
    if seed is not None:
        random.Random(seed).shuffle(result)
    return result


def read_text(path: Path) -> str:
    """The text of a UTF-8 file (with or without byte order mark). Raises ``DataError``."""
    return "".join(text_lines(path))


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file (with or without byte order mark), each with its end as a newline, read when they are
    asked for. Raises ``DataError``."""
    if not path.exists():
        raise fail(str(path), "missing file", "no such file or folder")
    if path.is_dir():
        raise fail(str(path), "missing file", "is a folder; expected a file")
    try:
        with path.open(encoding="utf-8-sig", errors="strict") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise fail(str(path), "unreadable file", f"cannot be read as UTF-8 text ({error})") from None


def parse_json(text: str, where: str) -> Any:
    """The JSON value of ``text``, or a ``Problem``. NaN and Infinity are accepted, so that the row's checks name
    them."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        return Problem(where, "bad text", "contains half of a surrogate pair (an escape like \\ud800)")
    except RecursionError:
        return Problem(where, "unreadable JSON", "unreadable JSON: nested too deeply")
    except ValueError as error:
        return Problem(where, "unreadable JSON", f"unreadable JSON: {error}")


def read_rows(path: Path, split: str | None = None) -> Iterator[tuple[int, str, Mapping[str, Any] | Problem]]:
    """(line from 0, ``file:line`` from 1, fields or problem) of each row; blank lines are ignored.

    ``split`` selects a split of a table.
    """
    if is_table(path):
        yield from table_rows(path, split)
        return
    if split is not None:
        raise fail(str(path), "bad option", "split is for tables (Parquet, Arrow, folders of the datasets library)")
    lines = text_lines(path)
    first = next((line for line in lines if line.strip()), "") if path.suffix == ".json" else ""
    if first.lstrip().startswith("["):
        values = parse_json(first + "".join(lines), str(path))
        if isinstance(values, Problem):
            yield 0, str(path), values
            return
        rows = [(i, f"{path}:row {i + 1}", value) for i, value in enumerate(values)]
    else:
        # A file's lines, unlike those of splitlines(), do not end at characters that JSON strings may contain.
        numbered = ((i, f"{path}:{i + 1}", line) for i, line in enumerate(text_lines(path)) if line.strip())
        rows = ((i, where, parse_json(line.removesuffix("\n"), where)) for i, where, line in numbered)
    for number, where, value in rows:
        if not isinstance(value, Mapping | Problem):
            value = Problem(where, "wrong type", f"a row must be a JSON object, got {short(value)}")
        yield number, where, value


Rows = Sequence[tuple[int, str, Mapping[str, Any] | Problem]]  # as ``read_rows`` gives them


def load_rows(path: str, query: Mapping[str, str], build: Build, given: Rows | None = None) -> Dataset:
    """Read a row file (or take its rows as ``given``) and turn each row into a record with ``build``.

    ``build`` returns a record, ``LeftOut``, or None after noting problems on the row. ``seed`` shuffles; ``limit``
    stops after that many records, without checking the remaining rows.
    """
    file = Path(path)
    limit, seed, split = int_option(query, "limit", path, 1), int_option(query, "seed", path), query.get("split")
    table = given is None and is_table(file)
    streamed = table or (given is None and seed is None)
    known = given if given is not None else list(islice(read_rows(file, split), LOOKED_AT if streamed else None))
    names = (row.get(name, "") for _, _, row in known if isinstance(row, Mapping) for name in IMAGE_FIELDS)
    folder = Path(query["images"]) if "images" in query else find_image_folder(file, names)
    images = ImageFolder(folder, reading(query, path))
    if not folder.is_dir() and not images.reading.stated:
        raise fail(path, "missing file", f"images folder not found: {folder}")
    if not streamed:
        return collect((_build(*row, images, build) for row in ordered(known, seed)), limit, path, images)
    # Read in order, one row at a time; a table, whose pictures are read with it, is shuffled afterwards.
    results = (_build(*row, images, build) for row in read_rows(file, split))
    whole = collect(results, limit if seed is None else None, path, images)
    return Dataset(ordered(whole.records, seed)[:limit], whole.problems, whole.left_out, whole.notes)


def _build(number: int, where: str, fields: Mapping[str, Any] | Problem, images: ImageFolder, build: Build) -> Result:
    if isinstance(fields, Problem):
        return [fields]
    row = Row(fields, where, number, images)
    result = build(row)
    if row.problems:
        return row.problems
    if isinstance(result, LeftOut):
        return (Problem(where, *result),)  # a tuple: left out, not wrong
    if result is None:
        raise AssertionError(f"adapter gave neither a record nor a reason for {where}")
    kept = {name: value for name, value in fields.items() if name not in PICTURES}
    return replace(result, source=where, columns=kept)


def collect(results: Iterator[Result], limit: int | None, path: str, images: ImageFolder) -> Dataset:
    """Records and problems of a stream of results, up to ``limit`` records. A second record of one id is a problem.

    What ``images`` came to know of pictures while the results were made is noted.
    """
    records: list[Record] = []
    problems: list[Problem] = []
    left_out: list[Problem] = []
    seen: dict[str, str] = {}
    for result in results:
        if isinstance(result, list):
            problems += result
        elif isinstance(result, tuple):
            left_out += result
        elif result.id in seen:
            message = f"id {short(result.id)} is already the id of {seen[result.id]}"
            problems.append(Problem(result.source, "duplicate id", message))
        else:
            seen[result.id] = result.source
            records.append(result)
            if len(records) == limit:
                break
    if not (records or problems or left_out):
        raise fail(path, "empty file", "holds no rows")
    return Dataset(records, problems, left_out, exif_note(images, path))


def exif_note(images: ImageFolder, path: str) -> list[Problem]:
    """A note on pictures whose EXIF tags were not followed while rows did not show whether they are to be."""
    if not images.unheeded:
        return []
    first, count = images.unheeded[0], len(set(images.unheeded))
    others = f" and {count - 1} more have" if count > 1 else " has"
    message = (
        f"{first}{others} an EXIF tag that turns the picture, and the rows do not show whether boxes heed it: pixels "
        "and truth are taken as stored (orient=exif reads them turned)"
    )
    return [Problem(path, "EXIF tag not followed", message)]
