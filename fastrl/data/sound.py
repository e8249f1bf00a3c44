"""Records whose pictures can be decoded: a header is read when data is loaded, what lies behind it only here."""

from __future__ import annotations

from fastrl.data.pictures import PictureError, opened_picture
from fastrl.data.records import Dataset, Record
from fastrl.data.validate import Problem


def broken_picture(record: Record) -> Problem | None:
    """What is wrong with the first of the record's pictures that cannot be decoded; None: all can."""
    for image in record.images:
        try:
            with opened_picture(image):
                pass
        except PictureError as error:
            return Problem(record.source or record.id, "broken picture", str(error))
    return None


def decoded(data: Dataset) -> Dataset:
    """The records whose pictures can be decoded, each of which is; the others are problems.

    Records that are made on demand (drawn scenes, clips) are not looked at: that would make them all.
    """
    if not isinstance(data.records, list):
        return data
    found = [broken_picture(record) for record in data.records]
    kept = [record for record, problem in zip(data.records, found, strict=True) if problem is None]
    broken = [problem for problem in found if problem is not None]
    return Dataset(kept, (*data.problems, *broken), data.left_out, data.notes)
