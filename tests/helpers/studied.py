"""A study without a model, for tests of what runs studies: also in other processes, which import it from here."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastrl.studies.base import About, Arm, Job, Measured, Say, Study
from fastrl.toy.demos.evidence import Compared, change

ARMS = ("a", "b", "c")


class Counted(Study):
    """Scores from arm, seed, rate, a file that prepare made, and torch's generator; ``behaviour``: arm → what it does.

    Every call of prepare adds a line to ``log`` in the folder of the study, with its start and end.
    """

    about = About("counted", "do jobs run?", "none", "none", "they do", 1, 1)
    measures = {"score": "score"}  # noqa: RUF012
    rates = (0.1, 0.2)
    seeds = 3

    def __init__(
        self,
        *,
        quick: bool = False,
        say: Say = lambda text: None,
        behaviour: Mapping[str, str] | None = None,
        size: int = 1,
    ) -> None:
        super().__init__(quick=quick, say=say)
        self.behaviour, self.size = dict(behaviour or {}), size

    def again(self) -> Callable[..., Study]:
        return partial(super().again(), behaviour=self.behaviour, size=self.size)

    def arms(self) -> Sequence[Arm]:
        return [Arm("start"), *(Arm(name, "ab" if name in "ab" else name) for name in ARMS)]

    def comparisons(self) -> Sequence[Compared]:
        return [change(name, "score", "start", name) for name in ARMS]

    def settings(self) -> Mapping[str, Any]:
        return {"sizes": (self.size,)}  # a tuple, which JSON does not have

    def begin(self) -> None:
        if self.behaviour.get("begin") == "fails":
            raise ValueError("nothing to begin with")

    def prepare(self, seed: int, shared: Path) -> None:
        self._make(shared, f"untrained {seed}", "base")

    def prepare_training(self, seed: int, shared: Path) -> None:
        self._make(shared, f"trained {seed}", "lessons")

    def _make(self, shared: Path, what: str, name: str) -> None:
        shared.mkdir(parents=True, exist_ok=True)
        if (shared / name).exists():
            return
        started = time.monotonic()
        time.sleep(0.05)
        (shared / name).write_text(str(len(what)))
        with (shared.parent / "log").open("a") as file:
            file.write(f"{what} {os.getpid()} {started} {time.monotonic()}\n")

    def run(self, job: Job) -> Mapping[str, Measured]:
        how = self.behaviour.get(job.arm.name)
        if how == "fails":
            raise ValueError("this arm cannot be run")
        if how == "breaks":
            raise LookupError("a mistake")
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "waits":
            (job.shared / "waiting").touch()
            time.sleep(600)
        base = int((job.shared / "base").read_text()) + (job.seed if job.arm.group else 0)
        noise = torch.rand(4, generator=torch.Generator().manual_seed(hash((job.seed, len(job.arm.name))) % 1000))
        scores = (base + noise + (job.rate or 0.0) * (ARMS.index(job.arm.name) + 1 if job.arm.group else 0)).tolist()
        return dict.fromkeys(job.sets, Measured(list("wxyz"), {"score": scores}))
