"""What one job of a study leaves in its folder: scores of every record, and a mark when it is finished."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastrl.data.disk import write_file
from fastrl.data.files import write_atomically
from fastrl.studies.base import Job, Measured, Study

MARK = "done.json"
SPENT = "prepared.json"


class Chosen(NamedTuple):
    """Settings of a group of arms; None: the recipe's."""

    rate: float | None = None
    beta: float | None = None


class Cell(NamedTuple):
    """A finished job: what was measured, by set, the seconds it took (of the clock, and of the process), torch's
    threads and the code's commit (empty: none is known)."""

    sets: Mapping[str, Measured]
    seconds: float
    cpu_seconds: float
    threads: int = 0
    commit: str = ""


def is_done(folder: Path) -> bool:
    """Whether the job of this folder is finished."""
    return (folder / MARK).is_file()


def set_up(study: Study, seed: int, training: bool, shared: Path) -> None:
    """Make what jobs of a seed share, and add the seconds that it took to ``SHARED/prepared.json``.

    ``training``: also what only trained arms need. The seconds of a call that failed or was stopped count too, and what
    is not in the seed's folder because all seeds share it.
    """
    started, cpu = time.perf_counter(), time.process_time()
    try:
        study.prepare(seed, shared)
        if training:
            study.prepare_training(seed, shared)
    finally:
        before = spent_on(shared)
        took = time.perf_counter() - started, time.process_time() - cpu
        found = {"seconds": before[0] + took[0], "cpu_seconds": before[1] + took[1]}
        shared.mkdir(parents=True, exist_ok=True)
        write_atomically(shared / SPENT, json.dumps(found, indent=1) + "\n")


def spent_on(shared: Path) -> tuple[float, float]:
    """Seconds of the clock and of the process that it took to make what is in a seed's folder; 0 where nothing is."""
    if not (shared / SPENT).is_file():
        return 0.0, 0.0
    try:
        found = json.loads((shared / SPENT).read_text(encoding="utf-8"))
        return float(found["seconds"]), float(found["cpu_seconds"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{shared / SPENT} is damaged ({type(error).__name__}: {error}); remove it") from None


def run_job(study: Study, job: Job, commit: str = "") -> None:
    """Run a job and write its scores: ``SET.jsonl``, a line ``{"id", measure: score}`` per record, then the mark.

    A job that was interrupted starts again from nothing. ``commit`` of the code is noted in the mark.
    """
    import torch

    if job.folder.exists():
        shutil.rmtree(job.folder)
    job.folder.mkdir(parents=True)
    started, cpu = time.perf_counter(), time.process_time()
    found = study.run(job)
    for name, measured in found.items():
        lines = [
            json.dumps({"id": identity} | {key: each[i] for key, each in measured.scores.items()}, allow_nan=False)
            for i, identity in enumerate(measured.ids)
        ]
        write_file(job.folder / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
    mark: dict[str, Any] = {
        "arm": job.arm.name,
        "seed": job.seed,
        "rate": job.rate,
        "beta": job.beta,
        "numbers": {name: dict(measured.numbers) for name, measured in found.items()},
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "threads": torch.get_num_threads(),
        "commit": commit,
    }
    write_atomically(job.folder / MARK, json.dumps(mark, indent=1) + "\n")


def read_cell(folder: Path) -> Cell:
    """The results of a finished job. Raises ``ValueError`` with the folder where they cannot be read."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        sets = {name: _read(folder / f"{name}.jsonl", numbers) for name, numbers in mark["numbers"].items()}
        code = mark.get("threads", 0), mark.get("commit", "")  # earlier versions noted neither
        return Cell(sets, mark["seconds"], mark["cpu_seconds"], *code)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder}: damaged results ({problem}); remove this folder to run it again") from None


def _read(path: Path, numbers: Mapping[str, float]) -> Measured:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    measures = [key for key in rows[0] if key != "id"]
    return Measured([row["id"] for row in rows], {key: [row[key] for row in rows] for key in measures}, numbers)
