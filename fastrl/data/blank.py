"""Records without their pictures, the control of the image-unconditional study (PerPO §4.7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

from fastrl.data.pictures import picture_size
from fastrl.data.records import Record

GREY = (127, 127, 127)


class BlankImages(Sequence[Record]):
    """``records`` with every picture replaced by a grey one of the same size, made on demand.

    The length of prompts and the meaning of coordinates do not change.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return BlankImages(self.records[index])
        return blank_images(self.records[index])

    def __len__(self) -> int:
        return len(self.records)


def blank_images(record: Record) -> Record:
    """The record with grey pictures. Raises ``PictureError`` for a file that cannot be read."""
    from PIL import Image

    return replace(record, images=tuple(Image.new("RGB", picture_size(image), GREY) for image in record.images))
