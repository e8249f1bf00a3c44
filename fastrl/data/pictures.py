"""Picture files of all supported formats → RGB pixels. All pictures are opened here.

``docs/data.md`` lists what is read and what is refused. A file is always decoded at full size.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from fastrl.config.limits import MAX_IMAGE_PIXELS
from fastrl.data.truth import clipped

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = MAX_IMAGE_PIXELS  # default limit of width x height
BAND = 1 << 20  # pixels that are converted at a time
LARGE = 16_000_000  # pixels above which pictures are decoded and prepared one at a time
WHITE = (255, 255, 255)
_ORIENTATION = 0x0112  # the EXIF (and TIFF) tag
_TURNED = (5, 6, 7, 8)  # its values that swap width and height
_AS_IT_IS = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp"}  # formats that any server reads
_DATA_URL = re.compile(r"\s*data:image/[\w.+-]{1,40};base64,")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_SHORTEST = 32  # characters of a picture's file in base64
_SHOWN = 300  # characters of a picture's name in messages
_large = threading.RLock()
_header = threading.Lock()  # guards PIL's own limit, which is global


class PictureError(OSError):
    """A picture that is missing, broken, too large, or of a kind that cannot be converted to RGB."""


@dataclass(frozen=True)
class Picture:
    """A picture that is not decoded yet, with options for reading it; used if a path alone is not enough.

    Args:
        path: its file; or, with ``data``, the file that contains it, if any.
        data: the bytes of a picture file, or a function that returns them.
        name: its name in messages.
        turned: apply its EXIF orientation; otherwise pixels are used as stored.
        max_pixels: limit of width x height.
        stated: (width, height) stated by a row, if the file does not exist.
    """

    path: Path | None = None
    data: bytes | Callable[[], bytes] | None = field(default=None, repr=False)
    name: str = ""
    turned: bool = False
    max_pixels: int = MAX_PIXELS
    stated: tuple[int, int] | None = None

    def __str__(self) -> str:
        return self.name or str(self.path)

    def read(self) -> bytes:
        """The bytes of the picture's file. Raises ``PictureError`` if it does not exist."""
        if callable(self.data):
            return self.data()
        if self.data is not None:
            return self.data
        if self.path is None or not is_file(self.path):
            raise PictureError(f"image not found: {_shown(self)}")
        return self.path.read_bytes()


AnyPicture: TypeAlias = "Path | str | Picture | Image"


def base64_picture(text: str) -> bytes | None:
    """The bytes of a picture's file that a text holds in base64, also as a data URL; None for any other text, such as a
    file's name."""
    url = _DATA_URL.match(text)
    if url is None and (len(text) < _SHORTEST or _BASE64.fullmatch(text) is None):
        return None
    try:
        data = base64.b64decode("".join(text[url.end() if url else 0 :].split()), validate=True)
        read_header(Picture(data=data, max_pixels=sys.maxsize))
    except (binascii.Error, ValueError, PictureError):
        return None
    return data


def holds_picture(value: Any) -> bool:
    """Whether a row's value is a picture, or the bytes of one in any form, and not the name of a file."""
    if isinstance(value, Mapping):
        return value.get("bytes") is not None
    return value is not None and not (isinstance(value, str) and base64_picture(value) is None)


def is_file(path: Path) -> bool:
    """Whether a name from a row is a file's; one that no file can have (too long) is not."""
    try:
        return path.is_file()
    except OSError:
        return False


class Header(NamedTuple):
    """A picture's properties before it is decoded."""

    size: tuple[int, int]  # (width, height) in pixels after orientation
    orientation: int  # its EXIF tag: 1 (none) to 8
    turned: bool  # whether that tag is applied
    kind: str  # PIL's name of the format; empty for a picture in memory
    plain: bool  # 8-bit grey or RGB, opaque

    @property
    def swaps(self) -> bool:
        """Whether the tag swaps width and height."""
        return self.orientation in _TURNED


def read_header(image: AnyPicture) -> Header:
    """Size and kind of a picture, without decoding it. Raises ``PictureError``."""
    source = as_picture(image)
    if source is None:
        assert not isinstance(image, Path | str | Picture)
        _check_mode(image, _name(image))
        return Header(image.size, 1, False, "", _is_plain(image))
    if source.stated is not None:
        return Header(source.stated, 1, False, "", True)
    with closing(_open(source)) as raw:
        return _header_of(raw, source)


def open_picture(image: AnyPicture) -> Image:
    """The RGB pixels of a file, of its bytes, or of a PIL image.

    Transparent pictures are composed on white; 16-bit grey is scaled by the range that its file states; of an animation
    the first frame is read. Raises ``PictureError``, which names the file.
    """
    with opened_picture(image) as picture:
        return picture


@contextmanager
def opened_picture(image: AnyPicture) -> Iterator[Image]:
    """:func:`open_picture` for a block; during the block of a large picture, no other large one is opened."""
    source = as_picture(image)
    if source is None:
        assert not isinstance(image, Path | str | Picture)
        _check_mode(image, _name(image))
        yield _to_rgb(image, _name(image))
        return
    raw = _open(source)
    try:
        header = _header_of(raw, source)
        large = header.size[0] * header.size[1] > LARGE
        with _large if large else nullcontext():
            picture = _decode(raw, header, _shown(source))
            if picture is not raw:
                raw.close()  # frees the compressed bytes and PIL's own copy
            yield picture
    except BaseException:
        raw.close()
        raise


def picture_size(image: AnyPicture) -> tuple[int, int]:
    """(width, height) in pixels. Raises ``PictureError``."""
    return read_header(image).size


def as_picture(image: AnyPicture) -> Picture | None:
    """A file as a ``Picture``; None for a PIL image, which is already decoded."""
    if isinstance(image, Picture):
        return image
    return Picture(Path(image)) if isinstance(image, Path | str) else None


def file_of(image: AnyPicture) -> Path | None:
    """The file that holds a picture's pixels as they are read; None: there is none (it is in memory, in a table, or
    turned)."""
    source = as_picture(image)
    return source.path if source is not None and source.data is None and not source.turned else None


def data_url(image: AnyPicture) -> str:
    """A picture as a data URL with the same pixels for any reader: the file's own bytes if they are unambiguous, else
    PNG. Raises ``PictureError``."""
    header, source = read_header(image), as_picture(image)
    if source is not None and header.plain and header.orientation == 1 and header.kind in _AS_IT_IS:
        return _as_url(_AS_IT_IS[header.kind], source.read())
    buffer = io.BytesIO()
    open_picture(image).save(buffer, "PNG")
    return _as_url("png", buffer.getvalue())


def _as_url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _shown(picture: Picture) -> str:
    """A picture's name in messages: names come from rows and may be of any length."""
    return clipped(str(picture), _SHOWN)


# ---- opening


def _open(source: Picture) -> Image:
    """The file opened by PIL, with its header read and checked. The caller closes it."""
    name = _shown(source)
    if source.data is None and (source.path is None or not is_file(source.path)):
        raise PictureError(f"image not found: {name}")
    raw = _read(source)
    try:
        width, height = raw.size
        if width * height > source.max_pixels:
            raise PictureError(over_large((width, height), source.max_pixels, name))
        _check_mode(raw, name)
    except BaseException:
        raw.close()
        raise
    return raw


def over_large(size: tuple[int, int], limit: int, name: str) -> str:
    """What is said of a picture above the limit, with the keys that raise it."""
    width, height = size
    return (
        f"image of {width}x{height} pixels, more than the limit of {limit:,} ({name}); "
        f"raise it with data.max_image_pixels in a recipe, or ?max_image_pixels={width * height} in a spec"
    )


def _read(source: Picture) -> Image:
    from PIL import Image as pil

    file = source.path if source.data is None else io.BytesIO(source.read())
    assert file is not None
    with _header, _no_limit():
        try:
            return pil.open(file)
        except MemoryError:
            raise
        except Exception as error:  # PIL's readers raise many types of errors for a damaged file
            raise _unreadable(_shown(source), error) from error


@contextmanager
def _no_limit() -> Iterator[None]:
    """Turn off PIL's own limit: the caller applies ours, whose message names the key that raises it."""
    from PIL import Image as pil

    usual, pil.MAX_IMAGE_PIXELS = pil.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        pil.MAX_IMAGE_PIXELS = usual


def _unreadable(name: str, error: Exception) -> PictureError:
    why = "it is not a picture of a known format" if "cannot identify" in str(error) else error
    return PictureError(f"image cannot be read: {name} ({type(error).__name__}: {why})")


def _header_of(raw: Image, source: Picture) -> Header:
    orientation = _orientation(raw)
    width, height = raw.size
    if raw.format == "TIFF":  # PIL may report the size after orientation
        width, height = (int(raw.tag_v2[tag]) for tag in (256, 257))  # type: ignore[attr-defined]
    if source.turned and orientation in _TURNED:
        width, height = height, width
    return Header((width, height), orientation, source.turned, raw.format or "", _is_plain(raw))


def _orientation(raw: Image) -> int:
    from PIL import Image as pil

    try:  # PNG's own getexif would decode the picture to find a tag after it
        value = pil.Image.getexif(raw).get(_ORIENTATION, 1)
    except Exception:  # a damaged tag is ignored; the picture itself may be intact
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _decode(raw: Image, header: Header, name: str) -> Image:
    """The picture's RGB pixels; ``raw`` itself if it holds plain RGB and PIL no longer needs its file."""
    levels = _levels(raw) if raw.mode.startswith("I") else None
    try:
        if raw.width * raw.height > LARGE:  # PIL may check its limit again
            with _header, _no_limit():
                raw.load()
        else:
            raw.load()
    except MemoryError:
        raise
    except Exception as error:
        raise _unreadable(name, error) from error
    done = getattr(raw, "fp", None) is None and not getattr(raw, "is_animated", False)
    picture = raw if done and raw.mode == "RGB" and _is_plain(raw) else _to_rgb(raw, name, levels)
    if raw.format == "TIFF":  # PIL has already applied the orientation
        return picture if header.turned else _turn(picture, _BACK.get(header.orientation, header.orientation))
    return _turn(picture, header.orientation) if header.turned else picture


_BACK = {6: 8, 8: 6}  # inverse orientations; the others are their own inverse


def _turn(picture: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    moves = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return picture.transpose(moves[orientation]) if orientation in moves else picture


# ---- pixels


def _name(image: Any) -> str:
    return str(getattr(image, "filename", "") or "a picture in memory")


def _is_plain(image: Image) -> bool:
    return image.mode in ("L", "RGB") and not image.has_transparency_data


def _check_mode(image: Image, name: str) -> None:
    """Raise ``PictureError`` for pixels whose value range is unknown."""
    if image.mode == "F":
        raise PictureError(f"image of floating-point numbers: {name}; {_UNSEEN}")
    if image.mode.startswith("I"):
        levels = _levels(image)
        if levels is None:
            raise PictureError(f"image of 32-bit or signed numbers without a stated range: {name}; {_UNSEEN}")
        if not 0 < levels.high - levels.low <= _MOST_LEVELS:
            raise PictureError(f"image whose numbers go from {levels.low} to {levels.high}: {name}; {_UNSEEN}")


class _Levels(NamedTuple):
    low: int  # value of black
    high: int  # value of white
    inverted: bool  # if true, low is white and high is black


_MOST_LEVELS = 1 << 20
_UNSEEN = "its value of white is unknown: save it with 8 bits, or with 16 bits from 0 to 65535"


def _to_rgb(image: Image, name: str, levels: _Levels | None = None) -> Image:

    try:
        if image.mode.startswith("I"):
            levels = levels or _levels(image) or _Levels(0, 65535, False)
            return _by_bands(image, partial(_grey, name=name, levels=levels, clip=image.format == "TIFF"))
        return _by_bands(image, _on_white) if image.has_transparency_data else image.convert("RGB")
    except (MemoryError, PictureError):
        raise
    except Exception as error:
        raise _unreadable(name, error) from error


def bands(image: Image) -> Iterator[tuple[tuple[int, int, int, int], Image]]:
    """Split a picture into bands of whole rows, about ``BAND`` pixels each; yields box and pixels from the top."""
    width, height = image.size
    rows = max(1, BAND // max(1, width))
    for top in range(0, height, rows):
        box = (0, top, width, min(top + rows, height))
        yield box, image.crop(box)


def _by_bands(image: Image, make: Callable[[Image], Image]) -> Image:
    """Convert a picture band by band, so that intermediate results never exist for all of it at once."""
    from PIL import Image as pil

    result = pil.new("RGB", image.size)
    for box, band in bands(image):
        result.paste(make(band), box)
    return result


def _on_white(image: Image) -> Image:
    from PIL import Image as pil

    clear = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    white = pil.new("RGB", image.size, WHITE)
    white.paste(clear, mask=clear.getchannel("A"))
    return white


def _levels(image: Image) -> _Levels | None:
    """The value range of a picture of integers; None if the file states none."""
    if image.format != "TIFF":
        return _Levels(0, 65535, False)  # PIL scales PNG, PGM and JPEG 2000 to this range from any depth
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    bits, signed = tags.get(258, (16,))[0], tags.get(339, (1,))[0] == 2
    low, high = _first(tags, (340, 280)), _first(tags, (341, 281))  # SMinSampleValue, MinSampleValue; the same of Max
    if signed or bits > 16:
        return None if low is None or high is None else _Levels(low, high, tags.get(262) == 0)
    most = 2**bits - 1
    return _Levels(max(low or 0, 0), min(high or most, most), tags.get(262) == 0)


def _first(tags: Any, names: tuple[int, ...]) -> int | None:
    """The value of the first of these tags that is present; of one value per channel, the first."""
    for name in names:
        value = tags.get(name)
        value = value[0] if isinstance(value, tuple) and value else value
        if isinstance(value, int | float):
            return int(value)
    return None


def _grey(image: Image, name: str, levels: _Levels, clip: bool) -> Image:
    """Numbers of ``levels`` as shades of grey; others are clipped, or refused."""
    import numpy as np
    from PIL import Image as pil

    low, high, inverted = levels
    values = np.asarray(image)
    if not clip and values.size and not (values.min() >= low and values.max() <= high):
        raise PictureError(f"image of numbers outside {low} to {high}: {name}; {_UNSEEN}")
    shades = np.rint(np.arange(high - low + 1) * 255.0 / (high - low)).astype(np.uint8)
    index = values if low == 0 else values.astype(np.int64) - low
    grey = (shades[::-1] if inverted else shades)[np.clip(index, 0, high - low)]
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return pil.fromarray(grey).convert("RGB")
