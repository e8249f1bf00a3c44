"""A byte-level BPE for the scene texts, with the special tokens and chat template of a family.

The pre-tokenizer keeps answer scaffolding (``[{"bbox_2d": [``, ``, "label": "``, ``];Frame``) in one piece and a
coordinate with its comma in another, so that BPE learns each as one token: a box answer costs six tokens. Any other
text still encodes, byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_REST = (r""" ?\p{L}+""", r"""\s+""", r"""[^\s\p{L}\d]""")  # words, gaps, signs


@dataclass(frozen=True)
class Spelling:
    """How a tokenizer splits texts, and what it has beside them.

    Attributes:
        special: texts of its special tokens, in the order of their ids.
        template: its chat template.
        pieces: patterns of scaffolding and coordinates, checked in order at each place; then come words and signs.
        end: the special token that ends a turn; pad: that fills up; begin: that stands before every text.
        before: what stands between an answer and the prompt.
    """

    special: tuple[str, ...]
    template: str
    pieces: tuple[str, ...]
    end: str
    pad: str
    begin: str | None = None
    before: str = ""


def train_tokenizer(texts: Iterable[str], spelling: Spelling, vocab_size: int = 2048) -> Any:
    """Train the tokenizer on ``texts``; returns a fast Hugging Face tokenizer with the chat template set."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join((*spelling.pieces, *_REST))), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(spelling.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if spelling.begin is not None:
        begin = (spelling.begin, tokenizer.token_to_id(spelling.begin))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{spelling.begin} $A", special_tokens=[begin])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=spelling.begin,
        eos_token=spelling.end,
        pad_token=spelling.pad,
        additional_special_tokens=list(spelling.special),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = spelling.template
    return fast
