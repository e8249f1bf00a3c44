"""The studies of ``make verify``: each in its quick form, a line of each: question, seen or not, seconds.

A claim of a paper that is not seen is a result, not a failure: one seed and no choice of learning rates show little. A
study that cannot be run is a failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Run = Callable[[str, Path], Mapping[str, Any]]


def run_quick(name: str, out: Path, processes: int = 1) -> dict[str, Any]:
    """The results of ``fastrl study NAME --quick --jobs PROCESSES`` in the folder ``out``, from the last line it
    prints.

    Raises:
        RuntimeError: the study failed or printed no JSON object.
    """
    command = [sys.executable, "-m", "fastrl.cli", "study", name, "--quick", "--out", str(out), "--json"]
    command += ["--jobs", str(processes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        raise RuntimeError(f"exit status {done.returncode}, no result")
    return json.loads(lines[-1])


def run_all(names: Iterable[str], out: Path, run: Run = run_quick) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The results of each study, with ``wall_seconds``, and a line for each that failed. ``run``: runs one."""
    results: dict[str, dict[str, Any]] = {}
    failed: list[str] = []
    for name in names:
        started = time.perf_counter()
        try:
            found = run(name, out / name)
        except RuntimeError as error:
            failed.append(f"study {name}: {error}")
            continue
        results[name] = {**found, "wall_seconds": time.perf_counter() - started}
    return results, failed


def line(result: Mapping[str, Any]) -> str:
    """``temporal        203 s  does temporal perplexity …? 2 of 3 seen; not: top − random (falls)``"""
    return f"{result['study']:12} {result['wall_seconds']:6.0f} s  {result['question']} {told_of(result)}"


def told_of(result: Mapping[str, Any]) -> str:
    """Of how many main comparisons the interval agrees with the paper, and the others, also those that it does not
    decide, with what was found."""
    if result["stopped"]:
        return f"nothing was trained: {result['stopped']}"
    claims = result["claims"]
    told = f"{sum(claim['seen'] is True for claim in claims.values())} of {len(claims)} seen"
    for answer, title in ((False, "not"), (None, "not decided")):
        names = [f"{name} ({claim['found']})" for name, claim in claims.items() if claim["seen"] is answer]
        told += f"; {title}: {', '.join(names)}" if names else ""
    return told
