"""GLM-4.1V, GLM-4.5V and GLM-4.6V (arXiv:2507.01006): pictures of any size, Qwen2-VL's multimodal rotary positions.

The text layers also have norms after attention and MLP, so decode steps use the layers' own forward. An answer ends
with the marker of the next user turn, ``<|user|>``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar

from torch import Tensor, nn

from fastrl.models.families.qwen2_vl import Qwen2VL, QwenPreprocessor, within


class Glm4V(Qwen2VL):
    """GLM-4.1V: answers between box tokens, 0-1000."""

    model_type: ClassVar[str] = "glm4v"
    style: ClassVar[str] = "glm"
    end_of_turn: ClassVar[str] = "<|user|>"
    control_tokens: ClassVar[tuple[str, ...]] = (
        *("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
        *("[gMASK]", "<sop>", "<|system|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
    )
    part_names: ClassVar = {
        "language": ("model.language_model", "lm_head"),
        "vision": ("model.visual",),
        "projector": ("model.visual.merger", "model.visual.downsample"),
    }
    published: ClassVar = {}

    @classmethod
    def model_class(cls) -> Any:
        from transformers import Glm4vForConditionalGeneration

        return Glm4vForConditionalGeneration

    @classmethod
    def processor_class(cls) -> Any:
        from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

        return Glm4vImageProcessorPil

    def preprocessor(
        self, folder: Path, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> QwenPreprocessor:
        from fastrl.models.families.llava import folder_processor

        return QwenPreprocessor(within(folder_processor(self.processor_class(), folder), min_pixels, max_pixels))

    def prepare(self, core: Any) -> None:
        """As in Qwen2-VL; also moves the lengths (on the host for a plan) to the patches' device."""
        super().prepare(core)
        embeddings: Any = self.parts(core).vision.embeddings
        embeddings.forward = MethodType(_place_patches, embeddings)

    def render(self, tokenizer: Any, messages: Sequence[Mapping[str, Any]], generate: bool, end: str) -> str:
        """Close a final answer with the marker of the user's turn, as any other answer."""
        text = super().render(tokenizer, messages, generate, end)
        closed = messages and messages[-1]["role"] == "assistant" and not text.endswith(end)
        return text + end if closed else text


class Glm4VMoe(Glm4V):
    """GLM-4.5V: with experts."""

    model_type: ClassVar[str] = "glm4v_moe"

    @classmethod
    def model_class(cls) -> Any:
        from transformers import Glm4vMoeForConditionalGeneration

        return Glm4vMoeForConditionalGeneration


class Glm46V(Glm4V):
    """GLM-4.6V."""

    model_type: ClassVar[str] = "glm46v"
    served_images: ClassVar[int | None] = 0  # not in vLLM's table

    @classmethod
    def model_class(cls) -> Any:
        from transformers import Glm46VForConditionalGeneration

        return Glm46VForConditionalGeneration

    @classmethod
    def processor_class(cls) -> Any:
        from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

        return Glm46VImageProcessorPil


def _place_patches(self: nn.Module, embeddings: Tensor, lengths: Any, *places: Any) -> Tensor:
    lengths = lengths.to(embeddings.device) if isinstance(lengths, Tensor) else lengths
    return type(self).forward(self, embeddings, lengths, *places)
