"""The image-unconditional study (PerPO §4.7): the same training with and without images, before and after.

A model can learn preferences from the text alone: the form of good answers, likely positions. For a perception model
this is reward hacking, and it appears as a gain also when training on blank pictures. Only the additional gain of a
method comes from the images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.data import load_data
from fastrl.data.blank import BlankImages
from fastrl.evaluate import EVALUATIONS, Metrics, evaluate
from fastrl.evaluate.run import MAX_NEW_TOKENS, sample_records
from fastrl.recipe import Recipe, build_recipe
from fastrl.rewards.base import unknown
from fastrl.run.integrity import CheckpointError
from fastrl.run.setup import load_model
from fastrl.trainer import train

if TYPE_CHECKING:
    from fastrl.data.records import Record
    from fastrl.models.load import Policy

# The number the table shows of each task; "edit_distance" is better when lower
SHOWN = {
    "grounding": "mean_iou",
    "counting": "accuracy",
    "detection": "AP",
    "ocr": "edit_distance",
    "trajectory": "mean_iou",
    "qa": "accuracy",
}
ROWS = {"with image": False, "without image": True}


def run_study(
    recipe: Recipe,
    held_out: str,
    *,
    out: Path | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train twice with the same model, data, seed and steps: on the pictures, and on grey ones of the same size.

    Args:
        recipe: the run; its ``data.blank_images`` and ``out`` are set here.
        held_out: data to measure on, with a task that can be evaluated.
        out: folder for both runs (default ``runs/study-NAME``).
        limit: measure on the first records only.
        max_new_tokens: longest answer (default the protocol's).
        say: called with progress messages.

    Returns:
        ``metric`` and ``cells``: training (``with image``, ``without image``) → ``before``, ``after`` measured on
        pictures, and ``blank_before``, ``blank_after`` measured on grey ones; ``metrics`` has all numbers of each.

    Raises:
        ValueError: held-out records have several tasks, or one without an evaluation.
        CheckpointError: the folder already contains a study.
    """
    started = time.perf_counter()
    records = load_data(held_out)
    records = records if limit is None else records[:limit]
    task = records[0].task
    if task not in SHOWN or task not in EVALUATIONS:
        raise ValueError(unknown("task for a study", task, SHOWN))
    length = max_new_tokens or MAX_NEW_TOKENS[task]
    out = out if out is not None else Path("runs") / f"study-{recipe.name}"
    if any((out / _folder(blank)).exists() for blank in ROWS.values()):
        raise CheckpointError(f"{out} already contains a study: choose another --out")
    metrics: dict[str, dict[str, Metrics]] = {}
    before: dict[str, Metrics] | None = None
    for name, blank in ROWS.items():
        values = recipe.model_dump(mode="json")
        values["data"]["blank_images"] = blank
        values["out"] = str(out / _folder(blank))
        run = build_recipe(values)
        policy = load_model(run)
        if before is None:
            say(f"measuring {len(records)} held-out records before training …")
            before = _measure(policy, records, task, length)
        if before["seen"][SHOWN[task]] is None:
            raise ValueError(f"{held_out}: has no object, so {SHOWN[task]} is not defined")
        say(f"training {name}: {run.optim.steps} steps …")
        train(run, policy=policy)
        say("measuring again …")
        after = _measure(policy, records, task, length)
        metrics[name] = {"before": before["seen"], "after": after["seen"]}
        metrics[name] |= {"blank_before": before["blank"], "blank_after": after["blank"]}
    shown = SHOWN[task]
    return {
        "recipe": recipe.name,
        "task": task,
        "metric": shown,
        "held_out": len(records),
        "steps": recipe.optim.steps,
        "cells": {name: {when: row[shown] for when, row in rows.items()} for name, rows in metrics.items()},
        "metrics": metrics,
        "seconds": time.perf_counter() - started,
        "out": str(out),
    }


def print_study(result: dict[str, Any]) -> None:
    """The 2×2 table (training with and without image, before and after), and the same measured on grey pictures."""
    from rich.console import Console
    from rich.table import Table

    lower = ", lower is better" if result["metric"] == "edit_distance" else ""
    console = Console()
    for prefix, measured in (("", "pictures"), ("blank_", "grey pictures")):
        title = f"{result['recipe']}: {result['metric']} of {result['held_out']} held-out {measured}{lower}"
        table = Table(title=title)
        table.add_column("training")
        for column in ("before", "after", "change"):
            table.add_column(column, justify="right")
        for name, row in result["cells"].items():
            old, new = row[f"{prefix}before"], row[f"{prefix}after"]
            table.add_row(name, f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}")
        console.print(table)


def _folder(blank: bool) -> str:
    return "without-image" if blank else "with-image"


def _measure(policy: Policy, records: Sequence[Record], task: str, length: int) -> dict[str, Metrics]:
    """Metrics of greedy answers, on the pictures and on grey ones."""
    from fastrl.rollout import Sampling

    sampling = Sampling(n=1, max_new_tokens=length, temperature=0.0)
    found = {}
    for name, data in (("seen", records), ("blank", BlankImages(records))):
        answered = list(sample_records(policy, data, sampling))
        found[name] = evaluate(task, [r for r, _ in answered], [completions[0].text for _, completions in answered])
    return found
