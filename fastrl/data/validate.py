"""Checking data before it is trained on: every bad row is found and reported at once, with file and line.

An adapter reads each row through a ``Row``: its methods return a valid value, or note a ``Problem`` and return None.
Images are checked by their header only, once per file.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeVar

from fastrl.data.pictures import (
    MAX_PIXELS,
    AnyPicture,
    Header,
    Picture,
    PictureError,
    base64_picture,
    is_file,
    read_header,
)
from fastrl.data.truth import (
    TruthFault,
    box_value,
    clipped,
    is_empty,
    is_number,
    read_box,
    read_count,
    read_id,
    read_points,
    read_truth,
    short,
    whole_number,
)

MAX_WHERE, MAX_KIND, MAX_MESSAGE = 1000, 200, 2000  # characters of a problem's parts
SHOWN = 20  # problems listed in one error message
SHOWN_OF_A_KIND = 5
HUNDREDS = 100  # longer side of a picture from which a box within 0 to 1 cannot be in pixels
SIDES: Mapping[str, float | None] = MappingProxyType({"original": None, "unit": 1.0, "thousand": 1000.0})
TOLERANCE = 1.0  # pixels a box or point may lie outside its image: annotations are rounded and masks touch borders
T = TypeVar("T")
MAX_PATH = 4096  # characters of the longest name that a file has anywhere
MAX_ASPECT_RATIO = 200  # the Qwen-VL image processors refuse more


@dataclass(frozen=True)
class Problem:
    """One problem: ``where`` is ``file:line``, ``kind`` a few words by which problems are counted. All are bounded:
    whatever a row holds, its message can be read."""

    where: str
    kind: str
    message: str

    def __post_init__(self) -> None:
        for name, limit in (("where", MAX_WHERE), ("kind", MAX_KIND), ("message", MAX_MESSAGE)):
            object.__setattr__(self, name, clipped(getattr(self, name), limit))

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class DataError(ValueError):
    """All problems of a data set. ``problems`` has all of them; the message has the first ``SHOWN`` lines, where equal
    messages of several rows share a line and a kind has at most ``SHOWN_OF_A_KIND`` lines. ``hint`` is added at the
    end."""

    source: ClassVar[str] = "the data (--skip-bad skips and counts bad rows)"

    def __init__(self, problems: Sequence[Problem], hint: str = "") -> None:
        self.problems = tuple(problems)
        lines = _grouped(self.problems)
        if len(self.problems) > 1:
            heading = f"{len(self.problems)} problems in {self.source}:"
            lines = [heading, *lines[:SHOWN], *([f"… and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])]
        super().__init__("\n".join([*lines, *([hint] if hint else [])]))


def _grouped(problems: Sequence[Problem]) -> list[str]:
    """One line for each message, ``360 rows: no expression (first: data.jsonl:1)``, kinds in order of appearance."""
    kinds: dict[str, dict[str, list[str]]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, {}).setdefault(problem.message, []).append(problem.where)
    lines = []
    for kind, messages in kinds.items():
        some, rest = list(messages.items())[:SHOWN_OF_A_KIND], list(messages.values())[SHOWN_OF_A_KIND:]
        lines += [_line(message, places) for message, places in some]
        if rest:
            lines.append(f"… and {sum(map(len, rest))} more: {kind}")
    return lines


def _line(message: str, places: Sequence[str]) -> str:
    rows = len(dict.fromkeys(places))
    return f"{places[0]}: {message}" if rows == 1 else f"{rows} rows: {message} (first: {places[0]})"


class Reading(NamedTuple):
    """How a data set's pictures are read."""

    turned: bool = False  # apply EXIF orientation; otherwise pixels are used as stored
    max_pixels: int = MAX_PIXELS  # limit of width x height
    stated: bool = False  # a file may be missing if the row states its size (to score answers without pictures)


def fail(where: str, kind: str, message: str) -> DataError:
    """A ``DataError`` of one problem, to raise."""
    return DataError([Problem(where, kind, message)])


def nearest(name: str, allowed: Iterable[str]) -> str:
    """``"; did you mean 'x'? Allowed: …"`` for an unknown ``name``."""
    names = [clipped(each, 80) for each in allowed]
    close = difflib.get_close_matches(clipped(name, 80), names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} allowed: {', '.join(names) if len(names) <= 40 else f'{len(names)} names'}"


def corners(xywh: Any) -> Any:
    """[x, y, width, height] → [x1, y1, x2, y2]; anything but four numbers is returned unchanged."""
    xywh = box_value(xywh)
    if isinstance(xywh, list | tuple) and len(xywh) == 4 and all(is_number(v) for v in xywh):
        return [xywh[0], xywh[1], xywh[0] + xywh[2], xywh[1] + xywh[3]]
    return xywh


class ImageFolder:
    """The folder of a data set's images, with a cache of their headers.

    Args:
        folder: where relative paths start.
        reading: how to read its pictures.
    """

    def __init__(self, folder: Path, reading: Reading = Reading()) -> None:
        self.folder = folder
        self.reading = reading
        self.unheeded: list[str] = []  # pictures with an ignored EXIF orientation, in rows without a size to check
        self._seen: dict[Path, Header | str] = {}

    def path(self, name: str) -> Path:
        """The path of ``name``; absolute names are used as they are."""
        return self.folder / name

    def picture(self, path: Path) -> Path | Picture:
        """The picture as records refer to it: a path, or a ``Picture`` if it is not read with default options."""
        if self.reading._replace(stated=False) == Reading():
            return path
        return Picture(path, turned=self.reading.turned, max_pixels=self.reading.max_pixels)

    def header(self, path: Path) -> Header | str:
        """The file's header, or an error message."""
        if path not in self._seen:
            self._seen[path] = self.check(self.picture(path), str(path))
        return self._seen[path]

    def size(self, path: Path) -> tuple[int, int] | str:
        """(width, height) in pixels, or an error message."""
        found = self.header(path)
        return found if isinstance(found, str) else found.size

    def embedded(self, data: bytes | Callable[[], bytes], name: str, file: Path | None) -> Picture:
        """A picture inside another file, such as a table."""
        return Picture(file, data, name, turned=self.reading.turned, max_pixels=self.reading.max_pixels)

    def check(self, picture: AnyPicture, name: str) -> Header | str:
        """A picture's header, or an error message."""
        try:
            header = read_header(picture)
        except PictureError as error:
            return str(error)
        width, height = header.size
        if min(width, height) < 1 or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            return (
                f"image of {width}x{height} pixels: sides may differ by a factor of at most {MAX_ASPECT_RATIO} ({name})"
            )
        return header


def why_turned(header: Header, declared: Sequence[Any]) -> str:
    """What is added to a message about a size that only the turned picture has; else nothing."""
    if not header.swaps or tuple(declared) != header.size[::-1]:
        return ""
    how = (
        "which orient=exif applies: remove that option"
        if header.turned
        else "which is not followed: pixels are taken as they are stored; add orient=exif to read it turned"
    )
    return f" (its EXIF tag turns it by a quarter, {how})"


def find_image_folder(file: Path, names: Iterable[str], extra: Iterable[Path] = ()) -> Path:
    """Find the folder of relative image paths: the first folder in which one of ``names`` exists.

    Tried: ``extra``, the data file's folder, its ``images`` folder, then the folders above (up to five).
    """
    folder = file.parent
    candidates = [*extra, folder, folder / "images", *list(folder.resolve().parents)[:5]]
    some = [name for name in names if isinstance(name, str) and name][:20]
    return next((c for c in candidates if any(is_file(c / name) for name in some)), folder)


class TableRow(dict[str, Any]):
    """A row's columns, its file, and a function that reads a picture's bytes from it again."""

    file: Path
    cell: Callable[[str, int | None], Callable[[], bytes]]


class Row:
    """One row being read. Methods return a valid value, or note a problem and return None."""

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
        """The first of ``names`` that the row has, with its value, preferring values that are not null (in tables every
        row has every column); (first name, None) if it has none."""
        had = [name for name in names if name in self.fields]
        name = next((name for name in had if self.fields[name] is not None), had[0] if had else names[0])
        return name, self.fields.get(name)

    def id(self) -> str:
        """The row's own ``id``, or its line number from 0."""
        return self.named("id")

    def named(self, column: str) -> str:
        """What names the row in ``column``, or its line number from 0 where that holds nothing."""
        value = self.fields.get(column)
        missing = value is None or (isinstance(value, float) and is_empty(value))
        found = str(self.number) if missing else read_id(value)
        if found is None:
            self.fail("wrong type", f"{column} must be a non-empty string or an integer, got {short(value)}")
        return found or ""

    def text(self, *names: str) -> str | None:
        """A non-empty string, stripped."""
        name, value = self.first(names)
        if value is None and name not in self.fields:
            self.fail("missing field", f"no {' or '.join(names)}")
        elif not isinstance(value, str):
            self.fail("wrong type", f"{name} must be a string, got {short(value)}")
        elif not value.strip():
            self.fail(f"empty {name}", f"{name} is empty")
        else:
            return value.strip()
        return None

    def image(self, *names: str) -> tuple[AnyPicture, tuple[int, int]] | None:
        """The row's image and its (width, height); declared ``width`` and ``height`` must agree with it.

        The column holds a file name, the bytes of a file (in a table also as ``{"bytes", "path"}``) or their base64, or
        a PIL image.
        """
        name, value = self.first(names)
        if name not in self.fields:
            self.fail("missing field", f"no {' or '.join(names)}")
            return None
        return self._picture(name, value)

    def pictures(self) -> list[tuple[AnyPicture, tuple[int, int]]]:
        """All images of the row, from the list ``images`` or the single ``image``, each in the form of
        :meth:`image`."""
        name, value = self.first(("images", "image"))
        value = read_truth(value) if isinstance(value, str) and name == "images" else value
        if isinstance(value, list | tuple) and value:
            found = [self._picture(name, each, place) for place, each in enumerate(value)]
            return [each for each in found if each is not None]
        if value is None or isinstance(value, list | tuple):
            self.fail("missing image", f"images must be a list of one or more files, got {short(value)}")
            return []
        found = self._picture(name, value)
        return [found] if found is not None else []

    def _picture(self, name: str, value: Any, place: int | None = None) -> tuple[AnyPicture, tuple[int, int]] | None:
        where = f"{name}[{place}]" if place is not None else name
        if isinstance(value, Mapping) and ("bytes" in value or "path" in value):  # the form of the datasets library
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        picture: AnyPicture
        if isinstance(value, str):
            data = base64_picture(value)
            if data is None:
                return self._file(where, value.strip())
            value = data
        if isinstance(value, bytes):
            row, called = self.fields, f"{self.where}, {where}"
            if isinstance(row, TableRow):  # its bytes are read again when needed, not kept
                picture = held = self.images.embedded(row.cell(name, place), called, row.file)
            else:
                picture = held = self.images.embedded(value, called, None)
            header = self.images.check(replace(held, data=value), called)
        elif hasattr(value, "getexif"):
            picture, called = value, where  # type: ignore[assignment]
            header = self.images.check(picture, where)
        else:
            self.fail(
                "wrong type", f"{where} must be a file's name, the bytes of one or a PIL image, got {short(value)}"
            )
            return None
        if isinstance(header, str):
            self.fail("bad image", header)
            return None
        return (picture, header.size) if self._agrees(called, header) else None

    def _file(self, where: str, name: str) -> tuple[AnyPicture, tuple[int, int]] | None:
        if not name:
            self.fail(f"empty {where}", f"{where} is empty")
            return None
        if len(name) > MAX_PATH:
            given = f"a text of {len(name):,} characters: {short(name)}"
            self.fail("missing image", f"{where} is neither a file's name nor a picture in base64, but {given}")
            return None
        if "://" in name:
            self.fail("missing image", f"image is a URL, not a file: {short(name)}; download it and give the file name")
            return None
        try:
            path = self.images.path(name)
            header = self.images.header(path)
        except (OSError, ValueError) as error:  # such as a null byte or a name too long for the file system
            header, path = f"image not found: {short(name)} ({error})", Path()
        if isinstance(header, str):
            size = self._stated_size() if "not found" in header else None
            if size is None:
                self.fail("missing image" if "not found" in header else "bad image", header)
                return None
            return Picture(path, stated=size), size
        return (self.images.picture(path), header.size) if self._agrees(str(path), header) else None

    def _stated_size(self) -> tuple[int, int] | None:
        """The (width, height) that a row declares, if files may be missing."""
        width, height = (whole_number(self.fields.get(side)) for side in ("width", "height"))
        if not self.images.reading.stated or width is None or height is None or min(width, height) < 1:
            return None
        return width, height

    def _agrees(self, path: str, header: Header) -> bool:
        """Whether the size that the row declares, if any, is the picture's."""
        given, size = [self.fields.get(side) for side in ("width", "height")], header.size
        declared = tuple(map(whole_number, given))
        if None in declared and None not in given:
            self.fail("wrong type", f"width and height must be whole numbers of pixels, got {short(given)}")
            return False
        if None in declared or declared == size:
            # then the size shows whether the row applies the orientation
            decided = None not in declared and header.swaps
            if header.orientation != 1 and not header.turned and not decided:
                self.images.unheeded.append(path)
            return True
        message = f"row says {declared[0]}x{declared[1]} pixels, {path} has {size[0]}x{size[1]}"
        self.fail("wrong size", message + why_turned(header, declared))
        return False

    def truth(self, name: str, usual: Any = None) -> Any:
        """The value of a truth column in any notation (see ``truth.read_truth``)."""
        value = self.fields.get(name)
        return usual if value is None else read_truth(value)

    def parse(self, name: str, read: Callable[[Any], T], value: Any) -> T | None:
        """A value parsed by ``read`` (from ``truth``); None if it is malformed, which is noted as a problem."""
        try:
            return read(value)
        except TruthFault as fault:
            self.fail(fault.kind, f"{name} {fault}")
            return None

    def count(self, name: str) -> int | None:
        """A whole number of at least 0; 2.0 and "2" are 2."""
        return self.parse(name, read_count, self.fields.get(name))

    def box(
        self, value: Any, size: tuple[int, int], name: str = "bbox", frame: str = "original"
    ) -> tuple[float, float, float, float] | None:
        """A box (x1, y1, x2, y2) of positive area inside an image of ``size`` pixels, clipped to it.

        ``frame`` is the unit of its numbers: pixels (``original``), or fractions of the sides (``unit``: 1,
        ``thousand``: 1000). Returns pixels.
        """
        box = self.parse(name, read_box, value)
        if box is None:
            return None
        x1, y1, x2, y2 = box
        value = box_value(value)
        if x2 <= x1 or y2 <= y1:
            kind = "inverted box" if x2 < x1 or y2 < y1 else "box without area"
            self.fail(kind, f"{name} {short(value)}: {kind}; needs x1 < x2 and y1 < y2")
            return None
        if frame == "original" and max(size) >= HUNDREDS and all(0 <= v <= 1 for v in box):
            self.fail("box in 0 to 1", f"{name} {short(value)} {_fractions(size)}")
            return None
        scale = _scale(frame, size)
        first, second = self._clip((x1, y1), size, scale), self._clip((x2, y2), size, scale)
        if first is None or second is None or second[0] <= first[0] or second[1] <= first[1]:
            self.fail("box outside", f"{name} {short(value)} lies outside {_frame_name(frame, size)}")
            return None
        return *first, *second

    def points(
        self, value: Any, size: tuple[int, int], name: str = "points", frame: str = "original"
    ) -> list[tuple[float, float]] | None:
        """Points (x, y) in pixels inside an image of ``size``, clipped to it; ``frame``: see :meth:`box`.

        How they are written: ``truth.read_points``.
        """
        pairs = self.parse(name, read_points, value)
        if pairs is None:
            return None
        far = [v for pair in pairs for v in pair if not 0 <= v <= 1]
        if frame == "original" and pairs and not far and max(size) >= HUNDREDS:
            self.fail("points in 0 to 1", f"{name} {short(read_truth(value))} {_fractions(size)}")
            return None
        found = [self._point(x, y, size, frame) for x, y in pairs]
        return None if None in found else [point for point in found if point is not None]

    def _point(self, x: float, y: float, size: tuple[int, int], frame: str) -> tuple[float, float] | None:
        point = self._clip((x, y), size, _scale(frame, size))
        if point is None:
            self.fail("point outside", f"point ({x:g}, {y:g}) lies outside {_frame_name(frame, size)}")
        return point

    @staticmethod
    def _clip(
        point: tuple[float, float], size: tuple[int, int], scale: tuple[float, float]
    ) -> tuple[float, float] | None:
        """The point in pixels, clipped to the image; None if it is farther outside than ``TOLERANCE``."""
        x, y = (v * factor for v, factor in zip(point, scale, strict=True))
        if not all(-TOLERANCE <= v <= side + TOLERANCE for v, side in zip((x, y), size, strict=True)):
            return None
        return min(max(x, 0.0), float(size[0])), min(max(y, 0.0), float(size[1]))


def _scale(frame: str, size: tuple[int, int]) -> tuple[float, float]:
    """Pixels for one unit of a frame."""
    whole = SIDES[frame]
    return (1.0, 1.0) if whole is None else (size[0] / whole, size[1] / whole)


def _frame_name(frame: str, size: tuple[int, int]) -> str:
    whole = SIDES[frame]
    image = f"the image of {size[0]}x{size[1]} pixels"
    return image if whole is None else f"0 to {whole:g} of {image}"


def _fractions(size: tuple[int, int]) -> str:
    return (
        f"lies within 0 to 1 on a picture of {size[0]}x{size[1]} pixels: are these parts of its sides (frame unit)? "
        "Pixels are expected; frame=unit reads parts, where the adapter takes it"
    )
