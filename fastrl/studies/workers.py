"""Who runs a study's jobs: this process, one after the other, or several processes at once.

What the jobs of a seed share is made once, before the first of them, and never by two processes. The first such task of
a run is done alone, as it may also make what all seeds share.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fastrl.studies.base import Job, Study
from fastrl.studies.cells import run_job, set_up
from fastrl.studies.machine import cores

STOPPED_AFTER = 10.0  # seconds that a worker which was asked to stop may go on with its step


class JobError(RuntimeError):
    """A job failed in another process; the message says which, and why."""


class Setup(NamedTuple):
    """The task of making what jobs of a seed share."""

    seed: int
    training: bool  # also what only trained arms need
    shared: Path


class Runs(Protocol):
    """What runs jobs."""

    def __call__(self, jobs: Sequence[Job], /) -> None:
        """Run all of these jobs."""


@contextmanager
def runs_of(study: Study, processes: int, commit: str) -> Iterator[Runs]:
    """Where the jobs of ``study`` run: here for one process, else in ``processes`` others, which end with the block.

    ``commit`` is noted with each job.
    """
    if processes == 1:
        yield Here(study, commit)
        return
    workers = Workers(study, processes, commit)
    try:
        yield workers
    finally:
        workers.stop()


class Here:
    """Jobs in this process, one after the other."""

    def __init__(self, study: Study, commit: str) -> None:
        self.study, self.commit = study, commit
        self.made: set[Setup] = set()

    def __call__(self, jobs: Sequence[Job]) -> None:
        for number, job in enumerate(jobs, 1):
            self.study.say(f"run {number} of {len(jobs)}: {described(job)}")
            setup = setup_of(job)
            if setup not in self.made:
                set_up(self.study, *setup)
                self.made.add(setup)
            run_job(self.study, job, self.commit)


class Workers:
    """Jobs in ``processes`` other processes, each with its part of the cores as torch's threads.

    They are started by the first call that has jobs. Any failure stops all of them.
    """

    def __init__(self, study: Study, processes: int, commit: str) -> None:
        self.study, self.processes, self.commit = study, processes, commit
        self.threads = max(1, cores() // processes)
        self.workers: list[Worker] = []
        self.made: set[Setup] = set()

    def __call__(self, jobs: Sequence[Job]) -> None:
        waiting, handed = list(jobs), 0
        while waiting and not self.workers:
            self.workers = [self._start() for _ in range(self.processes)]
        while waiting or any(worker.task is not None for worker in self.workers):
            for worker in self.workers:
                task = None if worker.task is not None else self._next(waiting)
                if task is not None:
                    if isinstance(task, Job):
                        handed += 1
                        self.study.say(f"run {handed} of {len(jobs)}: {described(task)}")
                    worker.give(task)
            ready = wait([worker.connection for worker in self.workers if worker.task is not None])
            for worker in self.workers:
                if worker.connection in ready:
                    finished = worker.take()
                    if isinstance(finished, Setup):
                        self.made.add(finished)

    def stop(self) -> None:
        """End all processes; unfinished jobs start again from nothing when the study is continued."""
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join(STOPPED_AFTER)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.connection.close()
        self.workers = []

    def _start(self) -> Worker:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        ours, theirs = context.Pipe()
        told = Told(self.study.again(), dict(self.study.settings()), self.threads, self.commit)
        process = context.Process(target=work, args=(theirs, told), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours)

    def _next(self, waiting: list[Job]) -> Job | Setup | None:
        """The first job whose seed is ready, else what makes a seed ready; None if others must finish before."""
        for job in waiting:
            if setup_of(job) in self.made:
                waiting.remove(job)
                return job
        making = {worker.task.seed for worker in self.workers if isinstance(worker.task, Setup)}
        if making and not self.made:
            return None
        return next((setup_of(job) for job in waiting if job.seed not in making), None)


class Told(NamedTuple):
    """What a worker is told at its start."""

    make: Callable[..., Study]
    settings: Mapping[str, Any]
    threads: int
    commit: str


class Worker:
    """A process and what it does; it first begins its study, which counts as a task."""

    def __init__(self, process: Any, connection: Connection) -> None:
        self.process, self.connection = process, connection
        self.task: Job | Setup | str | None = "begin"

    def give(self, task: Job | Setup) -> None:
        self.task = task
        with suppress(OSError):  # a process that ended is found by ``take``
            self.connection.send(task)

    def take(self) -> Job | Setup | str | None:
        """The task that was finished. Raises :class:`JobError` if it failed or the process ended."""
        what = self.task if isinstance(self.task, str) else described(self.task) if self.task else ""
        try:
            failed = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(STOPPED_AFTER)
            raise JobError(f"{what}: its process ended with exit code {self.process.exitcode}") from None
        if failed:
            raise JobError(f"{what}: {failed}")
        finished, self.task = self.task, None
        return finished


def work(connection: Connection, told: Told) -> None:
    """A worker process: make the study again, and do what is sent until the other end is closed.

    Every task is answered by why it failed (empty: it did not); after a failure the process ends.
    """
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(told.threads)
    study = told.make(say=_say)
    with suppress(KeyboardInterrupt, EOFError, OSError):  # the process that gives the tasks ends them, or has ended
        task = None
        while True:
            failed = _why_not(study, told, task)
            connection.send(failed)
            if failed:
                return
            task = connection.recv()


def _why_not(study: Study, told: Told, task: Job | Setup | None) -> str:
    """Do a task (None: begin), and say why it failed; where that is not a matter of settings, with a traceback on
    stderr."""
    try:
        if task is None:
            if dict(study.settings()) != told.settings:
                raise ValueError(f"settings {study.settings()} are not those of this study, {told.settings}")
            study.begin()
        elif isinstance(task, Job):
            run_job(study, task, told.commit)
        else:
            set_up(study, *task)
    except Exception as error:
        if isinstance(error, ValueError | OSError):
            return str(error) or type(error).__name__
        _say(traceback.format_exc().rstrip())
        return f"{type(error).__name__}: {error}"
    return ""


def _end_with_parent() -> None:
    """End this process, in the middle of a job if need be, when the one that started it has ended in whatever way."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def described(task: Job | Setup) -> str:
    """``PerPO, seed 1, rate 0.0001, β 0.1``."""
    if isinstance(task, Setup):
        return f"what the arms of seed {task.seed} share"
    settings = {"rate": task.rate, "β": task.beta}
    shown = "".join(f", {name} {value:g}" for name, value in settings.items() if value is not None)
    return f"{task.arm.name}, seed {task.seed}{shown}"


def setup_of(job: Job) -> Setup:
    """What must be made before a job."""
    return Setup(job.seed, bool(job.arm.group), job.shared)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
