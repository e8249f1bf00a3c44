"""Qwen3-VL (arXiv:2511.21631), dense and mixture of experts: Qwen2.5-VL's pictures and positions, with DeepStack.

The language model gets features from several depths of the tower: the last ones replace the placeholders, and those of
``deepstack_visual_indexes`` are added to the same rows after its first layers. Queries and keys are normalised per
head. The router's load-balancing loss of pre-training is off, as none of our losses uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastrl.models.families.base import Placed
from fastrl.models.families.qwen2_vl import Qwen2VL, vision_tables

IMAGE = {"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _config(
    hidden: int, inner: int, layers: int, heads: int, *, tied: bool, tower: tuple[int, int, int, int], deep: list[int]
) -> dict[str, Any]:
    width, wide, depth, tower_heads = tower
    return {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": tied,
        "text_config": {
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "depth": depth,
            "hidden_size": width,
            "intermediate_size": wide,
            "num_heads": tower_heads,
            "out_hidden_size": hidden,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": deep,
            **IMAGE,
        },
    }


_SMALL, _LARGE = (1024, 4096, 24, 16), (1152, 4304, 27, 16)


class Qwen3VL(Qwen2VL):
    """Qwen3-VL: answers as JSON, 0-1000."""

    model_type: ClassVar[str] = "qwen3_vl"
    style: ClassVar[str] = "qwen3"
    part_names: ClassVar = {
        "language": ("model.language_model", "lm_head"),
        "vision": ("model.visual",),
        "projector": ("model.visual.merger", "model.visual.deepstack_merger_list"),
    }
    published: ClassVar = {  # sizes as in the config.json each model is published with
        "Qwen/Qwen3-VL-2B-Instruct": _config(2048, 6144, 28, 16, tied=True, tower=_SMALL, deep=[5, 11, 17]),
        "Qwen/Qwen3-VL-4B-Instruct": _config(2560, 9728, 36, 32, tied=True, tower=_SMALL, deep=[5, 11, 17]),
        "Qwen/Qwen3-VL-8B-Instruct": _config(4096, 12288, 36, 32, tied=False, tower=_LARGE, deep=[8, 16, 24]),
    }

    @classmethod
    def model_class(cls) -> Any:
        from transformers import Qwen3VLForConditionalGeneration

        return Qwen3VLForConditionalGeneration

    def prepare(self, core: Any) -> None:
        """As in Qwen2-VL, and deep features are added by row index: a mask would synchronise in each layer."""
        super().prepare(core)
        language: Any = self.parts(core).language
        language._deepstack_process = MethodType(_add_rows, language)

    def _deep(self, out: Any) -> Sequence[Tensor]:
        return out.deepstack_features

    def deep_options(self, embeds: Tensor, placed: Placed | None) -> dict[str, Any]:
        if placed is None:
            return {}
        levels = zip(*(features.deep for features in placed.features), strict=True)
        return {
            "visual_pos_masks": placed.rows,
            "deepstack_visual_embeds": [torch.cat(level).to(embeds.dtype) for level in levels],
        }

    def _tables(self, visual: Any, grids: Tensor, device: torch.device) -> dict[str, Any]:
        """As in Qwen2-VL, and the indices and weights that resample learned positions to each picture's size."""
        tables = vision_tables(visual, grids, device)
        try:
            from transformers.vision_utils import get_vision_interpolation_indices_and_weights as taps
        except ImportError:  # older versions derive them inside the tower and take no such keywords
            return tables
        index, weight = taps(
            grids,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=visual.config.spatial_merge_size,
        )
        return tables | {"interp_indices": index.to(device), "interp_weights": weight.to(device)}


class Qwen3VLMoe(Qwen3VL):
    """Qwen3-VL with experts."""

    model_type: ClassVar[str] = "qwen3_vl_moe"
    published: ClassVar = {}

    @classmethod
    def model_class(cls) -> Any:
        from transformers import Qwen3VLMoeForConditionalGeneration

        return Qwen3VLMoeForConditionalGeneration


def _add_rows(self: nn.Module, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
    """Add features [n, hidden] to rows [n] of [B, L, hidden]; given a mask instead, as the model's own forward does."""
    if visual_pos_masks.dtype == torch.bool:
        return type(self)._deepstack_process(self, hidden_states, visual_pos_masks, visual_embeds)  # type: ignore[attr-defined]
    rows = hidden_states.flatten(0, 1).index_add(0, visual_pos_masks, visual_embeds)
    return rows.view(hidden_states.shape)
