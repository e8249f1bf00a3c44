"""CHAIR (arXiv:1809.02156): COCO objects that a caption mentions although they are not in the picture.

    CHAIR-i = hallucinated mentions / mentions        CHAIR-s = captions with a hallucinated mention / captions

Mentions are found by COCO's category names and our own list of synonyms (``coco.py``), longest phrase first. The
objects of a picture are its annotated categories and those that its reference captions mention.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fastrl.captions.coco import CATEGORIES, PHRASES
from fastrl.captions.lexicon import ADJECTIVES
from fastrl.captions.parse import phrase_at, token_kind, words_of


class Chair(NamedTuple):
    """Fractions in [0, 1], and the counts they are computed from."""

    chair_i: float
    chair_s: float
    mentions: int
    hallucinated: int


def mentioned_categories(caption: str) -> list[str]:
    """COCO categories in the order a caption mentions them, each mention once."""
    words = words_of(caption)
    found, at = [], 0
    while at < len(words):
        phrase = phrase_at(words, at)
        if phrase is None:
            at += 1
            continue
        length, category = phrase
        if category is not None and not _describes(words, at, length):
            found.append(category)
        at += length
    return found


def chair(captions: Sequence[str], present: Sequence[Iterable[str]]) -> Chair:
    """CHAIR over captions.

    Args:
        captions: one for each picture.
        present: names of what is in each picture: COCO categories, or any words for them; other names are ignored.

    Raises:
        ValueError: not one ``present`` per caption.
    """
    if len(captions) != len(present):
        raise ValueError(f"{len(captions)} captions but objects of {len(present)} pictures")
    mentions = hallucinated = bad = 0
    for caption, names in zip(captions, present, strict=True):
        there = {_category(name) for name in names}
        mentioned = mentioned_categories(caption)
        false = sum(category not in there for category in mentioned)
        mentions, hallucinated, bad = mentions + len(mentioned), hallucinated + false, bad + (false > 0)
    return Chair(hallucinated / max(1, mentions), bad / max(1, len(captions)), mentions, hallucinated)


def _category(name: str) -> str | None:
    return name if name in CATEGORIES else PHRASES.get(tuple(name.lower().split()))


def _describes(words: list[str], at: int, length: int) -> bool:
    """Whether a colour word that is also a fruit describes what follows (an orange cat)."""
    if length != 1 or words[at] not in ADJECTIVES or at + 1 >= len(words):
        return False
    return token_kind(words, at + 1) in ("noun", "adj")
