"""InternVL3 and InternVL3.5 (arXiv:2504.10479, 2508.18265), the ``-hf`` folders: tiles and a thumbnail of each picture.

A picture becomes the grid of square tiles closest to its aspect ratio, followed by a thumbnail if there is more than
one tile. The released processor cuts tiles even if its file sets ``crop_to_patches`` to false; so does this one.
``ImageInput.shape`` is (rows, columns) of the grid; the pixels are [squares, 3, side, side].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastrl.answers import View
from fastrl.batch import ImageInput
from fastrl.models.families.base import Family, VisionFeatures
from fastrl.models.families.llava import folder_processor, pixels_of, pooled, refuse_limits
from fastrl.models.vision import ImagePreprocessor

if TYPE_CHECKING:
    from PIL.Image import Image


class InternVL(Family):
    """InternVL: answers with labels and its own box tokens, 0-1000."""

    model_type: ClassVar[str] = "internvl"
    style: ClassVar[str] = "internvl"
    end_of_turn: ClassVar[str] = "<|im_end|>"
    control_tokens: ClassVar[tuple[str, ...]] = (
        *("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        *("<|im_start|>", "<|endoftext|>"),
    )

    @classmethod
    def model_class(cls) -> Any:
        from transformers import InternVLForConditionalGeneration

        return InternVLForConditionalGeneration

    @property
    def side(self) -> int:
        """Side of a tile in pixels."""
        size = self.config.vision_config.image_size
        return size if isinstance(size, int) else size[0]

    @property
    def grid_side(self) -> int:
        """Tokens along one side of a tile."""
        patch = self.config.vision_config.patch_size
        patches = self.side // (patch if isinstance(patch, int) else patch[0])
        return int(patches * self.config.downsample_ratio)

    def preprocessor(
        self, folder: Path, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> TilePreprocessor:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        refuse_limits(self, min_pixels, max_pixels)
        return TilePreprocessor(folder_processor(GotOcr2ImageProcessorPil, folder))

    def image_limit(self, folder: Path) -> int | None:
        return int(self.preprocessor(folder).processor.max_patches) * self.side**2

    def tokens(self, image: ImageInput) -> int:
        return len(image.pixel_values) * self.grid_side**2

    def patches(self, image: ImageInput) -> int:
        return round(self.tokens(image) / self.config.downsample_ratio**2)

    def blank(self, pixels: int, *, key: str = "") -> ImageInput:
        """A square grid of as many tiles as fit into ``pixels``."""
        across = max(1, math.isqrt(pixels) // self.side)
        squares = across**2 + (across > 1)
        return ImageInput(torch.empty(squares, 3, self.side, self.side, device="meta"), (across, across), key)

    def heat(self, image: ImageInput, values: Tensor) -> Tensor:
        """A map of the tiles; the thumbnail's values are spread evenly over it."""
        rows, columns = image.shape
        side, count = self.grid_side, rows * columns * self.grid_side**2
        tiles = values[:count].view(rows, columns, side, side).transpose(1, 2).reshape(rows * side, columns * side)
        return tiles + values[count:].sum() / count

    def expansion(self, image: ImageInput) -> list[int]:
        return [*self.ids("<img>"), *super().expansion(image), *self.ids("</img>")]

    def features(self, core: Any, images: Sequence[ImageInput]) -> list[VisionFeatures]:
        if not images:
            return []
        with torch.set_grad_enabled(self.trained(core)):
            tokens = torch.cat(list(pooled(core, pixel_values=pixels_of(self, core, images))))
        return [VisionFeatures(part) for part in tokens.split([self.tokens(image) for image in images])]


class TilePreprocessor(ImagePreprocessor):
    """Tiles, followed by a thumbnail if there are several."""

    @property
    def settings(self) -> str:
        p = self.processor
        return f"{dict(p.size)} {p.min_patches} {p.max_patches}"

    def read(self, picture: Image, key: str, among: int) -> tuple[ImageInput, View]:
        import numpy as np
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        p, (width, height) = self.processor, picture.size
        side = p.size["height"], p.size["width"]
        columns, rows = get_optimal_tiled_canvas((height, width), side, p.min_patches, p.max_patches)
        pixels = p(images=[picture], crop_to_patches=True, return_tensors="pt")["pixel_values"].float()
        original = torch.from_numpy(np.array(picture.convert("RGB")))
        image = ImageInput(pixels, (rows, columns), key, original=original)
        return image, View(width, height, columns * side[1], rows * side[0])

    def picture(self, image: ImageInput) -> Image:
        from PIL import Image as pil

        assert image.original is not None
        return pil.fromarray(image.original.numpy())
