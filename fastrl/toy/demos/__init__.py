"""``fastrl demo``: each method on generated scenes, before and after, in minutes on two CPU cores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastrl.data.disk import nothing_empty_left
from fastrl.rewards.base import unknown
from fastrl.toy.demos.families import DEFAULT, recipe_for

DEMOS = {
    "perception-r1": "fastrl.toy.demos.perception_r1",
    "perpo": "fastrl.toy.demos.perpo",
    "reper": "fastrl.toy.demos.reper",
    "utr": "fastrl.toy.demos.utr",
}
BY_FAMILY = ("perpo", "reper", "utr")  # demos that run on each of the small models' families


def run_demo(
    method: str,
    *,
    task: str | None = None,
    family: str | None = None,
    out: Path | None = None,
    seed: int = 0,
    steps: int | None = None,
    say: Callable[[str], None] = print,
    **options: Any,
) -> dict[str, Any]:
    """Run a method's demo and return its result: ``method``, ``metric``, ``before``, ``after``, ``greedy_before``,
    ``greedy_after``, ``seconds`` and what else the method reports. ``steps``: of training; None: as many as it takes.
    ``family``: the model type of the small model; None: Qwen2.5-VL's.

    Raises:
        ValueError: an unknown method, task or family, a method that has no demo for that family, or ``out`` holds
            something.
    """
    import importlib

    if method not in DEMOS:
        raise ValueError(unknown("demo", method, DEMOS))
    name = "-".join(filter(None, (method, task, family)))
    if method in BY_FAMILY:
        recipe_for(method, family)  # an unknown family is an error before a folder is made
        options["family"] = family
    elif family not in (None, DEFAULT):
        raise ValueError(f"--family {family}: the demo of {method} runs on {DEFAULT}; {', '.join(BY_FAMILY)} have both")
    out = out if out is not None else fresh(Path("runs") / f"demo-{name}")
    options |= {} if steps is None else {"steps": steps}
    with nothing_empty_left(out):
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise ValueError(f"{out} is not empty, and a demo overwrites nothing: give another --out")
        return importlib.import_module(DEMOS[method]).run(task=task, out=out, seed=seed, say=say, **options)


def fresh(folder: Path) -> Path:
    """``folder``, or the first of ``folder-2``, ``folder-3``, … that does not exist: a demo overwrites nothing."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
