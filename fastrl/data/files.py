"""Writing files: small ones atomically, and the pictures that rows of a written file refer to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastrl.data.disk import replace_file
from fastrl.data.pictures import AnyPicture, file_of, open_picture


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file atomically. Raises ``OSError`` with the path and the bytes needed."""
    replace_file(path, text.encode())


def image_names(images: Sequence[AnyPicture], number: int, out: Path) -> list[str]:
    """Names of record ``number``'s images for a built file; pictures in memory are written to ``NAME.images``."""
    names = []
    home = out.parent.resolve()
    for place, image in enumerate(images):
        file = file_of(image)
        if file is not None:
            path = file.resolve()
        else:
            folder = out.with_suffix(".images").resolve()
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / (f"{number:06d}.png" if len(images) == 1 else f"{number:06d}-{place}.png")
            open_picture(image).save(path)
        names.append(str(path.relative_to(home) if path.is_relative_to(home) else path))
    return names
