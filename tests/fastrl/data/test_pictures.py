"""Pictures of every mode and format: their conversion, what is refused, and the memory that a large one takes."""

from __future__ import annotations

import base64
import io
import re
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, TiffImagePlugin

from fastrl.data import pictures
from fastrl.data.pictures import (
    Picture,
    PictureError,
    data_url,
    open_picture,
    opened_picture,
    picture_size,
    read_header,
)

GREYS = np.array([[0, 257, 4096], [32896, 65278, 65535]], dtype=np.uint16)  # 65535 / 255 = 257


def pixels(image: Any) -> np.ndarray:
    return np.asarray(open_picture(image))


def tiff(path: Path, values: np.ndarray, **tags: int) -> Path:
    """A TIFF with additional tags, such as ``t281=4095``."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        info[int(name[1:])] = value
    Image.fromarray(values).save(path, tiffinfo=info)
    return path


@pytest.mark.parametrize("suffix", ["png", "tif", "jp2", "pgm"])
def test_16_bit_grey_is_scaled_by_the_whole_range(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(GREYS).save(tmp_path / f"g.{suffix}")
    got = pixels(tmp_path / f"g.{suffix}")
    assert got.shape == (2, 3, 3)
    assert (got[..., 0] == np.rint(GREYS / 257)).all()
    assert (got[..., 0] == got[..., 1]).all()
    assert (got[..., 0] == got[..., 2]).all()


def test_16_bit_grey_is_scaled_by_the_range_the_file_states(tmp_path: Path) -> None:
    values = np.array([[0, 1000, 4095, 5000]], dtype=np.uint16)
    want = np.rint(np.minimum(values, 4095) / 4095 * 255)
    assert (pixels(tiff(tmp_path / "a.tif", values, t281=4095))[..., 0] == want).all()
    assert (pixels(tiff(tmp_path / "b.tif", values, t280=1000, t281=5000))[..., 0] == [[0, 0, 197, 255]]).all()
    assert (pixels(tiff(tmp_path / "c.tif", values, t262=0, t281=4095))[..., 0] == 255 - want).all()  # 0 is white
    (tmp_path / "d.pgm").write_bytes(b"P5 3 1 4095\n" + struct.pack(">3H", 0, 1000, 4095))
    assert np.abs(pixels(tmp_path / "d.pgm")[0, :, 0] - np.array([0.0, 62, 255])).max() <= 1
    signed = np.array([[-100, 0, 100]], dtype=np.int32)
    assert (pixels(tiff(tmp_path / "e.tif", signed, t340=-100, t341=100))[..., 0] == [[0, 128, 255]]).all()


def test_pil_pictures_of_many_bits(tmp_path: Path) -> None:
    assert (pixels(Image.fromarray(GREYS))[..., 0] == np.rint(GREYS / 257)).all()
    assert (pixels(Image.fromarray(GREYS.astype(np.int32)))[..., 0] == np.rint(GREYS / 257)).all()
    with pytest.raises(PictureError, match="outside 0 to 65535: a picture in memory"):
        open_picture(Image.fromarray(np.array([[70000]], dtype=np.int32)))


@pytest.mark.parametrize("kind", ["float", "signed", "32 bit", "no range"])
def test_what_has_no_known_white_is_refused_with_the_file(tmp_path: Path, kind: str) -> None:
    values = np.zeros((2, 2), dtype=np.float32 if kind == "float" else np.int32)
    path = tiff(tmp_path / "x.tif", values, **({"t280": 5, "t281": 5} if kind == "no range" else {}))
    with pytest.raises(PictureError, match=r"x\.tif; its value of white is unknown"):
        open_picture(path)
    with pytest.raises(PictureError, match=r"x\.tif"):  # the range is stated in the header
        read_header(path)
    with pytest.raises(PictureError, match="floating-point"):
        open_picture(Image.new("F", (2, 2)))


RGBA = np.array([[[200, 40, 0, 255], [200, 40, 0, 128], [200, 40, 0, 0]]], dtype=np.uint8)


def on_white(rgba: np.ndarray) -> np.ndarray:
    """The conversion of transparent pictures in the family's own loader."""
    picture = Image.fromarray(rgba)
    white = Image.new("RGB", picture.size, (255, 255, 255))
    white.paste(picture, mask=picture.split()[3])
    return np.asarray(white)


def test_transparent_pictures_go_on_white(tmp_path: Path) -> None:
    rgba = Image.fromarray(RGBA)
    for suffix in ("png", "webp", "tif"):
        rgba.save(tmp_path / f"a.{suffix}", **({"lossless": True, "exact": True} if suffix == "webp" else {}))
        assert (pixels(tmp_path / f"a.{suffix}") == on_white(RGBA)).all()
    assert (pixels(rgba) == on_white(RGBA)).all()
    assert (pixels(rgba.convert("RGBa"))[0, [0, 2]] == on_white(RGBA)[0, [0, 2]]).all()
    grey = Image.merge("LA", (Image.new("L", (3, 1), 40), rgba.getchannel("A")))
    grey.save(tmp_path / "la.png")
    assert pixels(tmp_path / "la.png")[0, :, 0].tolist() == [40, 147, 255]
    assert pixels(grey.convert("La"))[0, 2].tolist() == [255, 255, 255]


def test_tRNS_is_transparency(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert pixels(tmp_path / "p.png").tolist() == [[[255, 255, 255], [10, 20, 30]]]
    palette.save(tmp_path / "p.gif", transparency=0)
    assert pixels(tmp_path / "p.gif").tolist() == [[[255, 255, 255], [10, 20, 30]]]
    palette.save(tmp_path / "half.png", transparency=bytes([255, 128]))
    assert pixels(tmp_path / "half.png").tolist()[0][0] == [0, 0, 0]
    assert pixels(tmp_path / "half.png").tolist()[0][1] == pytest.approx([132, 137, 142], abs=1)
    Image.fromarray(np.array([[7, 8]], dtype=np.uint8)).save(tmp_path / "l.png", transparency=7)
    assert pixels(tmp_path / "l.png")[0, :, 0].tolist() == [255, 8]
    Image.fromarray(RGBA[..., :3]).save(tmp_path / "rgb.png", transparency=(200, 40, 0))
    assert (pixels(tmp_path / "rgb.png") == 255).all()
    chunk = b"tRNS" + struct.pack(">H", 257)
    Image.fromarray(GREYS).save(tmp_path / "g.png")
    data = (tmp_path / "g.png").read_bytes()
    at = data.index(b"IDAT") - 4
    new = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "g.png").write_bytes(data[:at] + new + data[at:])
    assert pixels(tmp_path / "g.png")[0, :, 0].tolist() == [0, 255, 16]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGB"])
def test_other_modes_are_as_pil_converts_them(mode: str) -> None:
    image = Image.fromarray(RGBA[..., :3]).convert(mode)
    assert (pixels(image) == np.asarray(image.convert("RGB"))).all()
    assert open_picture(image).mode == "RGB"


# ---- EXIF

SPOTS = np.arange(6 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10  # 3 wide, 2 high


def with_orientation(path: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(SPOTS).save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_those_stored_unless_turning_is_asked_for(tmp_path: Path, suffix: str, orientation: int) -> None:

    path = with_orientation(tmp_path / f"o.{suffix}", orientation)
    stored, turned = pixels(path), pixels(Picture(path, turned=True))
    if suffix != "jpg":
        assert (stored == SPOTS).all()
    with Image.open(path) as raw:
        want = np.asarray(ImageOps.exif_transpose(raw))
    assert (turned == want).all()
    assert picture_size(path) == (3, 2) == stored.shape[1::-1]
    assert picture_size(Picture(path, turned=True)) == turned.shape[1::-1]
    assert read_header(path).orientation == orientation


def test_a_damaged_tag_turns_nothing(tmp_path: Path) -> None:
    Image.fromarray(SPOTS).save(tmp_path / "bad.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert picture_size(Picture(tmp_path / "bad.jpg", turned=True)) == (3, 2)


# ---- broken and large pictures


def test_broken_and_missing_files_are_named(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "webp", "tif", "gif", "bmp"):
        path = tmp_path / f"cut.{suffix}"
        noise.save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(PictureError, match=rf"image cannot be read: .*cut\.{suffix} \("):
            open_picture(path)
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(PictureError, match=r"no\.png .*not a picture of a known format"):
        read_header(tmp_path / "no.png")
    with pytest.raises(PictureError, match=r"image not found: .*gone\.png"):
        open_picture(tmp_path / "gone.png")
    with pytest.raises(PictureError, match="cannot be read: row 3"):
        open_picture(Picture(data=b"", name="row 3"))


def huge_png(path: Path, width: int, height: int) -> Path:
    """A small file of a grey picture with many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packed = zlib.compressobj(9)
    data = b"".join(packed.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + packed.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("sides", [(12_000, 12_000), (30_000, 30_000), (8_001, 8_000)])
def test_an_over_large_picture_names_limit_and_key_and_is_not_decoded(tmp_path: Path, sides: tuple[int, int]) -> None:
    path = huge_png(tmp_path / "bomb.png", *sides)
    with pytest.raises(PictureError, match=rf"{sides[0]}x{sides[1]}.*64,000,000.*bomb\.png.*data\.max_image_pixels"):
        open_picture(path)
    area = sides[0] * sides[1]
    assert picture_size(Picture(path, max_pixels=area)) == sides
    before = Image.MAX_IMAGE_PIXELS
    assert before is not None  # PIL's own limit stays in force for other code


def test_a_raised_limit_is_the_only_one(tmp_path: Path) -> None:
    path = huge_png(tmp_path / "wide.png", 200_000, 900)  # 180 million pixels, which PIL alone would refuse
    with pytest.raises(PictureError, match="more than the limit of 179,999,999"):
        open_picture(Picture(path, max_pixels=179_999_999))
    assert picture_size(Picture(path, max_pixels=180_000_000)) == (200_000, 900)


def test_one_large_picture_is_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "LARGE", 100)
    Image.new("RGB", (20, 20)).save(tmp_path / "large.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "small.png")
    opened = threading.Event()

    def second() -> None:
        with opened_picture(tmp_path / "large.png"):
            opened.set()

    with opened_picture(tmp_path / "large.png"):
        thread = threading.Thread(target=second)
        thread.start()
        assert open_picture(tmp_path / "small.png").size == (4, 4)
        assert not opened.wait(0.2)
    assert opened.wait(10)
    thread.join()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "RGBa", "PA", "I;16", "I", "P"])
def test_bands_change_no_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (37, 23, 4), dtype=np.uint8)
    if mode.startswith("I"):
        image = Image.fromarray(noise[..., 0].astype(np.uint16 if mode == "I;16" else np.int32) * 257)
    else:
        image = Image.fromarray(noise).convert(
            "RGBA" if mode in ("RGBA", "RGBa") else "LA" if "a" in mode.lower() else "P"
        )
        image = image.convert(mode) if mode in ("La", "RGBa", "PA") else image
    if mode == "P":
        image.save(tmp_path / "p.png", transparency=bytes(range(200)))
        image = tmp_path / "p.png"
    whole = pixels(image)
    monkeypatch.setattr(pictures, "BAND", 60)
    assert (pixels(image) == whole).all()


PEAK = """
import sys
from pathlib import Path
import numpy, PIL.PngImagePlugin
from fastrl.data.pictures import opened_picture

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

before = peak()
with opened_picture(Path(sys.argv[1])) as picture:
    width, height = picture.size
print((peak() - before) / (width * height))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("mode", "most"), [("RGB", 4), ("RGBA", 8), ("L", 5), ("I;16", 6)])
def test_peak_memory_of_a_large_picture(tmp_path: Path, mode: str, most: int) -> None:
    """Bytes per pixel: PIL has 4 for RGB, RGBA and LA, 1 for grey, 2 for 16-bit grey; docs/data.md states these
    numbers."""
    Image.new(mode, (4100, 4000)).save(tmp_path / "x.png", compress_level=1)
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path / "x.png"], capture_output=True, text=True, check=True)
    assert float(done.stdout) < most + 1.5


# ---- for servers


def decoded(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_a_server_is_sent_what_we_see(tmp_path: Path) -> None:
    plain = with_orientation(tmp_path / "plain.jpg", 1)
    assert base64.b64decode(data_url(plain).partition(",")[2]) == plain.read_bytes()  # the bytes of the file
    assert data_url(Picture(data=plain.read_bytes())) == data_url(plain)
    Image.fromarray(RGBA).save(tmp_path / "clear.png")
    Image.fromarray(GREYS).save(tmp_path / "deep.png")
    turned = with_orientation(tmp_path / "turned.jpg", 6)
    for path in (tmp_path / "clear.png", tmp_path / "deep.png", turned, Picture(turned, turned=True)):
        url = data_url(path)
        assert url.startswith("data:image/png")
        assert (np.asarray(decoded(url).convert("RGB")) == pixels(path)).all()


# ---- one door


def test_no_other_code_opens_a_picture() -> None:
    """So whatever holds here (depth, transparency, orientation, limits) holds in training, reports and for servers."""
    root = Path(pictures.__file__).parents[1]
    opening = re.compile(r"\b(?:Image|pil|PIL)\.open\(|\bimread\(|ImageOps|load_image\(")
    assert [path.name for path in root.rglob("*.py") if opening.search(path.read_text("utf-8"))] == ["pictures.py"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_reader_of_a_record_sees_it_turned(tmp_path: Path, orientation: int) -> None:
    """The figure of ``fastrl data`` and of the report, a logger's picture, a server's, and the size for predictions."""
    from matplotlib.figure import Figure

    from fastrl.data import load_data
    from fastrl.report.figures import draw_answer
    from fastrl.run.samples import drawn

    stored = with_orientation(tmp_path / "o.png", orientation)
    (tmp_path / "rows.jsonl").write_text('{"image": "o.png", "expression": "a", "bbox": [0, 0, 1, 1]}')
    with Image.open(stored) as raw:
        upright = np.asarray(ImageOps.exif_transpose(raw))
    for query, want in (("", SPOTS), ("?orient=exif", upright)):
        (record,) = load_data(f"refexp:{tmp_path / 'rows.jsonl'}{query}")
        image = record.images[0]
        assert (pixels(image) == want).all()
        assert (np.asarray(decoded(data_url(image)).convert("RGB")) == want).all()
        assert picture_size(image) == want.shape[1::-1]
        assert drawn(record, "").size == want.shape[1::-1]
        axis = Figure().subplots()
        draw_answer(axis, record, "")
        assert (np.asarray(axis.images[0].get_array()) == want).all()


def test_base64_of_a_picture_is_told_from_the_name_of_a_file() -> None:
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "gif")
    said = base64.b64encode(file.getvalue()).decode()
    assert pictures.base64_picture(said) == file.getvalue()
    assert pictures.base64_picture(f"data:image/gif;base64,{said}") == file.getvalue()
    assert pictures.holds_picture(said)
    assert pictures.holds_picture(b"")
    assert pictures.holds_picture({"bytes": b"", "path": None})
    for name in ("", "a.png", "/9j/" * 20, "data:image/gif;base64,!", said[:-1], said + "=", "a/" * 40, f"{said}.gif"):
        assert pictures.base64_picture(name) is None
        assert not pictures.holds_picture(name)
    assert not pictures.holds_picture(None)
    assert not pictures.holds_picture({"bytes": None, "path": "a.png"})
