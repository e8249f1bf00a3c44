"""Matches facts of a caption with true facts: exactly, then by synonyms, then softly; precision, recall and F1 by type.

The structure is CAPTURE's (its public metric code): the matches of each stage are removed before the next. Soft
matching adds the largest similarity of each remaining fact, for the candidate to precision, for the reference to
recall. A type that neither side mentions is left out and the other weights are renormalised (CAPTURE's ε would count it
as wrong).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fastrl.captions.coco import PHRASES
from fastrl.captions.parse import Facts, parse_caption

TYPES = ("objects", "attributes", "relations")
REPER_WEIGHTS: Mapping[str, float] = MappingProxyType({"objects": 5.0, "attributes": 2.0, "relations": 2.0})
CAPTURE_WEIGHTS: Mapping[str, float] = MappingProxyType({"objects": 0.5, "attributes": 0.5, "relations": 0.2})
# Attributes with the same meaning; objects use COCO's groups, relations are normalised by the parser.
_SAME = (
    "large big huge giant massive",
    "small little tiny miniature",
    "gray grey silver",
    "gold golden",
    "wooden wood",
)
_GROUP = {word: group.split()[0] for group in _SAME for word in group.split()}

# Phrases × phrases → similarities in [0, 1], one row for each of the first
Similarity = Callable[[Sequence[str], Sequence[str]], Sequence[Sequence[float]]]


@dataclass(frozen=True)
class Truth:
    """The true facts of a picture, as one or more sets with which a caption is compared (scores are averaged).

    ``exact``: every object is listed exactly once, so a caption that names one twice states a false fact. Facts parsed
    from reference captions do not count objects.
    """

    facts: tuple[Facts, ...]
    exact: bool


@dataclass(frozen=True)
class Match:
    """Precision, recall and F1 of one type of facts; ``wrong``: stated facts that are not true."""

    precision: float
    recall: float
    f1: float
    stated: int
    wrong: tuple[Any, ...] = ()
    missing: tuple[Any, ...] = ()


@dataclass(frozen=True)
class OfReferences:
    """Soft matching of facts parsed from reference captions alone: facts that a record lists (scenes) are complete and
    in words of their own, and are matched by rules."""

    similarity: Similarity

    def __call__(self, a: Sequence[str], b: Sequence[str]) -> Sequence[Sequence[float]]:
        """As the similarity that it holds."""
        return self.similarity(a, b)


def lists_facts(target: Mapping[str, Any]) -> bool:
    """Whether the truth of a caption record is its own list of facts, and not what its references say."""
    return all(kind in target for kind in TYPES)


def truth_of(target: Mapping[str, Any], where: str) -> Truth:
    """The truth of a caption record's ``target``: its own facts, else those parsed from its references.

    Raises:
        ValueError: it has neither; the message begins with ``where`` (file and line).
    """
    if lists_facts(target):
        listed = {kind: target[kind] for kind in TYPES}
        facts = Facts(
            tuple(listed["objects"]),
            tuple((o, a) for o, a in listed["attributes"]),
            tuple((a, r, b) for a, r, b in listed["relations"]),
        )
        return Truth((facts,), exact=True)
    references = target.get("references")
    if not references:
        raise ValueError(f"{where}: rule scores need references, or objects, attributes and relations, in the target")
    return Truth(tuple(parse_caption(text) for text in references), exact=False)


def compare(caption: Facts, truth: Truth, similarity: Similarity | None = None) -> dict[str, Match]:
    """Each type's match, averaged over the truth's sets of facts; types without any fact are left out.

    ``similarity`` matches softly what rules do not; :class:`OfReferences` leaves a record's own facts to the rules."""
    if truth.exact and isinstance(similarity, OfReferences):
        similarity = None
    found: dict[str, list[Match]] = {}
    for reference in truth.facts:
        for kind in TYPES:
            stated, true = getattr(caption, kind), getattr(reference, kind)
            if not truth.exact:
                stated, true = tuple(dict.fromkeys(stated)), tuple(dict.fromkeys(true))
            if stated or true:
                found.setdefault(kind, []).append(_match(stated, true, similarity))
    return {kind: _mean(matches) for kind, matches in found.items()}


def weighted_f1(matches: Mapping[str, Match], weights: Mapping[str, float] = REPER_WEIGHTS) -> float:
    """Weighted mean of the F1 of the types that occur, in [0, 1]; 0 if none does."""
    total = sum(weights[kind] for kind in matches)
    return sum(weights[kind] * match.f1 for kind, match in matches.items()) / total if total else 0.0


def same(a: Any, b: Any) -> bool:
    """Whether two facts of one type mean the same: synonyms, or one phrase inside the other by whole words."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if a == b or _canonical(a) == _canonical(b):
        return True
    first, second = f" {a} ", f" {b} "
    return first in second or second in first


def embedding_similarity(model: Any) -> Similarity:
    """Soft matching by anything that has a sentence-transformers model's ``encode``: cosines, cut at 0."""
    import torch

    def similarity(a: Sequence[str], b: Sequence[str]) -> list[list[float]]:
        first, second = (torch.as_tensor(model.encode(list(texts))).float() for texts in (a, b))
        first, second = (t / t.norm(dim=-1, keepdim=True).clamp(min=1e-12) for t in (first, second))
        return (first @ second.T).clamp(0, 1).tolist()

    return similarity


def _canonical(word: str) -> str:
    return PHRASES.get(tuple(word.split()), None) or _GROUP.get(word, word)


def _match(stated: Sequence[Any], true: Sequence[Any], similarity: Similarity | None) -> Match:
    wrong, missing = list(stated), list(true)
    for equal in (lambda a, b: a == b, same):
        for fact in list(wrong):
            partner = next((i for i, other in enumerate(missing) if equal(fact, other)), None)
            if partner is not None:
                wrong.remove(fact)
                del missing[partner]
    right = float(len(stated) - len(wrong))
    soft_stated = soft_true = 0.0
    if similarity is not None and wrong and missing:
        table = similarity([_phrase(f) for f in wrong], [_phrase(f) for f in missing])
        soft_stated = sum(max(row) for row in table)
        soft_true = sum(max(column) for column in zip(*table, strict=True))
    precision = (right + soft_stated) / len(stated) if stated else 0.0
    recall = (right + soft_true) / len(true) if true else 0.0
    return Match(precision, recall, _f1(precision, recall), len(stated), tuple(wrong), tuple(missing))


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _mean(matches: Sequence[Match]) -> Match:
    if len(matches) == 1:
        return matches[0]
    n = len(matches)
    wrong = [fact for fact in matches[0].wrong if all(fact in m.wrong for m in matches)]  # true in no reference
    missing = [fact for fact in matches[0].missing if all(fact in m.missing for m in matches)]
    precision, recall, f1 = (sum(getattr(m, name) for m in matches) / n for name in ("precision", "recall", "f1"))
    return Match(precision, recall, f1, matches[0].stated, tuple(wrong), tuple(missing))


def _phrase(fact: Any) -> str:
    """A fact as a phrase: "red square", "dog on bench"."""
    if isinstance(fact, str):
        return fact
    return f"{fact[1]} {fact[0]}" if len(fact) == 2 else " ".join(fact)
