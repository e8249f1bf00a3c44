"""Finds records whose pictures can be decoded; loading data only reads picture headers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

from fastrl.data.pictures import Picture, PictureError, opened_picture
from fastrl.data.records import Dataset, Record
from fastrl.data.validate import Problem


def broken_picture(record: Record) -> Problem | None:
    """The problem of the record's first picture that cannot be decoded; None if all can."""
    for image in record.images:
        try:
            with opened_picture(image):
                pass
        except PictureError as error:
            return Problem(record.source or record.id, "broken picture", str(error))
    return None


class Chosen(Sequence[Record]):
    """A subset of records that are made on demand."""

    def __init__(self, records: Sequence[Record], indices: Sequence[int]) -> None:
        self.records, self.indices = records, indices

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return Chosen(self.records, self.indices[index])
        return self.records[self.indices[index]]

    def __len__(self) -> int:
        return len(self.indices)


def decoded(data: Dataset) -> Dataset:
    """The records whose pictures can be decoded, which is tried for all of them; the others become problems.

    If the first record's pictures are in memory (drawn scenes, frames of a video file), all are, and none is decoded.
    """
    records = data.records
    if not records or not any(isinstance(image, Path | str | Picture) for image in records[0].images):
        return data
    found = [broken_picture(records[index]) for index in range(len(records))]
    good = [index for index, problem in enumerate(found) if problem is None]
    broken = [problem for problem in found if problem is not None]
    if not broken:
        return data
    kept = [records[index] for index in good] if isinstance(records, list) else Chosen(records, good)
    return Dataset(kept, (*data.problems, *broken), data.left_out, data.notes)
