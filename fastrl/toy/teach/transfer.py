"""Beginning a small model with what another has learned, also under another vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def coordinate_twins(tokenizer: Any, old_tokenizer: Any, side: int) -> dict[int, int]:
    """Tokens of 0-1000 coordinates → those of the pixels they stand for, in pictures of ``side`` pixels.

    A model that names pixels need not learn again where places are, only what they are now called.
    """
    twins = {}
    for pixel in range(side + 1):
        number = round(1000 * pixel / side)
        for ours, theirs in ((f",{number}", f", {pixel}"), (f"{number}", f"{pixel}")):
            here, there = (t(text)["input_ids"] for t, text in ((tokenizer, ours), (old_tokenizer, theirs)))
            if len(here) == len(there) == 1:
                twins[here[0]] = there[0]
    return twins


@torch.no_grad()
def take_over(
    model: torch.nn.Module, tokenizer: Any, old: torch.nn.Module, old_tokenizer: Any, twins: Mapping[int, int]
) -> None:
    """Begin with another small model's weights; of its embeddings, those of the tokens both vocabularies have.

    ``twins`` adds tokens that mean the same as others there: id here → id there.
    """
    theirs = dict(old.named_parameters())
    ours, others = tokenizer.get_vocab(), old_tokenizer.get_vocab()
    pairs = {ours[token]: others[token] for token in ours if token in others} | dict(twins)
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            parameter[list(pairs)] = theirs[name][list(pairs.values())]
        else:
            parameter.copy_(theirs[name])
