"""LLaVA-1.5 (arXiv:2310.03744): a fixed number of tokens per picture, a CLIP tower, Llama, Vicuna's dialogue format.

The folder's image processor decides what the model sees: the picture padded to a square, or its centre crop.
Coordinates in answers are relative to that square (frame ``padded_unit``). ``ImageInput.shape`` is (height, width) of
the pixels [1, 3, height, width].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastrl.answers import View
from fastrl.batch import ImageInput
from fastrl.models.families.base import Family, VisionFeatures
from fastrl.models.vision import ImagePreprocessor, joined_pixels, picture_of
from fastrl.models.weights import reading

if TYPE_CHECKING:
    from PIL.Image import Image


IMAGE_TOKEN = "<image>"
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", IMAGE_TOKEN, "<pad>")
CHAT_TEMPLATE = (  # Vicuna's turns, with pictures where the message has them
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def _config(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llava",
        "image_token_index": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "vocab_size": 32064,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
    }


class LlavaFamily(Family):
    """Common to the LLaVA families: ``<image>`` placeholders, features by the model's own code, closed turns.

    Released chat templates close an assistant's turn with a space or not at all. The models were trained with an
    end-of-turn token there, and sampled answers have it. Dialogues are rendered turn by turn to add it.
    """

    end_of_turn: ClassVar[str] = "</s>"
    control_tokens: ClassVar[tuple[str, ...]] = ("<image>", "<video>", "<s>", "<unk>", "<pad>")

    def template_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Keeps lists of parts: released templates drop content that is a string."""
        return [dict(m) for m in messages]

    def render(self, tokenizer: Any, messages: Sequence[Mapping[str, Any]], generate: bool, end: str) -> str:
        pieces: list[str] = []
        pending: list[Mapping[str, Any]] = []
        for message in messages:
            if message["role"] != "assistant":
                pending.append(message)
                continue
            text = "".join(part["text"] for part in message["content"])
            pieces += [self._unanswered(tokenizer, pending, True, first=not pieces), self.turn(text, end)]
            pending = []
        if pending or not pieces:
            pieces.append(self._unanswered(tokenizer, pending, generate, first=not pieces))
        return "".join(pieces)

    def _unanswered(self, tokenizer: Any, messages: list[Mapping[str, Any]], generate: bool, *, first: bool) -> str:
        text = super().render(tokenizer, messages, generate, self.end_of_turn)
        begin = tokenizer.bos_token
        return text.removeprefix(begin) if begin and not first else text

    def turn(self, text: str, end: str) -> str:
        return f" {text}{end}"

    @property
    def side(self) -> int:
        """Side in pixels of the square that the tower takes."""
        return self.config.vision_config.image_size

    @property
    def grid_side(self) -> int:
        """Patches along one side of that square."""
        return self.side // self.config.vision_config.patch_size

    @property
    def square_tokens(self) -> int:
        """Number of features of one square: its patches, and the tower's class token if the config keeps it."""
        token = int(self.config.vision_config.model_type == "clip_vision_model")
        return self.grid_side**2 + token - (self.config.vision_feature_select_strategy == "default")

    def patches(self, image: ImageInput) -> int:
        return len(image.pixel_values) * self.grid_side**2


class Llava(LlavaFamily):
    """LLaVA-1.5: answers in 0-1 of the square it sees."""

    model_type: ClassVar[str] = "llava"
    style: ClassVar[str] = "llava1_5"
    published: ClassVar = {  # sizes as in the config.json each model is published with
        "llava-hf/llava-1.5-7b-hf": _config(4096, 11008, 32, 32),
        "llava-hf/llava-1.5-13b-hf": _config(5120, 13824, 40, 40),
    }

    @classmethod
    def model_class(cls) -> Any:
        from transformers import LlavaForConditionalGeneration

        return LlavaForConditionalGeneration

    def preprocessor(
        self, folder: Path, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> SquarePreprocessor:
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        refuse_limits(self, min_pixels, max_pixels)
        return SquarePreprocessor(folder_processor(LlavaImageProcessorPil, folder))

    def image_limit(self, folder: Path) -> int | None:
        return self.side**2

    def processed(self, inputs: Mapping[str, Any]) -> list[ImageInput] | None:
        pixels = inputs.get("pixel_values")
        if pixels is None or pixels.dim() != 4:
            return None
        return [ImageInput(one[None], tuple(one.shape[-2:]), str(n)) for n, one in enumerate(pixels)]

    def tokens(self, image: ImageInput) -> int:
        return self.square_tokens

    def blank(self, pixels: int, *, key: str = "") -> ImageInput:
        return ImageInput(torch.empty(1, 3, self.side, self.side, device="meta"), (self.side, self.side), key)

    def heat(self, image: ImageInput, values: Tensor) -> Tensor:
        patches = self.grid_side**2
        return values[-patches:].view(self.grid_side, -1) if len(values) >= patches else values[None]

    def features(self, core: Any, images: Sequence[ImageInput]) -> list[VisionFeatures]:
        if not images:
            return []
        with torch.set_grad_enabled(self.trained(core)):
            return [VisionFeatures(tokens) for tokens in pooled(core, pixel_values=pixels_of(self, core, images))]


class SquarePreprocessor(ImagePreprocessor):
    """One square per picture: padded, or the centre crop."""

    @property
    def settings(self) -> str:
        p = self.processor
        return f"{dict(p.size)} {dict(p.crop_size)} {p.do_pad} {p.do_center_crop}"

    def read(self, picture: Image, key: str, among: int) -> tuple[ImageInput, View]:
        pixels = self.processor(images=[picture], return_tensors="pt")["pixel_values"].float()
        height, width = pixels.shape[-2:]
        return ImageInput(pixels, (height, width), key), self._view(*picture.size, width, height)

    def _view(self, width: int, height: int, seen_width: int, seen_height: int) -> View:
        if self.processor.do_pad:
            return View.padded(width, height, seen_width)
        if not self.processor.do_center_crop:
            return View(width, height, seen_width, seen_height)
        short = self.processor.size["shortest_edge"]
        long = int(short * max(width, height) / min(width, height))
        resized = (short, long) if width <= height else (long, short)
        left, top = ((have - seen) // 2 for have, seen in zip(resized, (seen_width, seen_height), strict=True))
        x, y = width / resized[0], height / resized[1]
        return View(
            width,
            height,
            seen_width,
            seen_height,
            (left * x, top * y, (left + seen_width) * x, (top + seen_height) * y),
        )

    def picture(self, image: ImageInput) -> Image:
        return picture_of(image.pixel_values[0].permute(1, 2, 0), self.processor)


def folder_processor(kind: Any, folder: Path) -> Any:
    """The folder's image processor with the PIL backend: pixels are the same with and without torchvision."""
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise FileNotFoundError(f"{folder}: no preprocessor_config.json (image sizes and normalisation)")
    with reading(folder, "image processor"):
        return kind.from_pretrained(folder, local_files_only=True)


def refuse_limits(family: Family, min_pixels: int | None, max_pixels: int | None) -> None:
    """Raise ``ValueError`` if limits are given to a family whose picture sizes are fixed."""
    if min_pixels is not None or max_pixels is not None:
        raise ValueError(
            f"model.min_pixels, model.max_pixels: {family.model_type} has fixed picture sizes; leave both out"
        )


def pooled(core: Any, **inputs: Any) -> Sequence[Tensor]:
    """Features [n, hidden] of each picture, by the model's own code."""
    out = core.model.get_image_features(**inputs)
    return out.pooler_output if hasattr(out, "pooler_output") else out


def pixels_of(family: Family, core: Any, images: Sequence[ImageInput]) -> Tensor:
    """Squares [n, 3, side, side] of several pictures, in the tower's dtype and device."""
    weight = next(family.parts(core).vision.parameters())
    return joined_pixels(images, weight.device, weight.dtype)
