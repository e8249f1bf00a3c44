"""The papers' evaluation protocols: ``evaluate(task, records, answers)``, for answers from any source.

``load_predictions(path, records)`` reads answers from a file written by another system.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fastrl.captions import Similarity
from fastrl.data.records import Record
from fastrl.evaluate.caption import evaluate_caption
from fastrl.evaluate.coco import evaluate_detection
from fastrl.evaluate.counting import evaluate_counting
from fastrl.evaluate.ocr import evaluate_ocr
from fastrl.evaluate.predictions import PredictionError, Predictions, load_predictions
from fastrl.evaluate.qa import evaluate_qa
from fastrl.evaluate.refcoco import evaluate_grounding
from fastrl.evaluate.trajectory import evaluate_trajectory
from fastrl.rewards.base import unknown
from fastrl.rewards.ocr import Normalise

Metrics = Mapping[str, float | None]  # None: not defined for these records

EVALUATIONS: dict[str, Callable[[Sequence[Record], Sequence[str]], Metrics]] = {
    "grounding": evaluate_grounding,
    "counting": evaluate_counting,
    "detection": evaluate_detection,
    "ocr": evaluate_ocr,
    "caption": evaluate_caption,
    "trajectory": evaluate_trajectory,
    "qa": evaluate_qa,
}


def evaluate(
    task: str,
    records: Sequence[Record],
    answers: Sequence[str],
    *,
    similarity: Similarity | None = None,
    normalise: Normalise = "nfc",
) -> Metrics:
    """Metrics of ``answers[i]`` as an answer to ``records[i]``; all but the counts and MME's scores are fractions or
    means in [0, 1].

    - grounding: ``acc@0.5 acc@0.75 acc@0.95 mean_iou``
    - counting: ``accuracy``, ``point_distance`` (share of the picture's diagonal, lower is better; None if no record
      has points) and ``unmatched``, a number of records (``evaluate_counting``)
    - detection: ``AP AP50 AP75`` (None, i.e. undefined, if the data has no object), and
      ``dropped unlabelled unknown_label``, numbers of boxes that are not scored (``evaluate_detection``)
    - caption: ``score fact_f1``, ``object_precision … relation_f1``, ``false_facts false_captions chair_i chair_s``
      (see ``evaluate_caption``, which ``similarity`` is for)
    - ocr: ``edit_distance`` (lower is better) ``f1 precision recall bleu meteor``
      (``normalise``: see ``evaluate_ocr``)
    - trajectory: ``mean_iou recall@0.5 identity_accuracy``, with py-motmetrics ``mota idf1`` (``evaluate_trajectory``)
    - qa: ``accuracy``, ``accuracy_TYPE``, of yes/no questions ``precision recall f1 yes_rate``,
      of questions in groups ``GROUP_accuracy``, of MME ``accuracy_plus score_CATEGORY`` (``groups.group_metrics``)

    and always ``n`` (answers) and ``unparsable`` (answers that could not be parsed). Coordinates are interpreted in
    each record's ``frame``, with the sizes in its ``views``.

    Raises:
        ValueError: the task is unknown, there are no records, records have another task, or the numbers of answers and
            records differ.
        TypeError: an answer is no string.
    """
    if task not in EVALUATIONS:
        raise ValueError(unknown("task to evaluate", task, EVALUATIONS))
    if len(records) != len(answers):
        raise ValueError(f"{len(records)} records but {len(answers)} answers")
    if not records:
        raise ValueError(f"no {task} records to evaluate")
    for number, answer in enumerate(answers):
        if not isinstance(answer, str):
            raise TypeError(f"answers[{number}] must be a string, got {answer!r:.80}; without an answer, give ''")
    for record in records:
        if record.task != task:
            raise ValueError(f"{record.source or record.id}: a {record.task} record cannot be evaluated as {task}")
    if task == "caption":
        return evaluate_caption(records, answers, similarity)
    if task == "ocr":
        return evaluate_ocr(records, answers, normalise=normalise)
    return EVALUATIONS[task](records, answers)


__all__ = ["EVALUATIONS", "Metrics", "PredictionError", "Predictions", "evaluate", "load_predictions"]
