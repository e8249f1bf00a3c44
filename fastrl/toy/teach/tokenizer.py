"""A byte-level BPE for the scene texts, with the special tokens and chat template of the Qwen2-VL family.

The pre-tokenizer keeps answer scaffolding (``[{"bbox_2d": [``, ``, "label": "``, ``];Frame``) in one piece and a
coordinate with its comma in another, so that BPE learns each as one token: a box answer costs six tokens. Any other
text still encodes, byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastrl.models.families.qwen2_vl import CHAT_TEMPLATE, SPECIAL_TOKENS, Qwen2_5VL

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
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=Qwen2_5VL.end_of_turn,
        pad_token=SPECIAL_TOKENS[0],
        additional_special_tokens=list(SPECIAL_TOKENS),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
