"""Coordinate frames: the unit of the numbers in an answer, and their mapping to pixels of the original image.

There are five frames, all with x to the right and y down, (0, 0) at the upper left corner:

- ``original``: pixels of the image file. Every truth of a ``Record`` is in this frame.
- ``resized``: pixels of the image as the model sees it, padding included (Qwen2.5-VL, which pads nothing).
- ``thousand``: 0-1000 across each side (used by Qwen2-VL and by trajectory answers).
- ``unit``: 0-1 across each side.
- ``padded_unit``: 0-1 across each side of the picture as the model sees it, padding included (used by LLaVA-1.5, whose
  pictures are padded to squares). Without padding it equals ``unit``.

``auto`` is not a frame: ``resolve_frame`` replaces it by one that fits the notation of an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fastrl.answers.items import Parsed
    from fastrl.answers.tracks import ParsedTracks

Frame = Literal["auto", "resized", "thousand", "original", "unit", "padded_unit"]
FRAMES: tuple[str, ...] = ("auto", "resized", "thousand", "original", "unit", "padded_unit")
SEEN = ("resized", "padded_unit")  # frames of the picture as the model sees it; the others are of the image itself
IN_THOUSAND = ("qwen2", "internvl", "glm", "gemma", "tracks")  # notations (``Parsed.format``) that imply ``thousand``
IN_UNIT = ("molmo", "paligemma")
TASK_FRAME = {"trajectory": "thousand"}  # tasks with a fixed frame for all families


@dataclass(frozen=True)
class View:
    """Original size of an image, and the part of it that a model sees with its resized size, in pixels.

    A model sees a canvas of ``resized_width`` x ``resized_height``: the resized image, possibly padded or cropped
    first. Its extent in pixels of the original is ``canvas`` (left, top, right, bottom): (0, 0, width, height) by
    default, (0, -80, 640, 560) for a 640 x 480 image padded to a square, and within the image for a crop.
    """

    width: int
    height: int
    resized_width: int
    resized_height: int
    canvas: tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("width", "height", "resized_width", "resized_height"):
            if getattr(self, name) < 1:
                raise ValueError(f"View.{name} must be at least 1 pixel, got {getattr(self, name)}")
        left, top, right, bottom = self.canvas or (0, 0, 1, 1)
        if not (left < right and top < bottom):
            raise ValueError(f"View.canvas must be (left, top, right, bottom) with an extent, got {self.canvas}")

    @classmethod
    def unresized(cls, width: int, height: int) -> View:
        """A view of the image at its own size."""
        return cls(width, height, width, height)

    @classmethod
    def padded(cls, width: int, height: int, side: int) -> View:
        """A view of the image in the middle of a square that is resized to ``side`` pixels."""
        whole = max(width, height)
        left, top = -((whole - width) // 2), -((whole - height) // 2)
        return cls(width, height, side, side, (left, top, left + whole, top + whole))

    @classmethod
    def qwen(
        cls,
        width: int,
        height: int,
        *,
        patch_size: int = 14,
        merge_size: int = 2,
        min_pixels: int = 56 * 56,
        max_pixels: int = 14 * 14 * 4 * 1280,
    ) -> View:
        """The view the Qwen-VL image processor makes of a ``width`` x ``height`` image (its own ``smart_resize``).

        Both resized sides are multiples of ``patch_size * merge_size`` and their product lies in
        [``min_pixels``, ``max_pixels``]. Raises ``ValueError`` for aspect ratios above 200, as the processor does.
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        factor = patch_size * merge_size
        resized_height, resized_width = smart_resize(
            height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels
        )
        return cls(width, height, int(resized_width), int(resized_height))

    def size(self, frame: str) -> tuple[float, float]:
        """(width, height) of the whole image, or of the model's view of it (``SEEN``), in the frame's units. Raises
        ``ValueError`` for ``auto`` and unknown frames."""
        if frame == "original":
            return float(self.width), float(self.height)
        if frame == "resized":
            return float(self.resized_width), float(self.resized_height)
        if frame == "thousand":
            return 1000.0, 1000.0
        if frame in ("unit", "padded_unit"):
            return 1.0, 1.0
        check_frame(frame)
        raise ValueError("frame 'auto' is not a coordinate frame: call resolve_frame first")


def check_frame(frame: str) -> None:
    """Raise ``ValueError`` unless ``frame`` is one of ``FRAMES``."""
    if frame not in FRAMES:
        raise ValueError(f"unknown coordinate frame {frame!r}; allowed: {', '.join(FRAMES)}")


def _extent(frame: str, view: View) -> tuple[tuple[float, float], tuple[float, float]]:
    """Corner and size of the frame's extent, in pixels of the original image."""
    if frame in SEEN and view.canvas is not None:
        left, top, right, bottom = view.canvas
        return (left, top), (right - left, bottom - top)
    return (0.0, 0.0), view.size("original")


def _pairs(coords: Sequence[float]) -> Iterator[tuple[float, int]]:
    """Each number with its axis."""
    if len(coords) % 2:
        raise ValueError(f"coordinates must alternate x, y; got {len(coords)} numbers")
    return ((float(v), i % 2) for i, v in enumerate(coords))


# Multiply before dividing: v * target / source is exact if v is a multiple of source, so corners stay exact.


def to_original(coords: Sequence[float], frame: str, view: View) -> tuple[float, ...]:
    """Alternating x, y (a box or a point) in ``frame`` → pixels of the original image. Values are not clipped."""
    units, (corner, extent) = view.size(frame), _extent(frame, view)
    return tuple(v * extent[axis] / units[axis] + corner[axis] for v, axis in _pairs(coords))


def from_original(coords: Sequence[float], frame: str, view: View) -> tuple[float, ...]:
    """Alternating x, y in pixels of the original image → ``frame``. Values are neither rounded nor clipped."""
    units, (corner, extent) = view.size(frame), _extent(frame, view)
    return tuple((v - corner[axis]) * units[axis] / extent[axis] for v, axis in _pairs(coords))


def resolve_frame(parsed: Parsed | ParsedTracks, frame: str) -> str:
    """``frame`` itself, or for ``auto`` the most likely frame of an answer.

    Notations with a fixed frame determine it: Qwen2-VL's and GLM's box tokens, InternVL's tags, Gemma's ``box_2d`` and
    trajectory text → ``thousand``. No value beyond 1 and at least one written with a decimal point → ``unit``; anything
    else → ``resized``. Molmo's and PaliGemma's numbers are fractions of the sides for any ``frame``: the parser
    converts them.
    """
    check_frame(frame)
    if parsed.format in IN_UNIT:
        return "unit"
    if frame != "auto":
        return frame
    if parsed.format in IN_THOUSAND:
        return "thousand"
    if parsed.decimal and all(abs(v) <= 1.0 for item in parsed for v in item.coords):
        return "unit"
    return "resized"
