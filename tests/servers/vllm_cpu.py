"""Training with a real vLLM server on a CPU. Not part of the suite: it installs 3.5 GB and takes a quarter of an hour.

    python -m tests.servers.vllm_cpu FOLDER --out benchmarks/results/vllm-cpu.json

from the repository's folder, in fastrl's environment. FOLDER gets vLLM's environment, the served model
(``tiny:perception``) and the runs. Every check is made, and the exit status is 1 if one of them failed.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers

from fastrl.recipe import Recipe
from fastrl.rollout import RolloutError
from fastrl.run.logs import read_rows
from fastrl.run.updates import TrainingError
from fastrl.trainer import train
from tests.helpers.training import make_recipe, make_records
from tests.servers.environment import SETTINGS, Served, build, versions

PORT = 8765
NEAR = 1e-3  # largest |difference| of log-probs in float32; weights of the step before differ by far more
LEFT_OUT = 0.02  # largest mean difference at other temperatures, where the server's leave out suppressed tokens
ROUGH = 0.05  # largest mean |difference| in bfloat16
LORA = {"model__lora": {"rank": 4}, "optim__lr": 0.005}
FULL = {"optim__lr": 0.002}
Row = dict[str, Any]


class Checks:
    """The checks, each a run into a folder of its own, and what they found."""

    def __init__(self, folder: Path, bin_folder: Path, model: Path) -> None:
        self.folder, self.bin, self.model = folder, bin_folder, model
        self.found: list[Row] = []

    def served(self, *flags: str, port: int = PORT) -> Served:
        return Served(self.bin, self.model, port, self.folder / f"server-{port}.log", *flags)

    def recipe(self, name: str, servers: str | list[str], **changes: Any) -> Recipe:
        out = self.folder / "runs" / name
        values = {"optim__steps": 4, "checkpoint__every": 1, "log__samples_every": 0, **changes}
        values["rollout__group_size"] = 8
        return make_recipe(self.model, out, rollout__backend="vllm", rollout__server=servers, **values)

    def train(self, recipe: Recipe, **options: Any) -> list[Row]:
        """The rows of metrics of a run, from its beginning unless it is resumed."""
        if not options.get("resume"):
            shutil.rmtree(recipe.folder, ignore_errors=True)
        train(recipe, records=make_records(), show=False, **options)
        return read_rows(recipe.folder / "metrics.jsonl")

    def gaps(self, name: str, rows: list[Row], limit: float = NEAR, key: str = "sampler/gap_max") -> None:
        """Note a run's gaps; it has failed if one is above ``limit``, or if fewer than two steps had anything to learn,
        so that no answers of pushed weights were compared."""
        rows = [row for row in rows if row["grad_norm"] > 0]
        learned = len(rows) > 1
        largest = {short: max(row[f"sampler/{short}"] for row in rows) for short in ("gap_mean", "gap_max")}
        self.note(name, learned and max(row[key] for row in rows) < limit, updates=len(rows), **largest)

    def note(self, name: str, passed: bool, **values: Any) -> None:
        self.found.append({"check": name, "passed": passed, **values})
        print(json.dumps(self.found[-1]), flush=True)

    def stops(self, name: str, kind: type[Exception], words: str, work: Callable[[], Any]) -> None:
        """Note whether ``work`` ends with such an error."""
        try:
            work()
        except kind as error:
            self.note(name, words in str(error), error=str(error))
        else:
            self.note(name, False, error="none")

    def adapters_and_full_weights(self, server: Served) -> None:
        """Pushes of both kinds, and of the vision tower alone. The last check is the control: it leaves out what makes
        this build take a tied head, and must be stopped."""
        self.gaps("LoRA, float32", self.train(self.recipe("lora", server.url, **LORA)))
        self.gaps("full weights, float32", self.train(self.recipe("full", server.url, **FULL)))
        vision = self.recipe("vision", server.url, **FULL, model__freeze=["language"])
        self.gaps("full weights, only the vision tower trained", self.train(vision))
        self.stops(
            "LoRA on a server that holds another run's full weights is stopped",
            TrainingError,
            "does not sample with the trainer's weights",
            lambda: self.train(self.recipe("lora-after-full", server.url, **LORA)),
        )
        with patch("fastrl.rollout.vllm_weights._tied_head", lambda core, state: {}):
            self.stops(
                "a tied head that is not pushed by its own name is stopped",
                TrainingError,
                "does not sample with the trainer's weights",
                lambda: self.train(self.recipe("no-head", server.url, **FULL)),
            )

    def death_and_restart(self, server: Served) -> None:
        """The only server dies after the second step; it is started again, and the run is resumed."""

        def die(row: Row) -> None:
            if row["step"] == 2:
                server.kill()

        for name, changes in (("LoRA", LORA), ("full weights", FULL)):
            recipe = self.recipe(f"death-{name.split()[0]}", server.url, **changes)
            dying = partial(self.train, recipe, on_step=die)
            self.stops(f"the server dies, {name}", RolloutError, "did not answer", dying)
            server.start()
            self.gaps(f"it is started again and the run resumed, {name}", self.train(recipe, resume=True))

    def one_of_two(self, server: Served, other: Served) -> None:
        """One of two servers dies after the second step, and the run goes on with the other."""

        def die(row: Row) -> None:
            if row["step"] == 2:
                other.kill()

        recipe = self.recipe("two", [server.url, other.url], **FULL)
        self.gaps("two servers, one of which dies", self.train(recipe, on_step=die))

    def bfloat16(self, server: Served) -> None:
        low = {"model__dtype": "bfloat16", "optim__steps": 4}
        for name, changes in (("LoRA", LORA), ("full weights", FULL)):
            recipe = self.recipe(f"bfloat16-{name.split()[0]}", server.url, **{**changes, **low})
            if name != "LoRA":
                recipe = self.recipe("bfloat16-full", server.url, **{**FULL, **low, "optim__lr": 1e-3})
            self.gaps(f"{name}, bfloat16", self.train(recipe), ROUGH, "sampler/gap_mean")

    def temperatures(self, server: Served) -> None:
        """Processed log-probs. With top_p the server's leave out what it cuts off, and the run must still go on."""
        for temperature in (0.7, 1.3):
            recipe = self.recipe(f"t{temperature}", server.url, **FULL, rollout__temperature=temperature)
            self.gaps(f"temperature {temperature}", self.train(recipe), LEFT_OUT, "sampler/gap_mean")
        cut = {"rollout__temperature": 0.7, "rollout__top_p": 0.7, "rollout__allow_truncated_sampling": True}
        recipe = self.recipe("top-p", server.url, **FULL, **cut, rollout__server_gap=LEFT_OUT)
        rows = self.train(recipe)
        self.note(
            f"temperature 0.7, top_p 0.7, server_gap {LEFT_OUT}",
            len(rows) == 4,
            gap_mean=max(row.get("sampler/gap_mean", 0.0) for row in rows),
            gap_max=max(row.get("sampler/gap_max", 0.0) for row in rows),
        )
        self.stops(
            "temperature 1 needs raw log-probs",
            RolloutError,
            "--logprobs-mode raw_logprobs",
            lambda: self.train(self.recipe("raw", server.url, **FULL)),
        )


@contextmanager
def running(*servers: Served) -> Iterator[None]:
    """A block with running servers."""
    try:
        for server in servers:
            print(f"{server.url} answers after {server.start():.0f} s", flush=True)
        yield
    finally:
        for server in servers:
            server.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for vLLM's environment, the model and the runs")
    parser.add_argument("--out", type=Path, required=True, help="the file for the results")
    parser.add_argument("--python", default=sys.executable, help="the Python of vLLM's environment")
    given = parser.parse_args()
    folder: Path = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    bin_folder, model = build(folder, given.python), folder / "model"
    if not model.is_dir():
        subprocess.run([sys.executable, "-m", "fastrl.cli", "export", "tiny:perception", str(model)], check=True)
    torch.set_num_threads(1)
    checks = Checks(folder, bin_folder, model)
    single, raw = ("--dtype", "float32"), ("--logprobs-mode", "raw_logprobs")
    server = checks.served(*single, *raw)
    with running(server):
        checks.adapters_and_full_weights(server)
        server.kill()
        server.start()
        checks.death_and_restart(server)
        other = checks.served(*single, *raw, port=PORT + 1)
        with running(other):
            checks.one_of_two(server, other)
    low = checks.served("--dtype", "bfloat16", *raw)
    with running(low):
        checks.bfloat16(low)
    processed = checks.served(*single, "--logprobs-mode", "processed_logprobs")
    with running(processed):
        checks.temperatures(processed)
    passed = all(row["passed"] for row in checks.found)
    here = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    report = {
        "what": "training runs of tiny:perception with vllm serve on a CPU (tests/servers/vllm_cpu.py)",
        "server": versions(bin_folder),
        "trainer": here,
        "environment": SETTINGS,
        "passed": passed,
        "checks": checks.found,
    }
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
