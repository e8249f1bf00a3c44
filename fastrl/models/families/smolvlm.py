"""SmolVLM and SmolVLM2 (arXiv:2504.05299): tiles, each preceded by its row and column as text, and a thumbnail.

This family has the smallest released checkpoints. ``ImageInput.shape`` is (rows, columns) of the tiles, (0, 0) for a
picture that is one square; the pixels are [squares, 3, side, side], the thumbnail last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastrl.answers import View
from fastrl.batch import ImageInput
from fastrl.models.families.base import Family, VisionFeatures
from fastrl.models.families.llava import folder_processor, pixels_of, refuse_limits
from fastrl.models.vision import ImagePreprocessor

if TYPE_CHECKING:
    from PIL.Image import Image


def _config(
    hidden: int, inner: int, layers: int, heads: int, kv: int, scale: int, tower: dict[str, int]
) -> dict[str, Any]:
    return {
        "model_type": "smolvlm",
        "scale_factor": scale,
        "text_config": {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "head_dim": 64,
            "vocab_size": 49280,
        },
        "vision_config": tower,
    }


def _tower(hidden: int, inner: int, layers: int, heads: int, image: int, patch: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image,
        "patch_size": patch,
    }


_BASE, _SO400M = _tower(768, 3072, 12, 12, 512, 16), _tower(1152, 4304, 27, 16, 384, 14)
FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"


class SmolVLM(Family):
    """SmolVLM: answers as JSON, 0-1000; the released models must be trained to do so."""

    model_type: ClassVar[str] = "smolvlm"
    served_images: ClassVar[int | None] = 1
    style: ClassVar[str] = "qwen3"
    end_of_turn: ClassVar[str] = "<end_of_utterance>"
    control_tokens: ClassVar[tuple[str, ...]] = ("<image>", FAKE, GLOBAL, "<|im_start|>", "<|im_end|>", "<|endoftext|>")
    part_names: ClassVar = {
        "language": ("model.text_model", "lm_head"),
        "vision": ("model.vision_model",),
        "projector": ("model.connector",),
    }
    published: ClassVar = {  # sizes as in the config.json each model is published with
        "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": _config(576, 1536, 30, 9, 3, 4, _BASE),
        "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": _config(960, 2560, 32, 15, 5, 4, _BASE),
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct": _config(2048, 8192, 24, 32, 32, 3, _SO400M),
    }

    @classmethod
    def model_class(cls) -> Any:
        from transformers import SmolVLMForConditionalGeneration

        return SmolVLMForConditionalGeneration

    def control_ids(self, tokenizer: Any) -> set[int]:
        tiles = {token for text, token in tokenizer.get_vocab().items() if text.startswith("<row_")}
        return super().control_ids(tokenizer) | tiles

    def template_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Keeps lists of parts: the released template inspects the first part."""
        return [dict(m) for m in messages]

    def turn(self, text: str, end: str) -> str:
        return f" {text}{end}"

    @property
    def side(self) -> int:
        """Side of a tile in pixels."""
        return self.config.vision_config.image_size

    @property
    def grid_side(self) -> int:
        """Tokens along one side of a tile."""
        return self.side // self.config.vision_config.patch_size // self.config.scale_factor

    def preprocessor(
        self, folder: Path, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> TilePreprocessor:
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

        refuse_limits(self, min_pixels, max_pixels)
        processor = folder_processor(SmolVLMImageProcessorPil, folder)
        if processor.max_image_size["longest_edge"] != self.side:
            raise ValueError(
                f"{folder}: the image processor makes tiles of {processor.max_image_size['longest_edge']} pixels, but "
                f"the vision tower takes {self.side}"
            )
        return TilePreprocessor(processor)

    def image_limit(self, folder: Path) -> int | None:
        return self.preprocessor(folder).processor.size["longest_edge"] ** 2

    def tokens(self, image: ImageInput) -> int:
        return len(image.pixel_values) * self.grid_side**2

    def patches(self, image: ImageInput) -> int:
        return self.tokens(image) * self.config.scale_factor**2

    def blank(self, pixels: int, *, key: str = "") -> ImageInput:
        """A square grid of as many tiles as fit into ``pixels``."""
        across = math.isqrt(pixels) // self.side
        across = across if across > 1 else 0
        return ImageInput(torch.empty(across**2 + 1, 3, self.side, self.side, device="meta"), (across, across), key)

    def heat(self, image: ImageInput, values: Tensor) -> Tensor:
        """A map of the tiles, over which the thumbnail's values are spread evenly; without tiles, of the thumbnail."""
        rows, columns = image.shape
        side, count = self.grid_side, rows * columns * self.grid_side**2
        if not count:
            return values.view(side, side)
        tiles = values[:count].view(rows, columns, side, side).transpose(1, 2).reshape(rows * side, columns * side)
        return tiles + values[count:].sum() / count

    def expansion(self, image: ImageInput) -> list[int]:
        rows, columns = image.shape
        square = [self.image_token] * self.grid_side**2
        ids: list[int] = []
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                ids += [*self.ids(FAKE), *self.ids(f"<row_{row}_col_{column}>"), *square]
            ids += self.ids("\n" if row < rows else "\n\n")
        return [*ids, *self.ids(FAKE), *self.ids(GLOBAL), *square, *self.ids(FAKE)]

    def features(self, core: Any, images: Sequence[ImageInput]) -> list[VisionFeatures]:
        if not images:
            return []
        parts, pixels = self.parts(core), pixels_of(self, core, images)
        patches = self.side // self.config.vision_config.patch_size
        real = torch.ones(len(pixels), patches, patches, dtype=torch.bool, device=pixels.device)
        with torch.set_grad_enabled(self.trained(core)):
            states = parts.vision(pixel_values=pixels, patch_attention_mask=real).last_hidden_state
            tokens = parts.projector(states).flatten(0, 1)
        return [VisionFeatures(part) for part in tokens.split([self.tokens(image) for image in images])]


class TilePreprocessor(ImagePreprocessor):
    """Tiles, followed by a thumbnail."""

    @property
    def settings(self) -> str:
        p = self.processor
        return f"{dict(p.size)} {dict(p.max_image_size)} {p.do_image_splitting}"

    def read(self, picture: Image, key: str, among: int) -> tuple[ImageInput, View]:
        import numpy as np

        out = self.processor(images=[[picture]], return_row_col_info=True, return_tensors="pt")
        rows, columns = (int(out[name][0][0]) for name in ("rows", "cols"))
        side = self.processor.max_image_size["longest_edge"]
        original = torch.from_numpy(np.array(picture.convert("RGB")))
        image = ImageInput(out["pixel_values"][0].float(), (rows, columns), key, original=original)
        return image, View(*picture.size, max(1, columns) * side, max(1, rows) * side)

    def picture(self, image: ImageInput) -> Image:
        from PIL import Image as pil

        assert image.original is not None
        return pil.fromarray(image.original.numpy())
