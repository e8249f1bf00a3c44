"""The identity of a data set (ids in order, truths, messages, pictures), by which a resumed run detects changes.

Each record has three digests: of its ``target`` (with task and frame), its ``messages`` and its ``pictures``. A picture
file is identified by name, size and modification time (``stat``), or by name and content (``bytes``, which reads every
picture once); a picture in memory by its pixels. Of records made on demand (scenes), which come from a seed and not
from a file, up to 32 spread over the data are digested.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastrl.data.blank import BlankImages
from fastrl.data.clips import ClipRecords
from fastrl.data.mixture import Mixture
from fastrl.data.pictures import Picture
from fastrl.data.records import Dataset, Record

PARTS = ("target", "messages", "pictures")
SAMPLED = 32  # records digested of data made on demand
SHOWN = 3  # ids named for each kind of change
Pictures = Literal["stat", "bytes"]


@dataclass(frozen=True)
class Identity:
    """``digests[part][i]`` belongs to the record ``ids[i]``. ``count``: number of records, more than ids if they are
    made on demand. ``pictures``: how picture files are identified."""

    count: int
    ids: list[str]
    digests: dict[str, list[str]]
    pictures: Pictures

    @property
    def whole(self) -> bool:
        """Whether every record was digested."""
        return len(self.ids) == self.count

    def plain(self) -> dict[str, Any]:
        """As JSON values; :func:`read_identity` reads them."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Change:
    """What differs between two data sets. ``gone`` and ``new`` are ids, ``changed`` ids by part."""

    counts: tuple[int, int]
    gone: list[str]
    new: list[str]
    moved: bool
    changed: dict[str, list[str]]
    note: str = ""  # other differences

    def __bool__(self) -> bool:
        return self.counts[0] != self.counts[1] or any((self.gone, self.new, self.moved, self.changed, self.note))

    @property
    def only_gone(self) -> bool:
        """Whether rows are missing and nothing else differs."""
        return bool(self.gone) and not (self.new or self.moved or self.changed or self.note)

    def __str__(self) -> str:
        parts = []
        if self.counts[0] != self.counts[1]:
            parts.append(f"{self.counts[1]} records where there were {self.counts[0]}")
        parts += [f"{what} {_named(ids)}" for what, ids in (("gone:", self.gone), ("new:", self.new)) if ids]
        if self.moved:
            parts.append("the records are in another order")
        parts += [f"other {part} of {_named(ids)}" for part, ids in self.changed.items()]
        return "; ".join([*parts, *([self.note] if self.note else [])])


def identify(records: Sequence[Record], pictures: Pictures = "stat") -> Identity:
    """The identity of a data set. A picture that cannot be read is identified by the error."""
    found = _whole(records)
    if found is None:
        n = len(records)
        found = [records[index] for index in sorted({i * (n - 1) // (SAMPLED - 1) for i in range(SAMPLED)})]
    look = _Look(pictures)
    rows = [look.digests(record) for record in found]
    ids = [str(record.id) for record in found]
    return Identity(len(records), ids, {part: [row[i] for row in rows] for i, part in enumerate(PARTS)}, pictures)


def read_identity(value: Any) -> Identity:
    """The inverse of :meth:`Identity.plain`. Raises ``ValueError`` for any other value."""
    try:
        identity = Identity(value["count"], value["ids"], value["digests"], value["pictures"])
        lists = [identity.ids, *(identity.digests[part] for part in PARTS)]
        good = isinstance(identity.count, int) and identity.pictures in ("stat", "bytes")
        good &= all(isinstance(items, list) and len(items) == len(identity.ids) for items in lists)
        good &= all(isinstance(item, str) for items in lists for item in items)
    except (KeyError, TypeError):
        good = False
    if not good:
        raise ValueError("not the identity of a data set")
    return identity


def compare(old: Identity, new: Identity) -> Change:
    """The differences of ``new`` from ``old``; false if there are none."""
    before, now = ({name: i for i, name in enumerate(ids)} for ids in (old.ids, new.ids))
    common = [name for name in old.ids if name in now]
    same_look = old.pictures == new.pictures
    changed = {
        part: [name for name in common if old.digests[part][before[name]] != new.digests[part][now[name]]]
        for part in PARTS
        if part != "pictures" or same_look
    }
    return Change(
        counts=(old.count, new.count),
        gone=[name for name in old.ids if name not in now],
        new=[name for name in new.ids if name not in before],
        moved=common != [name for name in new.ids if name in before],
        changed={part: ids for part, ids in changed.items() if ids},
        note="" if same_look else f"picture files were compared by {old.pictures}, now by {new.pictures}",
    )


def _whole(records: Sequence[Any]) -> Sequence[Any] | None:
    """All records, or the objects they are made of; None if records are made on demand."""
    while isinstance(records, Dataset | BlankImages):
        records = records.records
    if isinstance(records, ClipRecords):
        return records.clips
    if isinstance(records, Mixture):
        known = all(isinstance(_whole(part.records), list | tuple) for part in records.parts)
        return list(records) if known and not any(_clips(part.records) for part in records.parts) else None
    return records if isinstance(records, list | tuple) else None


def _clips(records: Sequence[Any]) -> bool:
    """Whether records are clips, whose pictures would be decoded to make them."""
    return isinstance(records.records if isinstance(records, Dataset) else records, ClipRecords)


class _Look:
    """Digests records, reading each picture file once."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures
        self._seen: dict[Path, str] = {}

    def digests(self, record: Any) -> tuple[str, str, str]:
        """Digests of target, messages and pictures. The target of a clip includes its questions."""
        pictures: list[Any] = []
        if isinstance(record, Record):
            truth = _digest([record.task, record.frame, record.target], pictures)
            messages = _digest(record.messages, pictures)
            pictures += record.images
        else:
            truth, messages = _digest(record, pictures), ""
        return truth, messages, _digest([self._picture(picture) for picture in pictures], [])

    def _picture(self, picture: Any) -> str:
        if isinstance(picture, Picture):
            return self._described(picture)
        if not isinstance(picture, Path | str):
            return f"{picture.mode} {picture.size} {hashlib.sha256(picture.tobytes()).hexdigest()}"
        path = Path(picture)
        if path not in self._seen:
            self._seen[path] = f"{path.name} {self._file(path)}"
        return self._seen[path]

    def _described(self, picture: Picture) -> str:
        """Describes a picture that is not just a path; one inside a table by the table's file or by its own bytes."""
        inside = picture.data is not None
        if inside and (self.pictures == "bytes" or picture.path is None):
            digest = hashlib.sha256(picture.read()).hexdigest()
        else:
            assert picture.path is not None
            digest = self._picture(picture.path)
        return f"{Path(str(picture)).name} {digest} {'turned' if picture.turned else 'stored'}"

    def _file(self, path: Path) -> str:
        try:
            if self.pictures == "bytes":
                with path.open("rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest()
            stat = path.stat()
            return f"{stat.st_size} {stat.st_mtime_ns}"
        except (OSError, ValueError) as error:
            return type(error).__name__


def _plain(value: Any, pictures: list[Any]) -> Any:
    """``value`` as JSON values; pictures and picture files in it are appended to ``pictures``."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, pictures) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        value = sorted(value, key=repr)
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return [_plain(item, pictures) for item in value]
    if dataclasses.is_dataclass(value):
        fields = (field.name for field in dataclasses.fields(value) if field.name != "source")  # file and line
        return {name: _plain(getattr(value, name), pictures) for name in fields}
    if isinstance(value, Path) or type(value).__module__.startswith("PIL."):
        pictures.append(value)
        return None
    return repr(value)


def _digest(value: Any, pictures: list[Any]) -> str:
    """Digest of a value's JSON; pictures in it are appended to ``pictures``."""
    try:
        text = json.dumps(value, sort_keys=True)  # most are plain, and this is fast
    except TypeError:
        text = json.dumps(_plain(value, pictures), sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def _named(ids: Sequence[str]) -> str:
    rest = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return ", ".join(repr(name) for name in ids[:SHOWN]) + rest
