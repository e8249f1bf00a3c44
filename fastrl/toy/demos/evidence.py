"""What a demo reports: scores of every record of a second held-out set, and intervals of the differences.

Settings were chosen while looking at the first held-out set (``HELD_OUT_SEED``). Claims are therefore held to a set
that nothing was chosen on (``REPORTED_SEED``), and to the ends of intervals over its records, not to means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from fastrl.evaluate.intervals import paired_interval
from fastrl.toy.demos.table import print_rows

Scores = Mapping[str, Sequence[float]]  # measure -> a score of each record
Partial = Mapping[str, Sequence[float | None]]  # the same where a record may have none


class Compared(NamedTuple):
    """A comparison on the same records: what two (state, measure) pairs scored, as keys of the scores."""

    name: str
    before: tuple[str, str]
    after: tuple[str, str]


def change(name: str, measure: str, before: str = "before", after: str = "after") -> Compared:
    """One measure in two states of a model."""
    return Compared(name, (before, measure), (after, measure))


def report(
    path: Path, records: Sequence[Any], scores: Mapping[str, Partial], comparisons: Sequence[Compared]
) -> dict[str, Any]:
    """Write a line of scores per record, and return the means and intervals.

    Args:
        path: file of JSON lines: ``id`` and, for each state, its measures.
        records: of the reported set.
        scores: state of the model (``before``, ``after``, a method) -> its scores; None: the record has none.
        comparisons: to be made, by name.

    Returns:
        ``n``; ``changes``: comparison -> ``before``, ``after``, ``change``, ``low``, ``high``, of the records that have
        both scores, and ``left_out``, the number of the others if there are any. A comparison is missing if no record
        has both.
    """
    write_scores(path, [record.id for record in records], scores)
    changes = {}
    for name, (old_state, old_measure), (new_state, new_measure) in comparisons:
        both = zip(scores[old_state][old_measure], scores[new_state][new_measure], strict=True)
        pairs = [(old, new) for old, new in both if old is not None and new is not None]
        if not pairs:
            continue
        old, new = zip(*pairs, strict=True)
        changes[name] = {"before": fmean(old), "after": fmean(new), **paired_interval(old, new)._asdict()}
        if len(pairs) < len(records):
            changes[name]["left_out"] = len(records) - len(pairs)
    return {"n": len(records), "changes": changes}


def write_scores(path: Path, ids: Sequence[str], scores: Mapping[str, Partial]) -> None:
    """A line of JSON per record: ``id`` and, for each state, its measures (null: it has none)."""
    lines = [
        {"id": identity, **{state: {name: each[i] for name, each in row.items()} for state, row in scores.items()}}
        for i, identity in enumerate(ids)
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def per_record(values: Sequence[float], samples: int) -> list[float]:
    """Means over the ``samples`` scores of each record, which follow each other."""
    return [fmean(values[at : at + samples]) for at in range(0, len(values), samples)]


def known_per_record(values: Sequence[float | None], samples: int) -> list[float | None]:
    """:func:`per_record` over the scores that there are; None for a record without any."""
    known = [[v for v in values[at : at + samples] if v is not None] for at in range(0, len(values), samples)]
    return [fmean(each) if each else None for each in known]


def print_evidence(unseen: Mapping[str, Any], what: str) -> None:
    """The comparisons with their 95 % intervals, on stdout."""
    rows = [
        (name, f"{c['before']:.3f}", f"{c['after']:.3f}", f"{c['change']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]")
        for name, c in unseen["changes"].items()
    ]
    title = f"{unseen['n']} other {what}, on which nothing was chosen; 95 % intervals over them"
    print_rows(title, ("compared", "before", "after", "change"), rows)
    for name, c in unseen["changes"].items():
        if "left_out" in c:
            print(f"{name}: without {c['left_out']} {what} that have no score before or after")
