"""Qwen2-VL (arXiv:2409.12191) and Qwen2.5-VL (arXiv:2502.13923): pictures of any size, multimodal rotary positions.

``ImageInput.shape`` is (t, h, w) in patches; the pixels are [t·h·w, channels · temporal patch · patch²].
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrl.answers import View
from fastrl.batch import ImageInput
from fastrl.data.pictures import LARGE
from fastrl.models.families.base import Family, VisionFeatures
from fastrl.models.positions import image_tokens, mrope_positions
from fastrl.models.vision import ImagePreprocessor, joined_pixels, picture_of
from fastrl.models.weights import reading

if TYPE_CHECKING:
    from PIL.Image import Image

# The family's special tokens and chat template, for models created from scratch.
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
CONFIG_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _text(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }


IMAGE = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}  # of every published model


def _qwen2(text: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": text["hidden_size"], "num_heads": 16, "mlp_ratio": 4}
    return {
        "model_type": "qwen2_vl",
        "text_config": text,
        "vision_config": vision | IMAGE,
        "tie_word_embeddings": tied,
    }


def _qwen2_5(text: dict[str, Any], *, tied: bool, inner: int = 3420) -> dict[str, Any]:
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": inner, "num_heads": 16}
    vision |= {"out_hidden_size": text["hidden_size"], "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
    return {
        "model_type": "qwen2_5_vl",
        "text_config": text,
        "vision_config": vision | IMAGE,
        "tie_word_embeddings": tied,
    }


class Qwen2VL(Family):
    """Qwen2-VL: answers with its own box tokens, 0-1000."""

    model_type: ClassVar[str] = "qwen2_vl"
    style: ClassVar[str] = "qwen2"
    end_of_turn: ClassVar[str] = "<|im_end|>"
    control_tokens: ClassVar[tuple[str, ...]] = (
        *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
        *("<|im_start|>", "<|endoftext|>"),
    )
    position_axes: ClassVar[int] = 3
    part_names: ClassVar = {
        "language": ("model.language_model", "lm_head"),
        "vision": ("model.visual",),
        "projector": ("model.visual.merger",),
    }
    published: ClassVar = {  # sizes as in the config.json each model is published with
        "Qwen/Qwen2-VL-2B-Instruct": _qwen2(_text(1536, 8960, 28, 12, 2, 151936), tied=True),
        "Qwen/Qwen2-VL-7B-Instruct": _qwen2(_text(3584, 18944, 28, 28, 4, 152064), tied=False),
    }

    @classmethod
    def model_class(cls) -> Any:
        from transformers import Qwen2VLForConditionalGeneration

        return Qwen2VLForConditionalGeneration

    def prepare(self, core: Any) -> None:
        """Embed patches with one matrix product. Patches do not overlap, so the tower's 3-D convolution is exactly
        that, but convolution libraries take several times as long."""
        embed = self.parts(core).vision.patch_embed
        embed.forward = MethodType(_embed_patches, embed)  # type: ignore[union-attr]

    def control_ids(self, tokenizer: Any) -> set[int]:
        named = (getattr(self.config, name, None) for name in CONFIG_TOKENS)
        return super().control_ids(tokenizer) | {token for token in named if token is not None}

    # Pictures

    @property
    def merge(self) -> int:
        """Patches per token along one side."""
        return self.config.vision_config.spatial_merge_size

    def preprocessor(
        self, folder: Path, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> QwenPreprocessor:
        return QwenPreprocessor(load_image_processor(folder, min_pixels=min_pixels, max_pixels=max_pixels))

    def image_limit(self, folder: Path) -> int | None:
        for name in ("preprocessor_config.json", "processor_config.json"):
            file = folder / name
            if file.is_file():
                values = json.loads(file.read_text(encoding="utf-8"))
                values = values.get("image_processor", values)
                found = values.get("max_pixels") or (values.get("size") or {}).get("longest_edge")
                return int(found) if found else None
        return None

    def processed(self, inputs: Mapping[str, Any]) -> list[ImageInput] | None:
        pixels, grids = inputs.get("pixel_values"), inputs.get("image_grid_thw")
        if pixels is None or grids is None:
            return None
        shapes = [tuple(int(n) for n in grid) for grid in grids.tolist()]
        each = pixels.split([math.prod(shape) for shape in shapes])
        return [ImageInput(p, s, str(n)) for n, (p, s) in enumerate(zip(each, shapes, strict=True))]

    def tokens(self, image: ImageInput) -> int:
        return image_tokens(image.shape, self.merge)

    def blank(self, pixels: int, *, key: str = "") -> ImageInput:
        vision = self.config.vision_config
        side = max(1, math.isqrt(pixels) // (vision.patch_size * self.merge)) * self.merge
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return ImageInput(torch.empty(side * side, values, device="meta"), (1, side, side), key)

    def heat(self, image: ImageInput, values: Tensor) -> Tensor:
        t, h, w = image.shape
        return values.view(t * h // self.merge, w // self.merge)

    def positions(
        self, length: int, slots: Sequence[tuple[int, int]], images: Sequence[ImageInput], start: int = 0
    ) -> Tensor:
        return mrope_positions(length, slots, [image.shape for image in images], self.merge, start)

    # Computing

    def features(self, core: Any, images: Sequence[ImageInput]) -> list[VisionFeatures]:
        if not images:
            return []
        visual: Any = self.parts(core).vision
        device = next(visual.parameters()).device
        pixels = joined_pixels(images, device, visual.dtype)
        grids = torch.tensor([image.shape for image in images])
        # A frozen tower needs no graph: nothing before the embeddings takes a gradient.
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in visual.parameters())
        with torch.set_grad_enabled(trained):
            out = visual(pixels, grid_thw=grids.to(device), **self._tables(visual, grids, device))
        counts = [self.tokens(image) for image in images]
        levels = [level.split(counts) for level in (out.pooler_output, *self._deep(out))]
        return [VisionFeatures(tokens, tuple(deep)) for tokens, *deep in zip(*levels, strict=True)]

    def _deep(self, out: Any) -> Sequence[Tensor]:
        """Features of the tower's output that are added after the first layers of the language model."""
        return ()

    def _tables(self, visual: Any, grids: Tensor, device: torch.device) -> dict[str, Any]:
        return vision_tables(visual, grids, device)


class Qwen2_5VL(Qwen2VL):
    """Qwen2.5-VL: answers as JSON, in pixels of the resized picture."""

    model_type: ClassVar[str] = "qwen2_5_vl"
    style: ClassVar[str] = "qwen2_5"
    published: ClassVar = {
        "Qwen/Qwen2.5-VL-3B-Instruct": _qwen2_5(_text(2048, 11008, 36, 16, 2, 151936), tied=True),
        "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5(_text(3584, 18944, 28, 28, 4, 152064), tied=False),
        "Qwen/Qwen2.5-VL-32B-Instruct": _qwen2_5(_text(5120, 27648, 64, 40, 8, 152064), tied=False, inner=3456),
    }

    @classmethod
    def model_class(cls) -> Any:
        from transformers import Qwen2_5_VLForConditionalGeneration

        return Qwen2_5_VLForConditionalGeneration


# Processors that resize like View.qwen. (GLM's processors use the same patches but round differently.)
_RESIZED_AS_VIEW = ("Qwen2VLImageProcessorPil", "Qwen2VLImageProcessor")


class QwenPreprocessor(ImagePreprocessor):
    """Qwen's resize to whole patches, normalisation and patching."""

    @property
    def settings(self) -> str:
        size = self.processor.size
        return f"{size['shortest_edge']} {size['longest_edge']}"

    def area(self, size: tuple[int, int]) -> int:
        width, height = size
        return min(max(width * height, self.processor.size["shortest_edge"]), self.processor.size["longest_edge"])

    def read(self, picture: Image, key: str, among: int) -> tuple[ImageInput, View]:
        out = self._processed(picture)
        t, h, w = (int(n) for n in out["image_grid_thw"][0])
        patch = int(self.processor.patch_size)
        return ImageInput(out["pixel_values"].float(), (t, h, w), key), View(*picture.size, w * patch, h * patch)

    def _processed(self, picture: Image) -> Any:
        """Process one picture. A large one is first resized here, to the same size as the processor would, because the
        processor keeps several full-size copies while it resizes."""
        width, height = picture.size
        if width * height <= LARGE or type(self.processor).__name__ not in _RESIZED_AS_VIEW:
            return self.processor(images=[picture], return_tensors="pt")
        patch, merge, size = int(self.processor.patch_size), int(self.processor.merge_size), self.processor.size
        low, high = size["shortest_edge"], size["longest_edge"]
        seen = View.qwen(width, height, patch_size=patch, merge_size=merge, min_pixels=low, max_pixels=high)
        small = picture.resize((seen.resized_width, seen.resized_height), self.processor.resample)
        return self.processor(images=[small], do_resize=False, return_tensors="pt")

    def picture(self, image: ImageInput) -> Image:
        t, h, w = image.shape
        merge, patch = int(self.processor.merge_size), int(self.processor.patch_size)
        # Rows are patches, those of one merge block together; a still image fills its temporal patch with copies.
        blocks = image.pixel_values.view(t, h // merge, w // merge, merge, merge, 3, -1, patch, patch)
        pixels = blocks[0, ..., 0, :, :].permute(0, 2, 5, 1, 3, 6, 4).reshape(h * patch, w * patch, 3)
        return picture_of(pixels, self.processor)


def load_image_processor(folder: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Any:
    """The folder's image processor with the PIL backend: pixels are the same with and without torchvision."""
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor
    except ImportError:  # before transformers split its image processors by backend
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Processor
    if not any((Path(folder) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise FileNotFoundError(f"{folder}: no preprocessor_config.json (image size limits and normalisation)")
    with reading(Path(folder), "image processor"):
        processor = Processor.from_pretrained(folder, local_files_only=True)
    return within(processor, min_pixels, max_pixels)


def within(processor: Any, min_pixels: int | None, max_pixels: int | None) -> Any:
    """Set the limits of a resized picture's area in pixels (None: keep). Raises ``ValueError`` for invalid ones."""
    size = processor.size
    low = min_pixels if min_pixels is not None else size["shortest_edge"]
    high = max_pixels if max_pixels is not None else size["longest_edge"]
    side = int(processor.patch_size) * int(processor.merge_size)
    if not 0 < low <= high or high < side * side:
        raise ValueError(
            f"model.min_pixels {low}, model.max_pixels {high}: expected 0 < min_pixels <= max_pixels, and max_pixels "
            f"of at least one image token, {side * side}"
        )
    processor.size = {"shortest_edge": low, "longest_edge": high}
    return processor


def _embed_patches(self: nn.Module, hidden_states: Tensor) -> Tensor:
    proj: Any = self.proj
    # With an adapter, or a sharded weight that only the layer's own call gathers, call the layer itself.
    if type(proj) is not nn.Conv3d or hasattr(proj.weight, "ds_id"):
        return type(self).forward(self, hidden_states)
    return F.linear(hidden_states.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)


def vision_tables(visual: Any, grids: Tensor, device: torch.device) -> dict[str, Any]:
    """The tables that the tower derives from the grids, made on the host: on the device each would synchronise."""
    try:
        from transformers import vision_utils
    except ImportError:  # older versions derive them inside the tower and take no such keywords
        return {}
    config = visual.config
    where = torch.device("cpu") if device.type == "meta" else device  # attention may read the lengths on the host
    cu = vision_utils.get_vision_cu_seqlens(grids)
    tables: dict[str, Any] = {
        "position_ids": vision_utils.get_vision_position_ids(grids, visual.spatial_merge_size).to(device),
        "cu_seqlens": cu.to(where),
        "max_seqlen": int((cu[1:] - cu[:-1]).max()),
    }
    if hasattr(config, "window_size"):
        index, cu = vision_utils.get_vision_window_index(
            grids, visual.spatial_merge_size, config.window_size, config.patch_size
        )
        tables |= {"window_index": index.to(device), "cu_window_seqlens": cu.to(where)}
        tables["max_window_seqlen"] = int((cu[1:] - cu[:-1]).max())
    return tables
