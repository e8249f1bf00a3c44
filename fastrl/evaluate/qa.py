"""Question answering: accuracy of multiple choice by type (NExT-QA), and precision, recall, F1 of yes or no (POPE);
accuracies over questions that belong together are in ``groups``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastrl.answers.choice import parse_choice, parse_yes_no
from fastrl.data.records import Record
from fastrl.evaluate.groups import group_metrics

_NEXT_QA = re.compile(r"[CTD][A-Z]")  # its types: causal, temporal, descriptive, and which of each


def evaluate_qa(records: Sequence[Record], answers: Sequence[str]) -> dict[str, float | None]:
    """Metrics of answers to questions with options (``target["choices"]``, ``answer`` the place of the right one) or
    with ``answer`` yes or no.

    - ``accuracy`` over all; an answer that names no option, or neither yes nor no, is wrong (but right where
      ``target["unsure_is_right"]``: HallusionBench counts it for questions about a figure that is not there).
    - ``accuracy_TYPE`` for each ``target["type"]``, and of each first letter that several of NExT-QA's types share
      (``C`` causal, ``T`` temporal, ``D`` descriptive).
    - Accuracies over groups of questions (:func:`fastrl.evaluate.groups.group_metrics`).
    - Where there are yes/no questions: ``precision``, ``recall`` and ``f1`` of yes, and ``yes_rate``, the share of them
      answered yes (POPE). An unreadable answer is no yes: where yes is right it is missed.
    - ``n`` and ``unparsable``.

    Raises:
        ValueError: a record whose truth is neither.
    """
    right: list[bool] = []
    types: dict[str, list[bool]] = {}
    verdicts: list[tuple[bool, bool | None]] = []  # truth, answer
    unparsable = 0
    for record, answer in zip(records, answers, strict=True):
        truth = _truth(record)
        found = parse_yes_no(answer) if isinstance(truth, bool) else parse_choice(answer, record.target["choices"])
        unparsable += found is None
        right.append(bool(record.target.get("unsure_is_right")) if found is None else found == truth)
        if isinstance(truth, bool):
            verdicts.append((truth, None if found is None else bool(found)))
        kind = record.target.get("type")
        if kind:
            letter = str(kind)[0] if _NEXT_QA.fullmatch(str(kind)) else str(kind)
            for name in dict.fromkeys((str(kind), letter)):
                types.setdefault(name, []).append(right[-1])
    result: dict[str, float | None] = {"accuracy": sum(right) / len(right)}
    for name in sorted(types, key=lambda name: (len(name), name)):
        if len(name) > 1 or name in {str(r.target.get("type")) for r in records} or _shared(name, types):
            result[f"accuracy_{name}"] = sum(types[name]) / len(types[name])
    result |= group_metrics(records, right)
    if verdicts:
        result |= _yes_metrics(verdicts)
    return {**result, "n": len(right), "unparsable": unparsable}


def _truth(record: Record) -> int | bool:
    target: Any = record.target
    answer, choices = target.get("answer"), target.get("choices")
    if choices and isinstance(answer, int) and 0 <= answer < len(choices):
        return int(answer)
    if not choices and isinstance(answer, str) and answer.strip().lower() in ("yes", "no"):
        return answer.strip().lower() == "yes"
    raise ValueError(
        f"{record.source or record.id}: a question needs choices with the place of the right one as answer, or yes or "
        f"no; got answer {answer!r:.60} and {len(choices or ())} choices"
    )


def _shared(letter: str, types: dict[str, list[bool]]) -> bool:
    return sum(len(name) > 1 and name[0] == letter for name in types) > 1


def _yes_metrics(verdicts: Sequence[tuple[bool, bool | None]]) -> dict[str, float]:
    claimed = sum(found is True for _, found in verdicts)
    true = sum(truth for truth, _ in verdicts)
    hits = sum(truth and found is True for truth, found in verdicts)
    precision, recall = hits / max(1, claimed), hits / max(1, true)
    f1 = 2 * hits / max(1, claimed + true)
    return {"precision": precision, "recall": recall, "f1": f1, "yes_rate": claimed / len(verdicts)}
