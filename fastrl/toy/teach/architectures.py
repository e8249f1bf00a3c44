"""What the small models are made of: the parts of a Qwen2.5-VL and of a LLaVA-1.5, everything small.

Both are ordinary transformers classes built from a config. Side lengths are of pictures, in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastrl.models.families import Family
from fastrl.models.families import llava as llava_family
from fastrl.models.families import qwen2_vl as qwen_family
from fastrl.models.families.llava import Llava, SquarePreprocessor
from fastrl.models.families.qwen2_vl import CONFIG_TOKENS, IMAGE, Qwen2_5VL, QwenPreprocessor
from fastrl.models.vision import ImagePreprocessor
from fastrl.toy.teach.tokenizer import Spelling

WIDTH, LAYERS = 128, 4  # hidden size and layers of a small model's text half; its tower has as many layers
TOWERS = {128: 96, 64: 64}  # hidden size of the text half → of the tower: heads of 32 in both


@dataclass(frozen=True)
class Architecture:
    """One kind of small model.

    Attributes:
        family: whose parts it has.
        spelling: how its tokenizer splits texts.
        coordinates: texts of the coordinates that its tokenizer has to know, as often as they count.
        config: (tokenizer, side of its pictures, width) → the transformers config; the width is one of ``TOWERS``.
        preprocessor: side of its pictures → its image preprocessor.
        one_for_all: one model learns all tasks, of pictures and of clips.
    """

    family: type[Family]
    spelling: Spelling
    coordinates: Callable[[], Iterator[str]]
    config: Callable[[Any, int, int], Any]
    preprocessor: Callable[[int], ImagePreprocessor]
    one_for_all: bool = False


def text_sizes(tokenizer: Any, hidden: int, layers: int) -> dict[str, Any]:
    """Of a text model with two query heads for each key head, of 32 each."""
    heads = hidden // 32
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 32 * 32,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


# Qwen2.5-VL


def qwen_config(
    tokenizer: Any,
    hidden: int = WIDTH,
    layers: int = LAYERS,
    vision_hidden: int = TOWERS[WIDTH],
    vision_layers: int = LAYERS,
) -> Any:
    """Patch 14, merge 2 and multimodal RoPE as in Qwen2.5-VL."""
    from transformers import Qwen2_5_VLConfig

    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]}
    vision = IMAGE | {
        "depth": vision_layers,
        "hidden_size": vision_hidden,
        "intermediate_size": vision_hidden * 2,
        "num_heads": vision_hidden // 32,
        "out_hidden_size": hidden,
        "window_size": 112,
        "fullatt_block_indexes": [vision_layers // 2 - 1, vision_layers - 1],
    }
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in CONFIG_TOKENS.items()}
    return Qwen2_5_VLConfig(
        text_config=text_sizes(tokenizer, hidden, layers) | {"rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=True,
        **ids,
    )


def _qwen_preprocessor(side: int) -> ImagePreprocessor:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    # Larger pictures are brought down to the size it was taught at: it reads nothing in others.
    return QwenPreprocessor(Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=side**2))


def _qwen_coordinates() -> Iterator[str]:
    for number in range(1001):
        yield from [f"{number}"] * 2
        if number < 225:
            yield from [f", {number}"] * 4
    yield from _thousandths(56, 84, 112)
    yield from ["You are a helpful assistant.", "system\n", "user\n", "assistant\n"] * 50


# LLaVA-1.5


def _llava_config(tokenizer: Any, side: int, width: int) -> Any:
    """A CLIP tower of patch 14 with its class token left out, two linear layers, a Llama."""
    from transformers import LlavaConfig

    hidden = TOWERS[width]
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": hidden // 32,
        "projection_dim": hidden,
        "image_size": side,
        "patch_size": 14,
    }
    token = tokenizer.convert_tokens_to_ids(llava_family.IMAGE_TOKEN)
    return LlavaConfig(
        text_config={"model_type": "llama", **text_sizes(tokenizer, width, LAYERS)},
        vision_config=vision,
        image_token_index=token,
        image_seq_length=(side // 14) ** 2,
        vision_feature_layer=-1,  # released: -2, of a tower that was taught before; here no layer stays idle
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def _llava_preprocessor(side: int) -> ImagePreprocessor:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    crop = {"height": side, "width": side}
    return SquarePreprocessor(
        LlavaImageProcessorPil(size={"shortest_edge": side}, crop_size=crop, do_pad=True, do_center_crop=True)
    )


def _llava_coordinates() -> Iterator[str]:
    for part in range(101):
        yield from [f"{part / 100:.2f}", f", {part / 100:.2f}"] * 4
    yield from (f"{number}" for number in range(100))
    yield from (text.removeprefix(",") for text in _thousandths(84))
    yield from _thousandths(84)
    yield from ["USER: ", " ASSISTANT:"] * 50


def _thousandths(*sides: int) -> Iterator[str]:
    """Second and later numbers of the boxes of trajectories, in pictures of these sides."""
    for side in sides:
        for pixel in range(side + 1):
            yield from [f",{round(1000 * pixel / side)}"] * 3


_QWEN_PIECES = (
    r"""[\[\]{}", ]*"(?:bbox_2d|point_2d|label)": [\["]""",
    r"""[\]}"]+[,;]?""",
    r"""<Id|;?Frame|:\[|</Id|Track""",
    r"""(?:, ?)?\d{1,4}""",
)
_LLAVA_PIECES = (  # an answer begins with a space
    r""" ?\[(?=\d\.)""",
    r"""(?:, )?[01]\.\d\d""",
    r"""<Id|;?Frame|:\[|</Id| ?Track|\];""",
    r"""(?:,)?\d{1,4}""",
)
ARCHITECTURES: Mapping[str, Architecture] = {
    Qwen2_5VL.model_type: Architecture(
        Qwen2_5VL,
        Spelling(
            qwen_family.SPECIAL_TOKENS,
            qwen_family.CHAT_TEMPLATE,
            _QWEN_PIECES,
            end=Qwen2_5VL.end_of_turn,
            pad=qwen_family.SPECIAL_TOKENS[0],
        ),
        _qwen_coordinates,
        lambda tokenizer, side, width: qwen_config(tokenizer, width, vision_hidden=TOWERS[width]),
        _qwen_preprocessor,
    ),
    Llava.model_type: Architecture(
        Llava,
        Spelling(
            llava_family.SPECIAL_TOKENS,
            llava_family.CHAT_TEMPLATE,
            _LLAVA_PIECES,
            end=Llava.end_of_turn,
            pad=llava_family.SPECIAL_TOKENS[-1],
            begin=llava_family.SPECIAL_TOKENS[1],
            before=" ",
        ),
        _llava_coordinates,
        _llava_config,
        _llava_preprocessor,
        one_for_all=True,
    ),
}
