"""Grounding evaluation: accuracy at IoU 0.5, 0.75 and 0.95, and mean IoU (RefCOCO's protocol in Perception-R1)."""

from __future__ import annotations

from collections.abc import Sequence

from fastrl.data.records import Record
from fastrl.rewards.grounding import GroundingReward

THRESHOLDS = (0.5, 0.75, 0.95)


def evaluate_grounding(records: Sequence[Record], answers: Sequence[str]) -> dict[str, float]:
    """``acc@0.5 acc@0.75 acc@0.95`` (fraction of answers with IoU ≥ that), ``mean_iou``, ``n`` and ``unparsable``.

    The first box of an answer counts; an answer without one has IoU 0 and stays in every denominator. IoU carries no
    epsilon: the released evaluation adds 1e-10 to the denominator, with which a perfect box falls short of 1 and tiny
    boxes in unit coordinates fall far short.
    """
    reward = GroundingReward(format="none")
    ious = reward.score(answers, records)["iou"]
    result = {f"acc@{t}": sum(iou >= t for iou in ious) / len(ious) for t in THRESHOLDS}
    result["mean_iou"] = sum(ious) / len(ious)
    return {**result, "n": len(ious), "unparsable": reward.readable(answers, records).count(False)}
