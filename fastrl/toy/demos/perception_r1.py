"""Perception-R1's demo: GRPO on scenes, measured on the same held-out ones before and after, for each of its tasks.

The small model was trained on pictures of 112 pixels; the recipes with boxes use smaller ones, for which its boxes are
inaccurate. (OCR keeps the size: in pictures of 84 pixels this model hardly reads, and 60 steps bring it from 0.15 to
0.20.) It gets no answers: it only learns from rewards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fastrl.data import load_data
from fastrl.evaluate.coco import evaluate_detection
from fastrl.evaluate.run import sample_records
from fastrl.recipe import load_recipe
from fastrl.rewards import reward_for
from fastrl.rewards.base import unknown
from fastrl.rewards.counting import exact_counts, point_distances
from fastrl.run.setup import load_model
from fastrl.toy.demos.claims import Claim, gains, loses
from fastrl.toy.demos.evidence import Compared, Partial, change, known_per_record, print_evidence, report
from fastrl.toy.demos.scenes import REPORTED_SEED, scenes_like
from fastrl.toy.demos.table import print_rows
from fastrl.trainer import train

if TYPE_CHECKING:
    from fastrl.data.records import Record
    from fastrl.models.load import Policy

METRICS = {"grounding": "iou", "counting": "exact", "detection": "f1", "ocr": "text"}  # task -> its main measure
BESIDE = {"counting": ("distance", "points")}  # other measures of a task: see ``scores_of``
TITLES = {"exact": "exact count", "distance": "distance of points", "points": "matched points"}  # others are as named
SHOWN = 6  # scenes in the figure
CLAIM = Claim(
    "sampled answers gain more than 0.05 and greedy ones gain, on every seed",
    (gains("sampled", above=0.05), gains("greedy")),
)
# claims of tasks that have another one
CLAIMS = {
    "counting": Claim(
        "exact counts gain more than 0.05 sampled and gain greedily, and matched points come closer to the true ones, "
        "on every seed",
        (
            gains("sampled", above=0.05),
            gains("greedy"),
            loses("sampled, distance"),
            loses("greedy, distance"),
        ),
    ),
    "ocr": Claim(  # greedy answers are nearly all right from the start
        "sampled answers gain more than 0.05, on every seed", (gains("sampled", above=0.05),)
    ),
}


@dataclass
class Measured:
    """Held-out scores of a policy, and its greedy answers."""

    scores: Partial  # of each record, by key: ``sampled`` (at temperature 1) and ``greedy``; ``sampled_distance``, …
    unmatched: dict[str, int]  # counting, ``sampled`` and ``greedy``: answers without a distance, as they have no point
    ap: float | None  # detection: COCO's AP of the greedy answers
    answers: list[tuple[Record, str]]

    def mean(self, key: str) -> float | None:
        """Mean score of the records that have one; None: no record has."""
        known = [value for value in self.scores[key] if value is not None]
        return fmean(known) if known else None


def run(
    *,
    task: str | None,
    out: Path,
    seed: int,
    say: Callable[[str], None],
    held_out: int = 512,
    steps: int | None = None,
) -> dict[str, Any]:
    """Measure, train, measure again; writes ``metrics.jsonl``, ``before_after.png`` and ``scores.jsonl`` in ``out``.

    Raises:
        ValueError: an unknown task.
    """
    task = task or "grounding"
    if task not in METRICS:
        raise ValueError(unknown("demo task", task, METRICS))
    started = time.perf_counter()
    changes: dict[str, Any] = {"out": str(out), "seed": seed, "data.seed": seed}
    if steps is not None:
        changes["optim.steps"] = steps
    recipe = load_recipe(f"perception-r1-{task}-tiny", changes)
    policy = load_model(recipe)
    records = load_data(scenes_like(recipe.data.spec, n=held_out))
    reported = load_data(scenes_like(recipe.data.spec, n=held_out, seed=REPORTED_SEED))
    say(f"measuring two sets of {held_out} held-out scenes before training …")
    length = recipe.rollout.max_new_tokens
    before, unseen = measure(policy, records, task, length), {"before": measure(policy, reported, task, length).scores}
    scenes, answers = recipe.data.prompts_per_step, recipe.rollout.group_size
    say(f"training {recipe.optim.steps} steps of {scenes} scenes × {answers} answers …")
    train(recipe, policy=policy)
    say("measuring the same scenes again …")
    after, unseen["after"] = measure(policy, records, task, length), measure(policy, reported, task, length).scores
    from fastrl.report.figures import before_after

    before_after(before.answers[:SHOWN], after.answers[:SHOWN], out / "before_after.png")
    result = {
        "method": "perception-r1",
        "task": task,
        "metric": METRICS[task],
        **_means(before, after),
        **({"ap_before": before.ap, "ap_after": after.ap} if task == "detection" else {}),
        "unseen": report(out / "scores.jsonl", reported, unseen, compared(task)),
        "held_out": held_out,
        "steps": recipe.optim.steps,
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "out": str(out),
    }
    print_table(result)
    return result


def keys_of(task: str) -> dict[str, tuple[str, str]]:
    """How scores are named: key -> (``sampled`` or ``greedy``, measure). The main measure's keys are the bare words."""
    beside = {f"{how}_{name}": (how, name) for name in BESIDE.get(task, ()) for how in ("sampled", "greedy")}
    return {how: (how, METRICS[task]) for how in ("sampled", "greedy")} | beside


def compared(task: str) -> list[Compared]:
    """Every score before and after training: ``sampled``, ``greedy``, ``sampled, distance``, …"""
    return [change(key.replace("_", ", "), key) for key in keys_of(task)]


def scores_of(task: str, answers: Sequence[str], records: Sequence[Record]) -> Partial:
    """Measure -> a score of each answer.

    Counting: ``exact`` (1 for the right number, else 0), ``distance`` of the matched points
    (:func:`point_distances`; None where there are none) and ``points``, the reward of matched points. That reward alone
    overestimates: the right number of points, all in the middle of the picture, score 0.79. F1 of detection counts
    boxes with an IoU of at least 0.5, whatever their labels; AP counts labels too.
    """
    if task != "counting":
        return {METRICS[task]: reward_for(task).score(answers, records)[METRICS[task]]}
    return {
        "exact": exact_counts(answers, records),
        "distance": point_distances(answers, records),
        "points": reward_for(task, format="none").score(answers, records)["points"],
    }


def measure(policy: Policy, records: Any, task: str, max_new_tokens: int, samples: int = 2) -> Measured:
    """Mean scores of ``samples`` answers per record at temperature 1 (a fixed seed), and scores of the greedy one."""
    from fastrl.rollout import Sampling

    each: dict[tuple[str, str], list[float | None]] = {}
    unmatched: dict[str, int] = {}
    answered: dict[str, list[tuple[Record, str]]] = {}
    for how, n, temperature in (("sampled", samples, 1.0), ("greedy", 1, 0.0)):
        sampling = Sampling(n=n, max_new_tokens=max_new_tokens, temperature=temperature)
        found = sample_records(policy, records, sampling, seed=0, portion=128)
        answered[how] = [(record, completion.text) for record, completions in found for completion in completions]
        scores = scores_of(task, [text for _, text in answered[how]], [record for record, _ in answered[how]])
        each |= {(how, name): known_per_record(values, n) for name, values in scores.items()}
        unmatched |= {how: scores["distance"].count(None)} if "distance" in scores else {}
    ap = None
    if task == "detection":
        ap = evaluate_detection([r for r, _ in answered["greedy"]], [text for _, text in answered["greedy"]])["AP"]
    return Measured({key: each[name] for key, name in keys_of(task).items()}, unmatched, ap, answered["greedy"])


def _means(before: Measured, after: Measured) -> dict[str, float | None]:
    """``before``, ``after``, ``greedy_before``, ``greedy_after`` and the same of other measures (``distance_before``,
    ``greedy_distance_before``, …) and of ``unmatched``, a number of answers."""
    found: dict[str, float | None] = {}
    for when, measured in (("before", before), ("after", after)):
        found |= {f"{key}_{when}".removeprefix("sampled_"): measured.mean(key) for key in measured.scores}
        counted = {f"{how}_unmatched_{when}": number for how, number in measured.unmatched.items()}
        found |= {key.removeprefix("sampled_"): number for key, number in counted.items()}
    return found


def print_table(result: dict[str, Any]) -> None:
    """The before/after table, on stdout."""
    task, metric = result["task"], result["metric"]
    shown = [(metric, ""), *((name, f"{name}_") for name in BESIDE.get(task, ()))]
    named = {"": "sampled (temperature 1)", "greedy_": "greedy"}
    rows = [
        (f"{how}, {TITLES[name]}" if task in BESIDE else how, f"{prefix}{key}")
        for name, key in shown
        for prefix, how in named.items()
    ]
    rows += [("greedy, AP", "ap_")] if "ap_before" in result else []
    pairs = [(label, result[f"{key}before"], result[f"{key}after"]) for label, key in rows]
    print_rows(
        f"{result['method']}: {task}, {result['held_out']} held-out scenes, mean {TITLES.get(metric, metric)}",
        ("answers", "before", "after", "change"),
        [(label, *_cells(old, new)) for label, old, new in pairs],
    )
    if "unmatched_before" in result:
        print(
            "distance: of matched points, a share of the picture's diagonal (less is better);\n"
            f"sampled answers without a point: {result['unmatched_before']} before, {result['unmatched_after']} after"
        )
    print_evidence(result["unseen"], "scenes")
    print(f"{result['seconds']:.0f} s; curves and figure in {result['out']}")


def _cells(old: float | None, new: float | None) -> tuple[str, str, str]:
    if old is None or new is None:
        return _cell(old), _cell(new), "–"
    return _cell(old), _cell(new), f"{new - old:+.3f}"


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
