"""Counting evaluation: answers with exactly the right number of objects (Perception-R1 on PixMo-Count), and how far off
their points are.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from fastrl.data.records import Record
from fastrl.rewards.counting import CountingReward, exact_counts, point_distances, true_points
from fastrl.rewards.reading import view_of

MOST = 20_000  # points read from one answer


def evaluate_counting(records: Sequence[Record], answers: Sequence[str]) -> dict[str, float | None]:
    """``accuracy``, ``point_distance``, ``unmatched``, ``n`` and ``unparsable``.

    ``accuracy`` is the fraction of answers with as many boxes or points as there are objects. An unparsable answer is
    wrong, even if the count is zero; an explicit empty list means zero.

    ``point_distance`` says whether the points are where the objects are, which the number does not: the mean distance
    of matched points as a share of the picture's diagonal (:func:`point_distances`), averaged over the points of a
    record, then over records. Only records with true points (or boxes) and a known size of their picture can have one;
    those of them in which nothing is matched, because the answer has no point, have none and are counted as
    ``unmatched``. None: no record has one, as in data with counts alone.
    """
    exact = exact_counts(answers, records, max_items=MOST)
    unparsable = CountingReward(max_items=MOST).readable(answers, records).count(False)
    placed = [i for i, record in enumerate(records) if true_points(record) and view_of(record) is not None]
    distances = point_distances([answers[i] for i in placed], [records[i] for i in placed])
    known = [distance for distance in distances if distance is not None]
    return {
        "accuracy": sum(exact) / len(exact),
        "point_distance": fmean(known) if known else None,
        "unmatched": len(distances) - len(known),
        "n": len(exact),
        "unparsable": unparsable,
    }
