"""A byte-level BPE for the scene texts, with the special tokens and chat template of the Qwen2-VL family.

The pre-tokenizer keeps answer scaffolding (``[{"bbox_2d": [``, ``, "label": "``, ``];Frame``) in one piece and a
coordinate with its comma in another, so that BPE learns each as one token: a box answer costs six tokens. Any other
text still encodes, byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_NAMES = """
    endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end
    vision_start vision_end vision_pad image_pad video_pad
"""
SPECIAL = tuple(f"<|{name}|>" for name in _NAMES.split())

# Checked in order at each place: JSON scaffolding, track scaffolding, coordinates, words, the rest.
_PIECES = "|".join(
    (
        r"""[\[\]{}", ]*"(?:bbox_2d|point_2d|label)": [\["]""",
        r"""[\]}"]+[,;]?""",
        r"""<Id|;?Frame|:\[|</Id|Track""",
        r"""(?:, ?)?\d{1,4}""",
        r""" ?\p{L}+""",
        r"""\s+""",
        r"""[^\s\p{L}\d]""",
    )
)

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


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> Any:
    """Train the tokenizer on ``texts``; returns a fast Hugging Face tokenizer with the chat template set."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
