"""Jobs of a study in several processes: the same results, no work twice, and failures that say which job it was."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.studies.base import REPORTED, Arm, Job
from fastrl.studies.machine import cores
from fastrl.studies.runner import run_study
from fastrl.studies.workers import JobError, Setup, Worker, Workers, described, setup_of
from tests.helpers.studied import ARMS, Counted

OF_THE_CLOCK = ("seconds", "cpu_seconds", "process_cpu_seconds", "machine", "out")


def lasting(result: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on when and how fast a study ran."""
    return {key: value for key, value in result.items() if key not in OF_THE_CLOCK}


def job(arm: str, seed: int, group: str = "g") -> Job:
    return Job(Arm(arm, group), seed, 0.1, Path("x"), Path(f"seed-{seed}"), (REPORTED,))


def worker_with(task: Setup) -> Worker:
    """What is known of a process that does this; there is none."""
    worker = Worker(None, Pipe()[0])
    worker.task = task
    return worker


def preparations(out: Path) -> list[list[str]]:
    return [line.rsplit(" ", 3) for line in (out / "log").read_text().splitlines()]


def test_a_seed_is_made_ready_before_its_jobs_and_the_first_one_alone() -> None:
    workers = Workers(Counted(), 2, "")
    waiting = [job("a", 0), job("b", 0), job("a", 1)]
    first = workers._next(waiting)
    assert first == Setup(0, True, Path("seed-0"))
    assert isinstance(first, Setup)
    busy = worker_with(first)
    workers.workers = [busy]
    assert workers._next(waiting) is None  # it may also make what seed 1 needs
    workers.made.add(first)
    busy.task = None
    assert [workers._next(waiting) for _ in range(2)] == [job("a", 0), job("b", 0)]
    second = workers._next(waiting)
    assert second == Setup(1, True, Path("seed-1"))
    busy.task = second
    assert workers._next(waiting) is None  # never the same seed twice at once
    assert waiting == [job("a", 1)]
    assert setup_of(job("start", 0, "")) == Setup(0, False, Path("seed-0"))


def test_several_seeds_are_made_ready_at_once_after_the_first() -> None:
    workers = Workers(Counted(), 2, "")
    workers.made.add(Setup(0, False, Path("seed-0")))
    workers.workers = [worker_with(Setup(1, True, Path("seed-1")))]
    assert workers._next([job("a", 1), job("a", 2)]) == Setup(2, True, Path("seed-2"))


def test_tasks_are_described_and_a_study_has_a_process(tmp_path: Path) -> None:
    assert described(job("a", 2)) == "a, seed 2, rate 0.1"
    assert described(Setup(1, True, tmp_path)) == "what the arms of seed 1 share"
    assert Workers(Counted(), 2, "").threads == max(1, cores() // 2)
    assert Workers(Counted(), 10**6, "").threads == 1
    with pytest.raises(ValueError, match="at least one process, got 0"):
        run_study(Counted(), tmp_path / "out", processes=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.gate
def test_two_processes_give_the_results_of_one(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, cores() // 2))
    try:
        alone = run_study(Counted(), tmp_path / "one")
    finally:
        torch.set_num_threads(before)
    said: list[str] = []
    study = Counted(say=said.append)
    both = run_study(study, tmp_path / "two", processes=2)
    assert lasting(both) == lasting(alone)
    assert both["machine"]["threads"] == alone["machine"]["threads"] == [max(1, cores() // 2)]
    for path in sorted((tmp_path / "one").rglob("*.jsonl")):
        assert (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes()
    made = preparations(tmp_path / "two")
    wanted = sorted(["untrained 0", *(f"{kind} {seed}" for kind in ("untrained", "trained") for seed in (0, 1, 2))][1:])
    assert sorted(what for what, *_ in made) == wanted
    assert str(os.getpid()) not in {process for _, process, *_ in made}
    assert sorted(what for what, *_ in preparations(tmp_path / "one")) == wanted
    assert "run 1 of 4: a, seed 0, rate 0.1" in said
    stored = json.loads((tmp_path / "two" / "results.json").read_text())
    assert stored == json.loads(json.dumps({key: value for key, value in both.items() if key != "out"}))
    assert stored["process_cpu_seconds"] >= stored["cpu_seconds"]
    again = run_study(Counted(), tmp_path / "two", processes=2)
    assert lasting(again) == lasting(both)
    assert preparations(tmp_path / "two") == made


@pytest.mark.gate
@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("fails", r"c, seed 0, rate 0\.[12]: this arm cannot be run"),
        ("breaks", r"c, seed 0, rate 0\.[12]: LookupError: a mistake"),
        ("dies", r"c, seed 0, rate 0\.[12]: its process ended with exit code -9"),
    ],
)
def test_a_failing_job_is_named_and_the_study_continues_from_what_is_finished(
    behaviour: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(JobError, match=message):
        run_study(Counted(behaviour={"c": behaviour}), tmp_path, processes=2)
    assert ("Traceback" in capfd.readouterr().err) is (behaviour == "breaks")
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done.json")}
    assert any("start" in path.parts for path in finished)
    assert not any("c" in path.relative_to(tmp_path).parts for path in finished)
    result = run_study(Counted(), tmp_path, processes=2)
    assert set(result["arms"]) == {"start", *ARMS}
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


@pytest.mark.gate
def test_a_study_that_is_made_with_other_settings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Counted(size=2)
    monkeypatch.setattr(study, "again", Counted().again)
    with pytest.raises(JobError, match=r"begin: settings .*2.* not those of this study|begin: settings .*1"):
        run_study(study, tmp_path, processes=2)


SCRIPT = """
import signal
import sys
from pathlib import Path
from fastrl.studies.runner import run_study
from tests.helpers.studied import Counted
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    try:
        run_study(Counted(behaviour={"b": "waits"}), Path(sys.argv[1]), processes=2)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.gate
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopping_the_study_ends_its_processes_and_leaves_finished_jobs(number: int, tmp_path: Path) -> None:
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parents[3]
    paths = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    running = subprocess.Popen([sys.executable, str(script), str(out)], env={**os.environ, "PYTHONPATH": paths})
    while not ((out / "seed-1" / "waiting").exists() and running.poll() is None):
        assert running.poll() is None
        time.sleep(0.05)
    made = {int(process) for _, process, *_ in preparations(out)}
    running.send_signal(number)
    assert running.wait() == (130 if number == signal.SIGINT else -number)
    while any(alive(process) for process in made):
        time.sleep(0.05)
    finished = list(out.rglob("done.json"))
    assert finished
    assert not any(re.search(r"/b/seed-1/", str(path)) for path in finished)
    assert set(run_study(Counted(), out)["arms"]) == {"start", *ARMS}


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
