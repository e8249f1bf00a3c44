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


class Cell(NamedTuple):
    """A finished job: what was measured, by set, and the seconds it took (of the clock, and of the process)."""

    sets: Mapping[str, Measured]
    seconds: float
    cpu_seconds: float


def is_done(folder: Path) -> bool:
    """Whether the job of this folder is finished."""
    return (folder / MARK).is_file()


def run_job(study: Study, job: Job) -> None:
    """Run a job and write its scores: ``SET.jsonl``, a line ``{"id", measure: score}`` per record, then the mark.

    A job that was interrupted starts again from nothing.
    """
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
        "numbers": {name: dict(measured.numbers) for name, measured in found.items()},
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
    }
    write_atomically(job.folder / MARK, json.dumps(mark, indent=1) + "\n")


def read_cell(folder: Path) -> Cell:
    """The results of a finished job. Raises ``ValueError`` with the folder where they cannot be read."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        sets = {name: _read(folder / f"{name}.jsonl", numbers) for name, numbers in mark["numbers"].items()}
        return Cell(sets, mark["seconds"], mark["cpu_seconds"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder}: damaged results ({problem}); remove this folder to run it again") from None


def _read(path: Path, numbers: Mapping[str, float]) -> Measured:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    measures = [key for key in rows[0] if key != "id"]
    return Measured([row["id"] for row in rows], {key: [row[key] for row in rows] for key in measures}, numbers)
