"""Qwen3.5, dense and mixture of experts: Qwen3-VL's pictures without deep features, and mostly recurrent text layers.

Three of four text layers are gated delta nets (``linear_attention``), which carry a state from token to token instead
of keys and values: a completion starts in its prompt's final state (``fastrl.models.attention.delta_net``). The others
attend, with an output gate and rotary embedding of part of each head. The weights for predicting several tokens at once
(``mtp``) are not loaded.

Answers follow an empty thought, which the chat template writes (``enable_thinking`` is false). The template leaves the
thoughts of earlier turns out and strips white space around answers; here a dialogue keeps every turn as it was
generated, so that it continues the text before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fastrl.models.attention.delta_net import share_states
from fastrl.models.families.qwen2_vl import Qwen2VL
from fastrl.models.families.qwen3_vl import IMAGE, Qwen3VL

_SMALL, _MIDDLE, _LARGE = (768, 3072, 12, 12), (1024, 4096, 24, 16), (1152, 4304, 27, 16)


def _config(
    hidden: int, layers: int, heads: int, kv: int, *, values: int, tower: tuple[int, int, int, int], tied: bool = False,
    **text: Any,
) -> dict[str, Any]:  # fmt: skip
    """``values``: value heads of a delta net; ``tower``: width, inner width, depth and heads."""
    width, wide, depth, tower_heads = tower
    return {
        "tie_word_embeddings": tied,
        "text_config": {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": values,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "full_attention_interval": 4,
            "vocab_size": 248320,
            "tie_word_embeddings": tied,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e7,
                "partial_rotary_factor": 0.25,
                "mrope_section": [11, 11, 10],
                "mrope_interleaved": True,
            },
            **text,
        },
        "vision_config": {
            "depth": depth,
            "hidden_size": width,
            "intermediate_size": wide,
            "num_heads": tower_heads,
            "out_hidden_size": hidden,
            "num_position_embeddings": 2304,
            **IMAGE,
        },
    }


TURN, THOUGHT = "<|im_start|>assistant\n", "<think>\n\n</think>\n\n"


class Qwen3_5(Qwen2VL):
    """Qwen3.5: answers as JSON, 0-1000."""

    model_type: ClassVar[str] = "qwen3_5"
    style: ClassVar[str] = "qwen3"
    template_options: ClassVar[Mapping[str, Any]] = {"enable_thinking": False}
    shared_layers: ClassVar[frozenset[str]] = frozenset({"full_attention", "linear_attention"})
    published: ClassVar = {  # sizes as in the config.json each model is published with
        f"Qwen/Qwen3.5-{name}": {"model_type": "qwen3_5", **config}
        for name, config in {
            "0.8B": _config(1024, 24, 8, 2, intermediate_size=3584, values=16, tower=_SMALL, tied=True),
            "4B": _config(2560, 32, 16, 4, intermediate_size=9216, values=32, tower=_MIDDLE, tied=True),
            "9B": _config(4096, 32, 16, 4, intermediate_size=12288, values=32, tower=_LARGE),
            "27B": _config(5120, 64, 24, 4, intermediate_size=17408, values=48, tower=_LARGE),
        }.items()
    }

    @classmethod
    def model_class(cls) -> Any:
        from transformers import Qwen3_5ForConditionalGeneration

        return Qwen3_5ForConditionalGeneration

    def check(self) -> None:
        super().check()
        text = self.config.get_text_config()
        if text.hidden_act != "silu":
            raise ValueError(f"model type {self.model_type!r} with hidden_act {text.hidden_act!r}; supported: silu")
        if "full_attention" not in text.layer_types:
            raise ValueError(f"model type {self.model_type!r} without layers of kind full_attention is not supported")

    def prepare(self, core: Any) -> None:
        """As in Qwen2-VL, and delta nets pass their states from prompts to answers."""
        super().prepare(core)
        wanted = list(self.config.get_text_config().layer_types).count("linear_attention")
        found = share_states(self.parts(core).language)
        if found != wanted:
            raise ValueError(
                f"model type {self.model_type!r} has {wanted} layers of kind linear_attention, but only {found} of its "
                "modules are gated delta nets without further parts (such as adapters on the convolution)"
            )

    def render(self, tokenizer: Any, messages: Sequence[Mapping[str, Any]], generate: bool, end: str) -> str:
        answers = {f"\0{n}\0": m["content"] for n, m in enumerate(messages) if m["role"] == "assistant"}
        marked = [
            {**m, "content": [{"type": "text", "text": f"\0{n}\0"}]} if m["role"] == "assistant" else m
            for n, m in enumerate(messages)
        ]
        text = super().render(tokenizer, marked, generate, end)
        if TURN + THOUGHT in text:
            text = re.sub(f"{re.escape(TURN)}(?!{re.escape(THOUGHT)})", TURN + THOUGHT, text)
        for mark, content in answers.items():
            text = text.replace(mark, "".join(part["text"] for part in content))
        return text

    _tables = Qwen3VL._tables


class Qwen3_5Moe(Qwen3_5):
    """Qwen3.5 with experts."""

    model_type: ClassVar[str] = "qwen3_5_moe"
    published: ClassVar = {
        "Qwen/Qwen3.5-35B-A3B": {
            "model_type": "qwen3_5_moe",
            **_config(
                2048, 40, 16, 2, values=32, tower=_LARGE, num_experts=256, num_experts_per_tok=8,
                moe_intermediate_size=512, shared_expert_intermediate_size=512,
            ),
        }
    }  # fmt: skip

    @classmethod
    def model_class(cls) -> Any:
        from transformers import Qwen3_5MoeForConditionalGeneration

        return Qwen3_5MoeForConditionalGeneration
