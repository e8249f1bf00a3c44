"""Runs a study: every arm with every seed, each in its own folder; what is finished is not done again.

    OUT/study.json                       the study and its settings; another study or setting is refused
    OUT/seed-0/                          what the arms of this seed share
    OUT/ARM/seed-0/rate-0.0001/          one job: scores of every record (JSON lines), the run's files, done.json
    OUT/scores.jsonl, results.json, study.html

Learning rates are chosen for each group of arms from one grid, by one seed, on a set of records that is not reported;
so is β at the chosen rate, where a method has one (``rate-0.0001-beta-0.1``). A grid whose best value is its end grows
there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from fastrl.data.disk import nothing_empty_left
from fastrl.data.files import write_atomically
from fastrl.studies.base import CHOOSING, REPORTED, Arm, Job, Study
from fastrl.studies.cells import Chosen, is_done, read_cell, spent_on
from fastrl.studies.machine import code_commit
from fastrl.studies.outcome import outcome
from fastrl.studies.page import write_page
from fastrl.studies.workers import Runs, runs_of

FILE = "study.json"
TITLES = {"rate": "learning rate", "beta": "β"}  # what is chosen, in this order
WIDENED = 3  # values that a grid may grow by


class Tried(NamedTuple):
    """A job of a grid, and what it scored on the choosing set by the measure that its group is chosen by."""

    job: Job
    mean: float


Grids = dict[str, dict[float, Tried]]  # group → value of a setting


def run_study(study: Study, out: Path, *, seeds: int | None = None, processes: int = 1) -> dict[str, Any]:
    """Run what is not finished yet, and write the results and the page.

    Args:
        study: with its settings.
        out: the study's folder; that of an interrupted study is continued.
        seeds: number of seeds, from 0 (None: the study's; quick studies have one). More can be added later.
        processes: that run jobs; with several, each has its part of the cores. Numbers depend on the threads of each
            process (the order of sums), not on how many there are.

    Returns:
        See ``fastrl.studies.outcome.outcome``; also ``tried`` and ``tried_betas``: group → the learning rates, and
        values of β, that were tried, each with the mean it was chosen by. All of it but ``out`` is written to
        ``OUT/results.json``.

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
    first = [_job(arm, 0, Chosen(), out) for arm in arms if not arm.group]
    finished = sum(is_done(job.folder) for job in first)
    with runs_of(study, processes, commit) as run:
        _run(study, run, first, counted=False)
        stopped = study.obstacle({job.arm.name: read_cell(job.folder).sets[REPORTED] for job in first})
        if stopped:
            study.say(f"nothing is trained: {stopped}")
            arms = [job.arm for job in first]
        chosen, tried = choose(study, run, arms, out)
        jobs = [_job(arm, seed, chosen[arm.group], out) for seed in range(count) for arm in arms if arm.group]
        _run(study, run, jobs, finished=finished, before=len(first))
    cells = {(job.arm.name, job.seed): read_cell(job.folder) for job in (*first, *jobs)}
    trials = [each.job for grids in tried.values() for found in grids.values() for each in found.values()]
    others = {job.folder for job in trials} - {job.folder for job in jobs}
    spent = [spent_on(_shared(out, seed))[1] for seed in range(count)]
    spent += [read_cell(folder).cpu_seconds for folder in others]
    result = outcome(study, cells, chosen, out, stopped, sum(spent))
    for key, grids in zip(("tried", "tried_betas"), tried.values(), strict=True):
        result[key] = {group: [[value, of[value].mean] for value in sorted(of)] for group, of in grids.items()}
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


def choose(study: Study, run: Runs, arms: Sequence[Arm], out: Path) -> tuple[dict[str, Chosen], dict[str, Grids]]:
    """Choose the learning rate of each group from the study's grid, then its β if it has a grid, each with seed 0 on
    the choosing set, by the group's first arm and ``Study.chosen_by``.

    Quick studies choose nothing: they take the middle of each grid, as the choice of rates does for β.

    Returns:
        By group what was chosen (``None`` where there is no grid: the recipe's), and what was tried, by setting.
    """
    first: dict[str, Arm] = {}
    for arm in arms:
        if arm.group:
            first.setdefault(arm.group, arm)
    chosen = {group: Chosen(_middle(study.rates), _middle(study.betas.get(group, ()))) for group in first}
    tried: dict[str, Grids] = {}
    for setting, title in TITLES.items():
        tried[setting] = {} if study.quick else _try(study, run, setting, first, chosen, out)
        for group, found in tried[setting].items():
            best = max(found, key=lambda value: found[value].mean)
            chosen[group] = chosen[group]._replace(**{setting: best})
            shown = ", ".join(f"{value:g}: {each.mean:.4f}" for value, each in sorted(found.items()))
            study.say(f"{group}: {title} {best:g} ({_chosen_by(study, group)} on the choosing set: {shown})")
    return chosen, tried


def _try(
    study: Study, run: Runs, setting: str, first: Mapping[str, Arm], chosen: Mapping[str, Chosen], out: Path
) -> Grids:
    """Run the first arm of every group that has a grid of a setting at each value of it.

    A grid whose best value is its end says only that a better one may lie beyond. It goes on there in its own steps,
    for this group, until the best lies inside or ``WIDENED`` values were added.
    """
    grids = {group: study.rates if setting == "rate" else study.betas.get(group, ()) for group in first}
    wanted = {group: list(grid) for group, grid in grids.items() if len(grid) > 1}
    found: Grids = {group: {} for group in wanted}
    for _ in range(1 + WIDENED):
        jobs = {
            (group, value): _job(first[group], 0, chosen[group]._replace(**{setting: value}), out, (CHOOSING, REPORTED))
            for group, values in wanted.items()
            for value in values
        }
        _run(study, run, list(jobs.values()))
        for (group, value), job in jobs.items():
            scores = read_cell(job.folder).sets[CHOOSING].scores[_chosen_by(study, group)]
            found[group][value] = Tried(job, fmean(scores))
        wanted = {group: beyond({value: each.mean for value, each in of.items()}) for group, of in found.items()}
    return found


def _middle(grid: Sequence[float]) -> float | None:
    return grid[len(grid) // 2] if grid else None


def _chosen_by(study: Study, group: str) -> str:
    return study.chosen_by.get(group) or next(iter(study.measures))


def beyond(means: Mapping[float, float]) -> list[float]:
    """The next value of a geometric grid beyond that end of it which is the best so far; none if the best is inside."""
    values = sorted(means)
    best = max(values, key=means.__getitem__)
    if best == values[-1]:
        return [float(f"{best * (best / values[-2]):.6g}")]
    return [float(f"{best * (best / values[1]):.6g}")] if best == values[0] else []


def folder_name(arm: str) -> str:
    """An arm's name with a hyphen for everything but letters, digits and points."""
    return re.sub(r"[^\w.]+", "-", arm).strip("-")


def _job(arm: Arm, seed: int, chosen: Chosen, out: Path, sets: Sequence[str] = (REPORTED,)) -> Job:
    values = {"rate": chosen.rate, "beta": chosen.beta}
    name = "-".join(f"{setting}-{value:g}" for setting, value in values.items() if value is not None)
    folder = out / folder_name(arm.name) / f"seed-{seed}" / name
    return Job(arm, seed, chosen.rate, folder, _shared(out, seed), sets, chosen.beta)


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
