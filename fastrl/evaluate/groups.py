"""Questions that count together: right only if all of a group are (HallusionBench, MME, CircularEval).

``target["groups"]`` of a record names its group under each heading, ``target["group_sizes"]`` says how many questions
that has (see ``fastrl.data.records.Record``). A group of which some are missing is counted neither as right nor as
wrong.
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


Groups = Mapping[str, Sequence[int]]  # name → places of its questions


def group_metrics(records: Sequence[Record], right: Sequence[bool]) -> dict[str, float | None]:
    """Accuracies over groups.

    - ``figure_accuracy``, ``pair_accuracy`` (HallusionBench's fAcc and qAcc; aAcc is ``accuracy``) and
      ``circular_accuracy`` (CircularEval): the fraction of groups all of whose questions are answered right.
    - MME: ``accuracy_plus`` and ``accuracy_plus_CATEGORY``, the same over pictures; ``score_CATEGORY``, 100 times
      accuracy plus accuracy+ (0 to 200); ``score_perception`` (to 2,000) and ``score_cognition`` (to 800), the sums
      over the categories of either half that the data has.
    - ``incomplete_HEADING`` (``figure``, ``pair``, ``circular``, ``mme``): how many groups were left out because
      questions of them are missing (bad rows that were skipped, those after a limit), if there are any. An accuracy of
      which no group is complete is None.

    Empty for records without groups.
    """
    groups: dict[str, dict[str, list[int]]] = {}
    for place, record in enumerate(records):
        for heading, name in (record.target.get("groups") or {}).items():
            groups.setdefault(heading, {}).setdefault(name, []).append(place)
    complete = {heading: _complete(records, heading, members) for heading, members in groups.items()}
    pictures = groups.get("mme")
    found = {f"{heading}_accuracy": _whole(each, right) for heading, each in complete.items() if heading != "mme"}
    found |= {} if pictures is None else _mme(records, right, pictures, complete["mme"])
    missing = {heading: len(members) - len(complete[heading]) for heading, members in groups.items()}
    return found | {f"incomplete_{heading}": float(n) for heading, n in missing.items() if n}


def _complete(records: Sequence[Record], heading: str, groups: Groups) -> Groups:
    """The groups all of whose questions are there, as far as records know how many that are."""

    def size(members: Sequence[int]) -> int:
        return (records[members[0]].target.get("group_sizes") or {}).get(heading, 0)

    return {name: members for name, members in groups.items() if len(members) >= size(members)}


def _whole(groups: Groups, right: Sequence[bool]) -> float | None:
    """The fraction of groups that are right as a whole."""
    if not groups:
        return None
    return sum(all(right[place] for place in members) for members in groups.values()) / len(groups)


def _mme(
    records: Sequence[Record], right: Sequence[bool], pictures: Groups, complete: Groups
) -> dict[str, float | None]:
    by_category: dict[str, dict[str, Sequence[int]]] = {}
    for name, members in pictures.items():
        by_category.setdefault(str(records[members[0]].target["type"]), {})[name] = members
    found = {"accuracy_plus": _whole(complete, right)}
    scores: dict[str, float] = {}
    for category, members in by_category.items():
        asked = [right[place] for places in members.values() for place in places]
        plus = _whole({name: places for name, places in members.items() if name in complete}, right)
        found[f"accuracy_plus_{category}"] = plus
        if plus is not None:
            scores[category] = 100 * (sum(asked) / len(asked) + plus)
    found |= {f"score_{category}": score for category, score in scores.items()}
    halves = {half: [scores[name] for name in names if name in scores] for half, names in MME.items()}
    return found | {f"score_{half}": sum(values) for half, values in halves.items() if values}
