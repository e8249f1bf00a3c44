"""Captions: precision, recall and F1 of objects, attributes and relations (CAPTURE's structure), and hallucination.

The truth is a record's own facts (scenes), or those of its reference captions. Facts are found by rules of our own, not
by CAPTURE's trained parser, so that no number here may be put beside a published CAPTURE. Matching is by rules: exact,
then by synonyms; ``similarity`` adds CAPTURE's soft matching.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastrl.captions import (
    CAPTURE_WEIGHTS,
    TYPES,
    Similarity,
    chair,
    compare,
    mentioned_categories,
    parse_caption,
    truth_of,
    weighted_f1,
)
from fastrl.data.records import Record


def evaluate_caption(
    records: Sequence[Record], answers: Sequence[str], similarity: Similarity | None = None
) -> dict[str, float]:
    """Metrics of captions, all in [0, 1] but the counts.

    ``score`` (weights 5:2:2, RePer's rule score) and ``fact_f1`` (CAPTURE's weights, 5:5:2); ``object_precision`` …
    ``relation_f1``, each a mean over the records in which that type occurs; ``false_facts``, the fraction of stated
    facts that are not true, and ``false_captions``, the fraction of captions with one; ``chair_i`` and ``chair_s``, the
    same for objects only: COCO's 80 categories if truth comes from references, all objects if a record lists its facts.

    Raises:
        ValueError: a record has no truth.
    """
    scores: dict[str, list[float]] = {name: [] for name in ("score", "fact_f1")}
    stated = false = false_captions = unparsable = 0
    listed = [0, 0, 0]  # for records that list their facts: objects, false objects, captions with one
    free: list[int] = []
    for i, (record, answer) in enumerate(zip(records, answers, strict=True)):
        facts, truth = parse_caption(answer), truth_of(record.target, record.source or record.id)
        matches = compare(facts, truth, similarity)
        unparsable += not facts.objects
        scores["score"].append(weighted_f1(matches))
        scores["fact_f1"].append(weighted_f1(matches, CAPTURE_WEIGHTS))
        for kind, match in matches.items():
            for name in ("precision", "recall", "f1"):
                scores.setdefault(f"{kind[:-1]}_{name}", []).append(getattr(match, name))
        wrong = sum(len(match.wrong) for match in matches.values())
        stated, false = stated + sum(match.stated for match in matches.values()), false + wrong
        false_captions += wrong > 0
        if truth.exact:
            surplus = len(matches["objects"].wrong) if "objects" in matches else 0
            listed = [listed[0] + len(facts.objects), listed[1] + surplus, listed[2] + (surplus > 0)]
        else:
            free.append(i)
    found = chair([answers[i] for i in free], [_present(records[i]) for i in free])
    n = len(records)
    order = ["score", "fact_f1", *(f"{k[:-1]}_{m}" for k in TYPES for m in ("precision", "recall", "f1"))]
    metrics = {name: sum(scores[name]) / len(scores[name]) for name in order if scores.get(name)}
    return metrics | {
        "false_facts": false / max(1, stated),
        "false_captions": false_captions / n,
        "chair_i": (found.hallucinated + listed[1]) / max(1, found.mentions + listed[0]),
        "chair_s": (found.chair_s * len(free) + listed[2]) / n,
        "n": n,
        "unparsable": unparsable,
    }


def _present(record: Record) -> list[str]:
    """Names of the objects in a record's picture: annotated ones and those its references mention."""
    mentioned = [name for text in record.target.get("references", ()) for name in mentioned_categories(text)]
    return [*record.target.get("objects", ()), *mentioned]
