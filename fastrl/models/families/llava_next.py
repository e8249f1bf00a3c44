"""LLaVA-NeXT (LLaVA-1.6), LLaVA-NeXT-Video and LLaVA-OneVision (arXiv:2408.03326): tiles of any resolution.

A picture becomes one square of the whole and tiles at the best-fitting resolution. Padding is cut from the features,
and each row of them ends with a learned newline. ``ImageInput.shape`` is (height, width, tiled) of the original; the
pixels are [squares, 3, side, side]. As these cannot be turned back into the picture, it is stored with them.
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
from fastrl.models.families.base import VisionFeatures
from fastrl.models.families.llava import LlavaFamily, folder_processor, pixels_of, pooled, refuse_limits
from fastrl.models.vision import ImagePreprocessor

if TYPE_CHECKING:
    from PIL.Image import Image

ONEVISION_7B: dict[str, Any] = {
    "model_type": "llava_onevision",
    "image_grid_pinpoints": [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "vision_use_head": False,
    },
}


_CLIP_336: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def _next(
    text_type: str, hidden: int, inner: int, layers: int, heads: int, kv: int, model_type: str = "llava_next"
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "text_config": {
            "model_type": text_type,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "vocab_size": 32064,
            **({"sliding_window": None} if text_type == "mistral" else {}),
        },
        "vision_config": _CLIP_336,
    }


class LlavaNext(LlavaFamily):
    """LLaVA-NeXT: answers in 0-1 of the picture."""

    model_type: ClassVar[str] = "llava_next"
    style: ClassVar[str] = "llava_next"
    part_names: ClassVar = {
        "language": ("model.language_model", "lm_head"),
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector", "model.image_newline"),
    }
    published: ClassVar = {  # sizes as in the config.json each model is published with
        "llava-hf/llava-v1.6-mistral-7b-hf": _next("mistral", 4096, 14336, 32, 32, 8),
        "llava-hf/llava-v1.6-vicuna-13b-hf": _next("llama", 5120, 13824, 40, 40, 40),
    }

    @classmethod
    def model_class(cls) -> Any:
        from transformers import LlavaNextForConditionalGeneration

        return LlavaNextForConditionalGeneration

    @classmethod
    def processor_class(cls) -> Any:
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        return LlavaNextImageProcessorPil

    def preprocessor(
        self, folder: Path, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> TilePreprocessor:
        refuse_limits(self, min_pixels, max_pixels)
        return TilePreprocessor(folder_processor(self.processor_class(), folder))

    def image_limit(self, folder: Path) -> int | None:
        return max(height * width for height, width in self.config.image_grid_pinpoints)

    def tokens(self, image: ImageInput) -> int:
        rows, columns = self._fitted(image)
        return self.square_tokens + rows * (columns + 1)

    def blank(self, pixels: int, *, key: str = "") -> ImageInput:
        """A picture that fills the largest resolution within ``pixels`` (the smallest one if none is)."""
        sizes = sorted(self.config.image_grid_pinpoints, key=lambda size: (size[0] * size[1], size))
        height, width = next((s for s in reversed(sizes) if s[0] * s[1] <= pixels), sizes[0])
        squares = 1 + (height // self.side) * (width // self.side)
        pixel_values = torch.empty(squares, 3, self.side, self.side, device="meta")
        return ImageInput(pixel_values, (height, width, 1), key)

    def heat(self, image: ImageInput, values: Tensor) -> Tensor:
        """A map of the tiles' features. Newline values are added to the last column; those of the square of the whole
        picture are spread evenly."""
        rows, columns = self._fitted(image)
        square, tiles = values[: self.square_tokens], values[self.square_tokens :].view(rows, columns + 1)
        seen = tiles[:, :-1].clone()
        seen[:, -1] += tiles[:, -1]
        return seen + square.sum() / seen.numel()

    def features(self, core: Any, images: Sequence[ImageInput]) -> list[VisionFeatures]:
        if not images:
            return []
        sizes = torch.tensor([image.shape[:2] for image in images])
        with torch.set_grad_enabled(self.trained(core)):
            found = pooled(core, pixel_values=pixels_of(self, core, images), image_sizes=sizes)
        return [VisionFeatures(tokens) for tokens in found]

    def _fitted(self, image: ImageInput) -> tuple[int, int]:
        """Rows and columns of a picture's tiled features, padding cut off."""
        from transformers.image_processing_utils import select_best_resolution

        height, width = image.shape[:2]
        tall, wide = select_best_resolution((height, width), self.config.image_grid_pinpoints)
        rows, columns = (side // self.side * self.grid_side for side in (tall, wide))
        if width / height > columns / rows:
            kept = int(round(height * (columns / width), 7))
            return rows - (rows - kept) // 2 * 2, columns
        kept = int(round(width * (rows / height), 7))
        return rows, columns - (columns - kept) // 2 * 2


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT-Video: frames are treated as pictures, each with all its tokens."""

    model_type: ClassVar[str] = "llava_next_video"
    served_images: ClassVar[int | None] = 0  # videos only
    published: ClassVar = {
        "llava-hf/LLaVA-NeXT-Video-7B-hf": _next("llama", 4096, 11008, 32, 32, 32, model_type="llava_next_video")
    }

    @classmethod
    def model_class(cls) -> Any:
        from transformers import LlavaNextVideoForConditionalGeneration

        return LlavaNextVideoForConditionalGeneration


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: SigLIP and Qwen2. Only a prompt's single picture is tiled; each of several is one square."""

    model_type: ClassVar[str] = "llava_onevision"
    served_images: ClassVar[int | None] = 1  # with several, vLLM's own code tiles each of them
    served_lora: ClassVar[bool] = False
    end_of_turn: ClassVar[str] = "<|im_end|>"
    control_tokens: ClassVar[tuple[str, ...]] = ("<image>", "<video>", "<|im_start|>", "<|endoftext|>")
    # sizes as in the config.json it is published with
    published: ClassVar = {"llava-hf/llava-onevision-qwen2-7b-ov-hf": ONEVISION_7B}

    @classmethod
    def model_class(cls) -> Any:
        from transformers import LlavaOnevisionForConditionalGeneration

        return LlavaOnevisionForConditionalGeneration

    @classmethod
    def processor_class(cls) -> Any:
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        return LlavaOnevisionImageProcessorPil

    def preprocessor(
        self, folder: Path, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> TilePreprocessor:
        refuse_limits(self, min_pixels, max_pixels)
        return AlonePreprocessor(folder_processor(self.processor_class(), folder))

    def turn(self, text: str, end: str) -> str:
        return text + end

    def tokens(self, image: ImageInput) -> int:
        return super().tokens(image) if image.shape[2] else self.square_tokens + 1

    def blank_among(self, pixels: int, count: int) -> ImageInput:
        if count <= 1:
            return self.blank(pixels)
        return ImageInput(torch.empty(1, 3, self.side, self.side, device="meta"), (self.side, self.side, 0), "")

    def heat(self, image: ImageInput, values: Tensor) -> Tensor:
        if image.shape[2]:
            return super().heat(image, values)
        seen = values[:-1].clone()
        seen[-1] += values[-1]  # the newline's
        return seen[-(self.grid_side**2) :].view(self.grid_side, -1)

    def features(self, core: Any, images: Sequence[ImageInput]) -> list[VisionFeatures]:
        found: dict[str, Tensor] = {}
        with torch.set_grad_enabled(self.trained(core)):
            for tiled in (1, 0):
                call = [image for image in images if image.shape[2] == tiled]
                if call:
                    sizes = torch.tensor([image.shape[:2] for image in call])
                    prompts = [1] * len(call) if tiled else [max(2, len(call))]
                    tokens = pooled(
                        core, pixel_values=pixels_of(self, core, call), image_sizes=sizes, batch_num_images=prompts
                    )
                    found |= zip((image.key for image in call), tokens, strict=True)
        return [VisionFeatures(found[image.key]) for image in images]

    def _fitted(self, image: ImageInput) -> tuple[int, int]:
        """As in LLaVA-NeXT, shrunk if it exceeds the config's ``anyres_max_N`` squares by more than a tenth."""
        rows, columns = super()._fitted(image)
        most = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * self.grid_side**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


class TilePreprocessor(ImagePreprocessor):
    """A square of the whole picture, and tiles."""

    @property
    def settings(self) -> str:
        p = self.processor
        return f"{dict(p.size)} {dict(p.crop_size or {})} {p.image_grid_pinpoints}"

    def area(self, size: tuple[int, int]) -> int:
        return size[0] * size[1]

    def read(self, picture: Image, key: str, among: int) -> tuple[ImageInput, View]:
        import numpy as np
        from transformers.image_processing_utils import select_best_resolution

        out = self._processed(picture, among)
        width, height = picture.size
        tall, wide = select_best_resolution((height, width), self.processor.image_grid_pinpoints)
        scale = min(wide / width, tall / height)
        seen = min(wide, math.ceil(width * scale)), min(tall, math.ceil(height * scale))
        image = ImageInput(
            out["pixel_values"][0].float(),
            (height, width, int(not self.tag(among))),
            key,
            original=torch.from_numpy(np.array(picture.convert("RGB"))),
        )
        return image, View(width, height, *seen)

    def _processed(self, picture: Image, among: int) -> Any:
        return self.processor(images=[picture], return_tensors="pt")

    def picture(self, image: ImageInput) -> Image:
        from PIL import Image as pil

        assert image.original is not None
        return pil.fromarray(image.original.numpy())


class AlonePreprocessor(TilePreprocessor):
    """Tiles for a prompt's single picture, one square for each of several."""

    def tag(self, among: int) -> str:
        return "" if among == 1 else "among others"

    def _processed(self, picture: Image, among: int) -> Any:
        if among == 1:
            return super()._processed(picture, among)
        out = self.processor(images=[[picture, picture]], return_tensors="pt")
        return {"pixel_values": out["pixel_values"][:1, :1]}
