"""Checking data before it is trained on: every bad row is found and reported at once, with file and line.

An adapter reads each row through a ``Row``: its methods return a sound value, or note a ``Problem`` and return None.
Images are checked by their header alone, once per file.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastrl.pictures import MAX_PIXELS, Header, Picture, PictureError, read_header

SHOWN = 20  # problems listed in one error message
TOLERANCE = 1.0  # pixels a box or point may lie outside its image: annotations are rounded and masks touch borders
MAX_ASPECT_RATIO = 200  # the Qwen-VL image processors refuse more


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: ``where`` is ``file:line``, ``kind`` a few words to count by."""

    where: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class DataError(ValueError):
    """Everything that is wrong with a data set; ``problems`` has all of it, the message the first ``SHOWN``."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems[:SHOWN]]
        if len(self.problems) > 1:
            lines.insert(
                0, f"{len(self.problems)} problems in the data (--skip-bad leaves bad rows out and counts them):"
            )
        if len(self.problems) > SHOWN:
            lines.append(f"… and {len(self.problems) - SHOWN} more")
        super().__init__("\n".join(lines))


class Reading(NamedTuple):
    """How a data set's pictures are read."""

    turned: bool = False  # by their EXIF tags; else as their pixels are stored
    max_pixels: int = MAX_PIXELS  # width x height above which one is refused


def fail(where: str, kind: str, message: str) -> DataError:
    """A ``DataError`` of one problem, to raise."""
    return DataError([Problem(where, kind, message)])


def nearest(name: str, allowed: Iterable[str]) -> str:
    """``"; did you mean 'x'? Allowed: …"`` for an unknown ``name``."""
    names = list(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} allowed: {', '.join(names) if len(names) <= 40 else f'{len(names)} names'}"


def is_number(value: Any) -> bool:
    """A finite int or float; booleans and strings are not numbers."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of a float
        return False


def corners(xywh: Any) -> Any:
    """[x, y, width, height] → [x1, y1, x2, y2]; what is not four numbers comes back as it is."""
    if isinstance(xywh, list | tuple) and len(xywh) == 4 and all(is_number(v) for v in xywh):
        return [xywh[0], xywh[1], xywh[0] + xywh[2], xywh[1] + xywh[3]]
    return xywh


def short(value: Any, limit: int = 80) -> str:
    """``repr`` cut to ``limit`` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class ImageFolder:
    """Where a data set's image paths start, and what is known of each image asked for (read from its header once).

    Args:
        folder: where relative paths start.
        reading: how its pictures are to be read: turned by their EXIF tags or not, and the largest area.
    """

    def __init__(self, folder: Path, reading: Reading = Reading()) -> None:
        self.folder = folder
        self.reading = reading
        self.unheeded: list[Path] = []  # pictures with an EXIF tag that turns them, in rows that state no size
        self._seen: dict[Path, Header | str] = {}

    def path(self, name: str) -> Path:
        """The file ``name`` means; absolute names stand for themselves."""
        return self.folder / name

    def picture(self, path: Path) -> Path | Picture:
        """The file as records name it: how it is read goes with it where that is not the usual way."""
        if self.reading == Reading():
            return path
        return Picture(path, turned=self.reading.turned, max_pixels=self.reading.max_pixels)

    def header(self, path: Path) -> Header | str:
        """What the file says of itself, or what is wrong with it."""
        if path not in self._seen:
            self._seen[path] = self._read(path)
        return self._seen[path]

    def size(self, path: Path) -> tuple[int, int] | str:
        """(width, height) in pixels, or what is wrong with the file."""
        found = self.header(path)
        return found if isinstance(found, str) else found.size

    def _read(self, path: Path) -> Header | str:
        try:
            header = read_header(self.picture(path))
        except PictureError as error:
            return str(error)
        width, height = header.size
        if min(width, height) < 1 or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            return f"image of {width}x{height} pixels: sides may differ at most {MAX_ASPECT_RATIO} times ({path})"
        return header


def find_image_folder(file: Path, names: Iterable[str], extra: Iterable[Path] = ()) -> Path:
    """What image paths are relative to, when nobody says: the first folder in which one of ``names`` exists.

    Tried: ``extra``, the data file's folder, its ``images`` folder, then the folders above (up to five).
    """
    folder = file.parent
    candidates = [*extra, folder, folder / "images", *list(folder.resolve().parents)[:5]]
    some = [name for name in names if isinstance(name, str) and name][:20]
    return next((c for c in candidates if any((c / name).is_file() for name in some)), folder)


class Row:
    """One row being read. Methods give sound values; otherwise they note what is wrong and give None."""

    def __init__(self, fields: Mapping[str, Any], where: str, number: int, images: ImageFolder) -> None:
        self.fields = fields
        self.where = where
        self.number = number  # line of the file, from 0
        self.images = images
        self.problems: list[Problem] = []

    def fail(self, kind: str, message: str) -> None:
        """Note that this row is bad."""
        self.problems.append(Problem(self.where, kind, message))

    def first(self, names: Sequence[str]) -> tuple[str, Any]:
        """The first of ``names`` that the row has, with its value; (first name, None) if it has none."""
        return next(((name, self.fields[name]) for name in names if name in self.fields), (names[0], None))

    def id(self) -> str:
        """The row's own ``id``, or its line number from 0."""
        value = self.fields.get("id", self.number)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            self.fail("wrong type", f"id must be a non-empty string or an integer, got {short(value)}")
        return str(value)

    def text(self, *names: str) -> str | None:
        """A non-empty string, stripped."""
        name, value = self.first(names)
        if name not in self.fields:
            self.fail("missing field", f"no {' or '.join(names)}")
        elif not isinstance(value, str):
            self.fail("wrong type", f"{name} must be a string, got {short(value)}")
        elif not value.strip():
            self.fail(f"empty {name}", f"{name} is empty")
        else:
            return value.strip()
        return None

    def image(self, *names: str) -> tuple[Path | Picture, tuple[int, int]] | None:
        """The row's image file and its (width, height); declared ``width`` and ``height`` must agree with the file."""
        name = self.text(*names)
        if name is None:
            return None
        if "://" in name:
            self.fail("missing image", f"image is an address, not a file: {short(name)}; download it and name the file")
            return None
        try:
            path = self.images.path(name)
            header = self.images.header(path)
        except (OSError, ValueError) as error:  # such as a null byte or a name too long for the file system
            header, path = f"image not found: {short(name)} ({error})", Path()
        if isinstance(header, str):
            self.fail("missing image" if "not found" in header else "bad image", header)
            return None
        if not self._agrees(path, header):
            return None
        return self.images.picture(path), header.size

    def _agrees(self, path: Path, header: Header) -> bool:
        """Whether the size the row declares (if it does) is the picture's."""
        declared, size = (self.fields.get("width"), self.fields.get("height")), header.size
        if None in declared:
            if header.swaps and not header.turned:
                self.images.unheeded.append(path)
            return True
        if declared == size:
            return True
        message = f"row says {declared[0]}x{declared[1]} pixels, {path} has {size[0]}x{size[1]}"
        if header.swaps and declared == size[::-1]:
            how = (
                "which orient=exif follows: leave that out"
                if header.turned
                else "which is not followed: pixels are taken as they are stored; add orient=exif to read it turned"
            )
            message += f" (its EXIF tag turns it by a quarter, {how})"
        self.fail("wrong size", message)
        return False

    def box(self, value: Any, size: tuple[int, int], name: str = "bbox") -> tuple[float, float, float, float] | None:
        """A box (x1, y1, x2, y2) of positive area inside an image of ``size`` pixels, clipped to it."""
        if not isinstance(value, list | tuple) or len(value) != 4:
            self.fail("wrong type", f"{name} must be four numbers [x1, y1, x2, y2], got {short(value)}")
            return None
        if not all(is_number(v) for v in value):
            self.fail("not a number", f"{name} must be four finite numbers, got {short(value)}")
            return None
        x1, y1, x2, y2 = (float(v) for v in value)
        if x2 <= x1 or y2 <= y1:
            kind = "inverted box" if x2 < x1 or y2 < y1 else "box without area"
            self.fail(kind, f"{name} {short(value)}: {kind}; needs x1 < x2 and y1 < y2")
            return None
        if not (self._inside((x1, y1), size) and self._inside((x2, y2), size)):
            self.fail("box outside", f"{name} {short(value)} lies outside the image of {size[0]}x{size[1]} pixels")
            return None
        x1, x2 = (min(max(v, 0.0), float(size[0])) for v in (x1, x2))
        y1, y2 = (min(max(v, 0.0), float(size[1])) for v in (y1, y2))
        if x2 <= x1 or y2 <= y1:
            self.fail("box outside", f"{name} {short(value)} lies outside the image of {size[0]}x{size[1]} pixels")
            return None
        return x1, y1, x2, y2

    def point(self, x: Any, y: Any, size: tuple[int, int]) -> tuple[float, float] | None:
        """A point inside an image of ``size`` pixels, clipped to it."""
        if not (is_number(x) and is_number(y)):
            self.fail("not a number", f"a point must be two finite numbers, got {short((x, y))}")
        elif not self._inside((float(x), float(y)), size):
            self.fail("point outside", f"point ({x}, {y}) lies outside the image of {size[0]}x{size[1]} pixels")
        else:
            return min(max(float(x), 0.0), float(size[0])), min(max(float(y), 0.0), float(size[1]))
        return None

    @staticmethod
    def _inside(point: tuple[float, float], size: tuple[int, int]) -> bool:
        return all(-TOLERANCE <= v <= side + TOLERANCE for v, side in zip(point, size, strict=True))
