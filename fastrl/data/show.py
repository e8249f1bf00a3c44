"""The contents of a data set, as text or JSON values."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrl.answers import format_answer
from fastrl.data import read_data
from fastrl.data.decodable import decoded
from fastrl.data.pictures import Picture
from fastrl.data.records import Dataset, Record
from fastrl.data.validate import DataError

SHOWN = 3  # records
LINES = 20  # lines of problems


def contents(spec: str, *, deep: bool = False) -> Dataset:
    """The data of a spec, including its bad rows. Raises ``DataError`` if there is nothing to show."""
    dataset = read_data(spec)
    return decoded(dataset) if deep else dataset


def drawn(dataset: Sequence[Record], seed: int = 0) -> list[Record]:
    """Three records drawn at random, in their order."""
    places = sorted(random.Random(seed).sample(range(len(dataset)), min(SHOWN, len(dataset))))
    return [dataset[place] for place in places]


def shown(dataset: Dataset, records: Sequence[Record]) -> dict[str, Any]:
    """``{n, bad, tasks, records}``: number of good and of bad rows, records by task, and a few records."""
    return {
        "n": len(dataset),
        "bad": len({problem.where for problem in dataset.problems}),
        "tasks": tasks(dataset),
        "records": [_plain_record(record) for record in records],
    }


def tasks(dataset: Dataset) -> dict[str, int]:
    """Number of records of each task, the most frequent first."""
    return dict(Counter(record.task for record in _light(dataset)).most_common())


def contents_text(dataset: Dataset, records: Sequence[Record]) -> str:
    """The same as text, with the problems of bad rows."""
    values = shown(dataset, records)
    counts = ", ".join(f"{task} {count}" for task, count in values["tasks"].items())
    lines = [f"{len(dataset)} records" + (f": {counts}" if counts else "")]
    if dataset.summary:
        lines.append(dataset.summary)
    if dataset.problems:
        lines += str(DataError(dataset.problems)).split("\n")[:LINES]
    for record in values["records"]:
        lines += ["", f"{record['id']} ({record['task']})"]
        lines += [f"  {message['role']}: {_words(message)}" for message in record["messages"]]
        lines += [f"  images: {', '.join(record['images'])}"] if record["images"] else []
        lines += [f"  {key}: {_short(value)}" for key, value in record["target"].items()]
    return "\n".join(lines)


def truth_text(record: Record) -> str:
    """A record's truth as an answer in its style (by default ``format_answer``'s), for comparison with answers; as JSON
    if it cannot be written as an answer."""
    view = record.views[0] if record.views else None
    style = (record.style,) if record.style else ()
    try:
        return format_answer(record.task, record.target, *style, view=view)
    except (ValueError, KeyError, IndexError, TypeError):  # a user's own task, or truth without an answer format
        return json.dumps(_plain(record.target), ensure_ascii=False) if record.target else ""


def _light(dataset: Dataset) -> Sequence[Record]:
    """The records to count by task; a single one if they are made on demand, as these have the same task."""
    if isinstance(dataset.records, list) or not len(dataset):
        return dataset
    return [dataset[0]] * len(dataset)


def _plain_record(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "task": record.task,
        "messages": [_plain(message) for message in record.messages],
        "images": [_image_name(image) for image in record.images],
        "target": _plain(record.target),
    }


def _image_name(image: Any) -> str:
    if isinstance(image, Path | str | Picture):
        return str(image)
    return f"{image.width}x{image.height} pixels in memory"


def _plain(value: Any) -> Any:
    """JSON values; named tuples become mappings, and other types their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())  # type: ignore[attr-defined]
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _words(message: Mapping[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in content)


def _short(value: Any, limit: int = 200) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
