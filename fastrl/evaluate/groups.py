"""Questions that count together: right only if all of a group are (HallusionBench, MME, CircularEval).

``target["groups"]`` of a record names its group under each heading (see ``fastrl.data.records.Record``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from fastrl.data.records import Record

# MME's two halves (arXiv:2306.13394, table 1); a category outside them counts in neither sum.
MME: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "perception": (
            *("existence", "count", "position", "color", "posters"),
            *("celebrity", "scene", "landmark", "artwork", "OCR"),
        ),
        "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
    }
)


def group_metrics(records: Sequence[Record], right: Sequence[bool]) -> dict[str, float]:
    """Accuracies over groups.

    - ``figure_accuracy``, ``pair_accuracy`` (HallusionBench's fAcc and qAcc; aAcc is ``accuracy``) and
      ``circular_accuracy`` (CircularEval): the fraction of groups all of whose questions are answered right.
    - MME: ``accuracy_plus`` and ``accuracy_plus_CATEGORY``, the same over pictures; ``score_CATEGORY``, 100 times
      accuracy plus accuracy+ (0 to 200); ``score_perception`` (to 2,000) and ``score_cognition`` (to 800), the sums
      over the categories of either half that the data has.

    Empty for records without groups.
    """
    groups: dict[str, dict[str, list[int]]] = {}
    for place, record in enumerate(records):
        for heading, name in (record.target.get("groups") or {}).items():
            groups.setdefault(heading, {}).setdefault(name, []).append(place)
    pictures = groups.pop("mme", None)
    found = {f"{heading}_accuracy": _whole(members, right) for heading, members in groups.items()}
    return found if pictures is None else found | _mme(records, right, pictures)


def _whole(groups: Mapping[str, Sequence[int]], right: Sequence[bool]) -> float:
    """The fraction of groups that are right as a whole."""
    return sum(all(right[place] for place in members) for members in groups.values()) / len(groups)


def _mme(records: Sequence[Record], right: Sequence[bool], pictures: Mapping[str, list[int]]) -> dict[str, float]:
    by_category: dict[str, dict[str, list[int]]] = {}
    for name, members in pictures.items():
        by_category.setdefault(str(records[members[0]].target["type"]), {})[name] = members
    found = {"accuracy_plus": _whole(pictures, right)}
    scores: dict[str, float] = {}
    for category, members in by_category.items():
        asked = [right[place] for places in members.values() for place in places]
        plus = _whole(members, right)
        found[f"accuracy_plus_{category}"] = plus
        scores[category] = 100 * (sum(asked) / len(asked) + plus)
    found |= {f"score_{category}": score for category, score in scores.items()}
    halves = {half: [scores[name] for name in names if name in scores] for half, names in MME.items()}
    return found | {f"score_{half}": sum(values) for half, values in halves.items() if values}
