"""Coordinate frames: what the numbers in an answer mean, and how they map to pixels of the original image.

Four frames, all with x to the right and y down, (0, 0) at the upper left corner:

- ``original``: pixels of the image file. Every truth of a ``Record`` is in this frame.
- ``resized``: pixels of the image after the processor's resize (Qwen2.5-VL answers in these).
- ``thousand``: 0-1000 across each side (Qwen2-VL answers in these, and so do trajectory answers).
- ``unit``: 0-1 across each side.

``auto`` is not a frame: ``resolve_frame`` turns it into one by looking at how an answer is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fastrl.answers.parse import Parsed
    from fastrl.answers.tracks import ParsedTracks

Frame = Literal["auto", "resized", "thousand", "original", "unit"]
FRAMES: tuple[str, ...] = ("auto", "resized", "thousand", "original", "unit")
STYLE_FRAME = {"qwen2_5": "resized", "qwen2": "thousand"}  # the frame each model family answers in
TASK_FRAME = {"trajectory": "thousand"}  # tasks whose answers are in one frame whatever the family


@dataclass(frozen=True)
class View:
    """Original and resized size of one image, in pixels."""

    width: int
    height: int
    resized_width: int
    resized_height: int

    def __post_init__(self) -> None:
        for name in ("width", "height", "resized_width", "resized_height"):
            if getattr(self, name) < 1:
                raise ValueError(f"View.{name} must be at least 1 pixel, got {getattr(self, name)}")

    @classmethod
    def unresized(cls, width: int, height: int) -> View:
        """A view whose model sees the image at its own size."""
        return cls(width, height, width, height)

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
        """(width, height) of the whole image in units of ``frame``. Raises ``ValueError`` on ``auto`` or unknown."""
        if frame == "original":
            return float(self.width), float(self.height)
        if frame == "resized":
            return float(self.resized_width), float(self.resized_height)
        if frame == "thousand":
            return 1000.0, 1000.0
        if frame == "unit":
            return 1.0, 1.0
        check_frame(frame)
        raise ValueError("frame 'auto' says nothing about coordinates yet: call resolve_frame first")


def check_frame(frame: str) -> None:
    """Raise ``ValueError`` unless ``frame`` is one of ``FRAMES``."""
    if frame not in FRAMES:
        raise ValueError(f"unknown coordinate frame {frame!r}; allowed: {', '.join(FRAMES)}")


def _rescale(coords: Sequence[float], source: tuple[float, float], target: tuple[float, float]) -> tuple[float, ...]:
    if len(coords) % 2:
        raise ValueError(f"coordinates must alternate x, y; got {len(coords)} numbers")
    # Multiply before dividing: v * target / source is exact where v is a multiple of source, so corners stay corners.
    return tuple(float(v) * target[i % 2] / source[i % 2] for i, v in enumerate(coords))


def to_original(coords: Sequence[float], frame: str, view: View) -> tuple[float, ...]:
    """Alternating x, y (a box or a point) in ``frame`` → pixels of the original image. Values are not clipped."""
    return _rescale(coords, view.size(frame), view.size("original"))


def from_original(coords: Sequence[float], frame: str, view: View) -> tuple[float, ...]:
    """Alternating x, y in pixels of the original image → ``frame``. Values are neither rounded nor clipped."""
    return _rescale(coords, view.size("original"), view.size(frame))


def resolve_frame(parsed: Parsed | ParsedTracks, frame: str) -> str:
    """``frame`` itself, or for ``auto`` the frame an answer is most likely written in.

    Qwen2-VL box tokens and trajectory text → ``thousand``; no value beyond 1 and at least one written with a decimal
    point → ``unit``; anything else → ``resized``.
    """
    check_frame(frame)
    if frame != "auto":
        return frame
    if parsed.format in ("qwen2", "tracks"):
        return "thousand"
    if parsed.decimal and all(abs(v) <= 1.0 for item in parsed for v in item.coords):
        return "unit"
    return "resized"
