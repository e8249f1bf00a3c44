"""Runs a study: every arm with every seed, each in its own folder; what is finished is not done again.

    OUT/study.json                       the study and its settings; another study or setting is refused
    OUT/seed-0/                          what the arms of this seed share
    OUT/ARM/seed-0/rate-0.0001/          one job: scores of every record (JSON lines), the run's files, done.json
    OUT/scores.jsonl, results.json, study.html

Learning rates are chosen for each group of arms from one grid, by one seed, on a set of records that is not reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fastrl.data.disk import nothing_empty_left
from fastrl.data.files import write_atomically
from fastrl.studies.base import CHOOSING, REPORTED, Arm, Job, Study
from fastrl.studies.cells import is_done, read_cell, spent_on
from fastrl.studies.machine import code_commit
from fastrl.studies.outcome import outcome
from fastrl.studies.page import write_page
from fastrl.studies.workers import Runs, runs_of

FILE = "study.json"


def run_study(study: Study, out: Path, *, seeds: int | None = None, processes: int = 1) -> dict[str, Any]:
    """Run what is not finished yet, and write the results and the page.

    Args:
        study: with its settings.
        out: the study's folder; that of an interrupted study is continued.
        seeds: number of seeds, from 0 (None: the study's; quick studies have one). More can be added later.
        processes: that run jobs; with several, each has its part of the cores. Numbers depend on the threads of each
            process (the order of sums), not on how many there are.

    Returns:
        See ``fastrl.studies.outcome.outcome``; all of it but ``out`` is written to ``OUT/results.json``.

    Raises:
        ValueError: no seed, or several for a quick study, the folder holds something else or another study or setting,
            or what the study's ``begin`` says.
        fastrl.studies.workers.JobError: a job failed in another process.
    """
    if study.quick and seeds not in (None, 1):
        raise ValueError(f"--quick has one seed, got --seeds {seeds}: leave one of them out")
    if seeds is not None and seeds < 1:
        raise ValueError(f"a study has at least one seed, got {seeds}")
    if processes < 1:
        raise ValueError(f"jobs run in at least one process, got {processes}")
    count = 1 if study.quick else seeds or study.seeds
    described = {"study": study.about.name, "quick": study.quick, "settings": dict(study.settings())}
    described = json.loads(json.dumps(described))  # tuples as JSON has them
    check_folder(out, described)
    commit = code_commit()
    study.begin()
    with nothing_empty_left(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / FILE, json.dumps(described, indent=1) + "\n")
    arms = [arm for arm in study.arms() if arm.quick or not study.quick]
    first = [_job(arm, 0, None, out) for arm in arms if not arm.group]
    finished = sum(is_done(job.folder) for job in first)
    with runs_of(study, processes, commit) as run:
        _run(study, run, first, counted=False)
        stopped = study.obstacle({job.arm.name: read_cell(job.folder).sets[REPORTED] for job in first})
        if stopped:
            study.say(f"nothing is trained: {stopped}")
            arms = [job.arm for job in first]
        tried = rate_jobs(study, arms, out)
        _run(study, run, [job for jobs in tried.values() for job in jobs])
        rates = choose_rates(study, arms, tried)
        jobs = [_job(arm, seed, rates[arm.group], out) for seed in range(count) for arm in arms if arm.group]
        _run(study, run, jobs, finished=finished, before=len(first))
    cells = {(job.arm.name, job.seed): read_cell(job.folder) for job in (*first, *jobs)}
    others = {job.folder for jobs in tried.values() for job in jobs} - {job.folder for job in jobs}
    spent = [spent_on(_shared(out, seed))[1] for seed in range(count)]
    spent += [read_cell(folder).cpu_seconds for folder in others]
    result = outcome(study, cells, rates, out, stopped, sum(spent))
    write_atomically(out / "results.json", json.dumps(result, indent=1) + "\n")
    write_page(study, result, out / "study.html")
    return {**result, "out": str(out)}


def check_folder(out: Path, described: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if ``out`` holds anything but this study with these settings."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / FILE).is_file():
        raise ValueError(f"{out} is not empty and holds no study: choose another --out")
    try:
        held = json.loads((out / FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{out / FILE} cannot be read ({error}): choose another --out") from None
    held, wanted = dict(_settings(held)), dict(_settings(described))
    for name in dict.fromkeys((*wanted, *held)):
        if held.get(name) != wanted.get(name):
            old, new = held.get(name), wanted.get(name)
            raise ValueError(f"{out} was begun with {name}: {old}, this is {name}: {new}; choose another --out")


def _settings(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a described study by its dotted name."""
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, each in value.items():
        yield from _settings(each, ".".join(filter(None, (name, key if (name, key) != ("", "settings") else ""))))


def rate_jobs(study: Study, arms: Sequence[Arm], out: Path) -> dict[str, list[Job]]:
    """By group, the jobs of its first arm with every rate of the grid and seed 0, also measured on the choosing set.
    Quick studies and those without a grid have none."""
    if len(study.rates) < 2 or study.quick:
        return {}
    found: dict[str, list[Job]] = {}
    for arm in arms:
        if arm.group and arm.group not in found:
            found[arm.group] = [_job(arm, 0, rate, out, (CHOOSING, REPORTED)) for rate in study.rates]
    return found


def choose_rates(study: Study, arms: Sequence[Arm], tried: Mapping[str, Sequence[Job]]) -> dict[str, float | None]:
    """The rate of each group: that of the grid with the best first measure on the choosing set, by the finished
    :func:`rate_jobs`; without them the middle of the grid, or the recipe's rate (None)."""
    given = study.rates[len(study.rates) // 2] if study.rates else None
    chosen = dict.fromkeys((arm.group for arm in reversed(arms) if arm.group), given)
    measure = next(iter(study.measures))
    for group, jobs in tried.items():
        cells = {job.rate or 0.0: read_cell(job.folder) for job in jobs}
        means = {rate: fmean(cell.sets[CHOOSING].scores[measure]) for rate, cell in cells.items()}
        chosen[group] = max(means, key=means.__getitem__)
        shown = ", ".join(f"{rate:g}: {value:.4f}" for rate, value in means.items())
        study.say(f"{group}: learning rate {chosen[group]:g} ({measure} on the choosing set: {shown})")
    return chosen


def folder_name(arm: str) -> str:
    """An arm's name with a hyphen for everything but letters, digits and points."""
    return re.sub(r"[^\w.]+", "-", arm).strip("-")


def _job(arm: Arm, seed: int, rate: float | None, out: Path, sets: Sequence[str] = (REPORTED,)) -> Job:
    folder = out / folder_name(arm.name) / f"seed-{seed}"
    return Job(arm, seed, rate, folder if rate is None else folder / f"rate-{rate:g}", _shared(out, seed), sets)


def _shared(out: Path, seed: int) -> Path:
    return out / f"seed-{seed}"


def _run(
    study: Study, run: Runs, jobs: Sequence[Job], *, counted: bool = True, finished: int = 0, before: int = 0
) -> None:
    """Run the jobs that are not finished.

    Args:
        counted: say how many are finished already.
        finished, before: how many of the jobs that were called before were, and how many these are.
    """
    left = [job for job in jobs if not is_done(job.folder)]
    finished += len(jobs) - len(left)
    if counted and finished:
        study.say(f"{finished} of {before + len(jobs)} runs are finished already and are not done again")
    run(left)
