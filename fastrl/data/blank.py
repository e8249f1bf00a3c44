"""Records without their pictures: the image-unconditional study's control (PerPO §4.7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

from fastrl.data.pictures import picture_size
from fastrl.data.records import Record

GREY = (127, 127, 127)


class BlankImages(Sequence[Record]):
    """``records`` with every picture replaced by a grey one of its size, made on demand.

    Prompts keep their length and coordinates their meaning; only what there is to see is gone.
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
