"""Initialising a small model from another one, possibly with another vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def coordinate_twins(tokenizer: Any, old_tokenizer: Any, side: int) -> dict[int, int]:
    """Tokens of 0-1000 coordinates → tokens of the corresponding pixels in pictures of ``side`` pixels.

    With these, a model that answers in pixels only has to learn new names for positions.
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
    """Copy another small model's weights; of its embeddings, those of tokens in both vocabularies.

    ``twins`` adds pairs of tokens with the same meaning: id here → id there.
    """
    theirs = dict(old.named_parameters())
    ours, others = tokenizer.get_vocab(), old_tokenizer.get_vocab()
    pairs = {ours[token]: others[token] for token in ours if token in others} | dict(twins)
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            parameter[list(pairs)] = theirs[name][list(pairs.values())]
        else:
            parameter.copy_(theirs[name])
