"""Coordinate frames: what the numbers in an answer mean, and how they map to pixels of the original image.

Five frames, all with x to the right and y down, (0, 0) at the upper left corner:

- ``original``: pixels of the image file. Every truth of a ``Record`` is in this frame.
- ``resized``: pixels of the image as the model sees it, padding included (Qwen2.5-VL, which pads nothing).
- ``thousand``: 0-1000 across each side (Qwen2-VL answers in these, and so do trajectory answers).
- ``unit``: 0-1 across each side.
- ``padded_unit``: 0-1 across each side of what the model sees, padding included (LLaVA-1.5 answers in these: its
  pictures are padded to squares). Without padding it is ``unit``.

``auto`` is not a frame: ``resolve_frame`` turns it into one by looking at how an answer is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fastrl.answers.parse import Parsed
    from fastrl.answers.tracks import ParsedTracks

Frame = Literal["auto", "resized", "thousand", "original", "unit", "padded_unit"]
FRAMES: tuple[str, ...] = ("auto", "resized", "thousand", "original", "unit", "padded_unit")
SEEN = ("resized", "padded_unit")  # frames across what the model sees; the others lie across the image itself
IN_THOUSAND = ("qwen2", "internvl", "glm", "gemma", "tracks")  # forms (``Parsed.format``) of one frame alone
IN_UNIT = ("molmo", "paligemma")
TASK_FRAME = {"trajectory": "thousand"}  # tasks whose answers are in one frame whatever the family


@dataclass(frozen=True)
class View:
    """Original size of one image, and what of it a model sees at which size, in pixels.

    A model sees a canvas of ``resized_width`` x ``resized_height``: the image resized, or first padded (or cropped).
    Its extent in pixels of the original is ``canvas`` (left, top, right, bottom): (0, 0, width, height) unless given,
    (0, -80, 640, 560) for a 640 x 480 image padded to a square, and within the image for a crop.
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
        """A view whose model sees the image at its own size."""
        return cls(width, height, width, height)

    @classmethod
    def padded(cls, width: int, height: int, side: int) -> View:
        """A view whose model sees the image in the middle of a square, resized to ``side`` pixels."""
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
        """(width, height) of the frame's whole extent in its units: of the image, or of what the model sees of it
        (``SEEN``). Raises ``ValueError`` on ``auto`` or unknown."""
        if frame == "original":
            return float(self.width), float(self.height)
        if frame == "resized":
            return float(self.resized_width), float(self.resized_height)
        if frame == "thousand":
            return 1000.0, 1000.0
        if frame in ("unit", "padded_unit"):
            return 1.0, 1.0
        check_frame(frame)
        raise ValueError("frame 'auto' says nothing about coordinates yet: call resolve_frame first")


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


# Multiply before dividing: v * target / source is exact where v is a multiple of source, so corners stay corners.


def to_original(coords: Sequence[float], frame: str, view: View) -> tuple[float, ...]:
    """Alternating x, y (a box or a point) in ``frame`` → pixels of the original image. Values are not clipped."""
    units, (corner, extent) = view.size(frame), _extent(frame, view)
    return tuple(v * extent[axis] / units[axis] + corner[axis] for v, axis in _pairs(coords))


def from_original(coords: Sequence[float], frame: str, view: View) -> tuple[float, ...]:
    """Alternating x, y in pixels of the original image → ``frame``. Values are neither rounded nor clipped."""
    units, (corner, extent) = view.size(frame), _extent(frame, view)
    return tuple((v - corner[axis]) * units[axis] / extent[axis] for v, axis in _pairs(coords))


def resolve_frame(parsed: Parsed | ParsedTracks, frame: str) -> str:
    """``frame`` itself, or for ``auto`` the frame an answer is most likely written in.

    A form that only one frame is written in says it: Qwen2-VL's and GLM's box tokens, InternVL's tags, Gemma's
    ``box_2d`` and trajectory text → ``thousand``. No value beyond 1 and at least one written with a decimal point →
    ``unit``; anything else → ``resized``. Molmo's and PaliGemma's numbers are parts of the sides whatever ``frame``
    says: the parser makes them that.
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
