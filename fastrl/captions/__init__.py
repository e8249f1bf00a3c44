"""Facts of captions and their correctness: a rule-based parser, fact matching, and CHAIR's object hallucination.

``parse_caption(text)`` returns objects, attributes and relations; ``compare`` and ``weighted_f1`` score them against
``truth_of(record.target, where)``; ``chair`` counts mentioned COCO objects that are not in the picture.
"""

from fastrl.captions.chair import Chair, chair, mentioned_categories
from fastrl.captions.match import (
    CAPTURE_WEIGHTS,
    REPER_WEIGHTS,
    TYPES,
    Match,
    OfReferences,
    Similarity,
    Truth,
    compare,
    embedding_similarity,
    lists_facts,
    truth_of,
    weighted_f1,
)
from fastrl.captions.parse import Facts, parse_caption

__all__ = [
    "CAPTURE_WEIGHTS",
    "REPER_WEIGHTS",
    "TYPES",
    "Chair",
    "Facts",
    "Match",
    "OfReferences",
    "Similarity",
    "Truth",
    "chair",
    "compare",
    "embedding_similarity",
    "lists_facts",
    "mentioned_categories",
    "parse_caption",
    "truth_of",
    "weighted_f1",
]
