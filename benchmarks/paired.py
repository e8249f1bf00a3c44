"""Compare the same training step of two checkouts of fastrl, in interleaved rounds.

``python -m benchmarks.paired CHECKOUT`` runs each case of ``benchmarks.versus.work`` in two processes, one that imports
fastrl from CHECKOUT (``git worktree add ../before COMMIT``, with its C++ built) and one that imports it from here. They
alternate step by step, with the order reversed in every other round, so that a busy machine slows both. A ratio is
CHECKOUT's seconds over ours in one round: above 1, this checkout is faster. CPU seconds are those of the process. Both
sides run on the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks.machine import Others, busy_before, notice
from benchmarks.measure import spread
from benchmarks.run import environment
from benchmarks.versus.model import build_folder
from benchmarks.versus.work import Work, works

HERE = Path(__file__).resolve().parents[1]
MEASURED = ("seconds", "cpu_seconds")


class Side:
    """A process that imports fastrl from ``checkout`` and runs one step of ``work`` at a time."""

    def __init__(self, checkout: Path, work: Work, folder: Path, pictures: Path, steps: int) -> None:
        given = {"work": asdict(work), "folder": str(folder), "pictures": str(pictures), "steps": steps}
        # -P: do not import from the script's folder or the working directory
        command = [sys.executable, "-P", str(HERE / "benchmarks/versus/one_side.py"), json.dumps(given)]
        environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(checkout), str(checkout / "kernels")])}
        self.checkout = checkout
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)

    def step(self) -> dict[str, float]:
        """Run the next step; returns its seconds, CPU seconds and gradient norm.

        Raises:
            RuntimeError: the process ended; its error is on stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # if the process has ended, reading a line below returns nothing
            print("step", file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.checkout}: the run ended with exit status {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()


def compare(other: Path, work: Work, folder: Path, scratch: Path, rounds: int) -> dict[str, Any]:
    """All rounds of both sides, after an unmeasured first step each, and the ratios' quartiles.

    Args:
        other: the other checkout's root.
        work: the step.
        folder: the model.
        scratch: a folder for pictures.
        rounds: measured steps of each side.
    """
    with (
        Side(other, work, folder, scratch / "other", rounds + 1) as theirs,
        Side(HERE, work, folder, scratch / "here", rounds + 1) as ours,
    ):
        first = theirs.step(), ours.step()
        if not math.isclose(first[0]["grad_norm"], first[1]["grad_norm"], rel_tol=1e-3):
            raise RuntimeError(f"{work.name}: the first gradient norms are {[row['grad_norm'] for row in first]}")
        pairs = []
        for number in range(rounds):
            if number % 2:
                mine = ours.step()
                pairs.append((theirs.step(), mine))
            else:
                pairs.append((theirs.step(), ours.step()))
    row: dict[str, Any] = {"work": asdict(work), "other": [a for a, _ in pairs], "here": [b for _, b in pairs]}
    for name in MEASURED:
        ratios = [a[name] / b[name] for a, b in pairs]
        row[f"{name}_ratio"] = spread(ratios)
    return row


def line(row: dict[str, Any]) -> str:
    """The printed line of a case."""
    found = [
        f"{name.replace('_', ' ')} {row[f'{name}_ratio']['median']:.3f} "
        f"[{row[f'{name}_ratio']['q1']:.3f}, {row[f'{name}_ratio']['q3']:.3f}]"
        for name in MEASURED
    ]
    return f"{row['work']['name']}: {', '.join(found)}"


def main(argv: list[str] | None = None) -> int:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paired", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkout", type=Path, help="the other checkout of fastrl")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of each side, at least 2 [7]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round")
    args = parser.parse_args(argv)
    chosen = [work for work in works("small") if args.only in work.name]
    if not chosen:
        parser.error(f"--only: no case matches {args.only!r}; there are {', '.join(w.name for w in works('small'))}")
    if args.rounds < 2:
        parser.error(f"--rounds: at least 2, got {args.rounds}")
    if not (args.checkout / "benchmarks/versus/ours.py").is_file():
        parser.error(f"{args.checkout}: no checkout of fastrl with benchmarks/versus")
    busy = busy_before()
    print(notice(busy))
    other = args.checkout.resolve()
    commit = subprocess.run(["git", "-C", other, "rev-parse", "--short", "HEAD"], stdout=subprocess.PIPE, text=True)
    report = environment(torch.device("cpu")) | {
        "other_commit": commit.stdout.strip() or None,
        "busy": busy,
        "cases": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folder = build_folder("small", root / "small", torch.device("cpu"))
        print(f"{other.name} ({report['other_commit']}) over this checkout ({report['commit']}), {args.rounds} rounds:")
        for number, work in enumerate(chosen):
            others = Others()
            row = compare(other, work, folder, root / str(number), args.rounds)
            report["cases"].append(row | {"busy": others.busy()})
            print(line(report["cases"][-1]), flush=True)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
