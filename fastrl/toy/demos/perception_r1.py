"""Perception-R1's demo: GRPO on scenes, measured on the same held-out ones before and after, for each of its tasks.

The small model was trained on pictures of 112 pixels; the recipes with boxes use smaller ones, for which its boxes are
inaccurate. (OCR keeps the size: in pictures of 84 pixels this model hardly reads, and 60 steps bring it from 0.15 to
0.20.) It gets no answers: it only learns from rewards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
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
from fastrl.run.setup import load_model
from fastrl.toy.demos.claims import Claim, gains
from fastrl.toy.demos.evidence import Scores, change, per_record, print_evidence, report
from fastrl.toy.demos.scenes import REPORTED_SEED, scenes_like
from fastrl.toy.demos.table import print_rows
from fastrl.trainer import train

if TYPE_CHECKING:
    from fastrl.data.records import Record
    from fastrl.models.load import Policy

# task -> the reward component that is reported
METRICS = {"grounding": "iou", "counting": "points", "detection": "f1", "ocr": "text"}
SHOWN = 6  # scenes in the figure
CLAIM = Claim(
    "sampled answers gain more than 0.05 and greedy ones gain, on every seed",
    (gains("sampled", above=0.05), gains("greedy")),
)
# claims of tasks that have another one
CLAIMS = {
    "ocr": Claim(  # greedy answers are nearly all right from the start
        "sampled answers gain more than 0.05, on every seed", (gains("sampled", above=0.05),)
    )
}


@dataclass
class Measured:
    """Held-out scores of a policy, and its greedy answers."""

    sampled: float  # mean reward of answers sampled at temperature 1
    greedy: float
    exact: float | None  # counting: fraction of sampled answers with the right number, at any positions
    greedy_exact: float | None
    ap: float | None  # detection: COCO's AP of the greedy answers
    answers: list[tuple[Record, str]]
    scores: Scores  # of each record: ``sampled``, ``greedy`` and, for counting, the same with ``_exact``


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
        "before": before.sampled,
        "after": after.sampled,
        "greedy_before": before.greedy,
        "greedy_after": after.greedy,
        **_exact(before, after),
        **({"ap_before": before.ap, "ap_after": after.ap} if task == "detection" else {}),
        "unseen": report(out / "scores.jsonl", reported, unseen, [change(name, name) for name in before.scores]),
        "held_out": held_out,
        "steps": recipe.optim.steps,
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "out": str(out),
    }
    print_table(result)
    return result


def measure(policy: Policy, records: Any, task: str, max_new_tokens: int, samples: int = 2) -> Measured:
    """Mean reward of ``samples`` answers per record at temperature 1 (a fixed seed), and of the greedy one.

    Matched points alone overestimate: an answer independent of the picture, with the usual number of evenly spread
    points, scores 0.79. So counting also reports the fraction of answers with the exact number. F1 of detection counts
    boxes with an IoU of at least 0.5, whatever their labels; AP counts labels too.
    """
    from fastrl.rollout import Sampling

    reward, name = reward_for(task), METRICS[task]
    counter = reward_for("counting", score_by="count", format="none") if task == "counting" else None
    each: dict[str, list[float]] = {}
    greedy_answers: list[tuple[Record, str]] = []
    for greedy in (False, True):
        sampling = Sampling(
            n=1 if greedy else samples, max_new_tokens=max_new_tokens, temperature=0.0 if greedy else 1.0
        )
        values: list[float] = []
        right: list[float] = []
        for record, completions in sample_records(policy, records, sampling, seed=0, portion=128):
            texts = [completion.text for completion in completions]
            values += reward(texts, record)[name]
            right += counter(texts, record)["points"] if counter is not None else []
            if greedy:
                greedy_answers.append((record, completions[0].text))
        key = "greedy" if greedy else "sampled"
        each[key] = per_record(values, sampling.n)
        each |= {f"{key}_exact": per_record(right, sampling.n)} if counter is not None else {}
    means = {name: fmean(values) for name, values in each.items()}
    exact = means.get("sampled_exact"), means.get("greedy_exact")
    ap = None
    if task == "detection":
        ap = evaluate_detection([r for r, _ in greedy_answers], [text for _, text in greedy_answers])["AP"]
    return Measured(means["sampled"], means["greedy"], *exact, ap, greedy_answers, each)


def _exact(before: Measured, after: Measured) -> dict[str, float]:
    """``exact_before``, ``exact_after`` and the same of greedy answers; empty for tasks other than counting."""
    if before.exact is None or before.greedy_exact is None or after.exact is None or after.greedy_exact is None:
        return {}
    sampled = {"exact_before": before.exact, "exact_after": after.exact}
    return sampled | {"greedy_exact_before": before.greedy_exact, "greedy_exact_after": after.greedy_exact}


def print_table(result: dict[str, Any]) -> None:
    """The before/after table, on stdout."""
    rows = [("sampled (temperature 1)", ""), ("greedy", "greedy_")]
    if "exact_before" in result:
        rows += [("sampled, exact count", "exact_"), ("greedy, exact count", "greedy_exact_")]
    rows += [("greedy, AP", "ap_")] if "ap_before" in result else []
    pairs = [(label, result[f"{key}before"], result[f"{key}after"]) for label, key in rows]
    print_rows(
        f"{result['method']}: {result['task']}, {result['held_out']} held-out scenes, mean {result['metric']}",
        ("answers", "before", "after", "change"),
        [(label, f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}") for label, old, new in pairs],
    )
    print_evidence(result["unseen"], "scenes")
    print(f"{result['seconds']:.0f} s; curves and figure in {result['out']}")
