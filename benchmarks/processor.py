"""Compare kernels' CPU paths with their peers in processor time, which other work on the machine changes little.

``python -m benchmarks.processor --only listwise`` times the cases of ``make bench`` that match, at their CPU sizes:
with one thread the processor time of the calling thread, with more that of the process (waiting threads included).
Contestants take turns, in the reverse order in every other round. A ratio is a peer's time over ours in one round:
below 1, ours is slower.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.case import Case
from benchmarks.measure import quartiles
from benchmarks.registry import cases
from benchmarks.run import OURS

LEAST = 0.02  # seconds of one measurement, by as many calls as needed


def clock(threads: int) -> Callable[[], float]:
    """Processor time of what computes with this many threads."""
    return time.thread_time if threads == 1 else time.process_time


def times_of(case: Case, rounds: int, threads: int) -> dict[str, list[float]]:
    """Processor seconds of a call, per contestant and round."""
    torch.manual_seed(0)
    x = case.make(torch.device("cpu"))
    runs = {OURS: case.ours} | {name: run for name, run in case.peers.items() if run is not None}
    now = clock(threads)

    def seconds(name: str, calls: int) -> float:
        total = 0.0
        for _ in range(calls if case.reset is not None else 1):
            if case.reset is not None:
                case.reset(x)
            begin = now()
            for _ in range(1 if case.reset is not None else calls):
                runs[name](x)
            total += now() - begin
        return total / calls

    calls = {}
    for name in runs:
        seconds(name, 1)
        calls[name] = max(1, int(LEAST / max(seconds(name, 1), 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in reversed(runs) if number % 2 else runs:
            found[name].append(seconds(name, calls[name]))
    return found


def line(case: str, peer: str, ours: list[float], theirs: list[float]) -> str:
    """A row of the table: medians in ms, and quartiles and range of the ratio of each round."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    low, median, high = quartiles(ratios)
    medians = f"{1e3 * statistics.median(ours):.3f} | {1e3 * statistics.median(theirs):.3f}"
    return (
        f"| {case} | {peer} | {medians} | {median:.2f} | {low:.2f} to {high:.2f} | "
        f"{min(ratios):.2f} to {max(ratios):.2f} |"
    )


def main(argv: list[str] | None = None) -> int:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processor", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", metavar="PATTERN", help="cases whose name contains or matches this")
    parser.add_argument("--size", default="cpu", help="of the cases [cpu]")
    parser.add_argument("--rounds", type=int, default=9, help="at least 2 [9]")
    parser.add_argument("--threads", type=int, default=1, help="that torch computes with [1]")
    args = parser.parse_args(argv)
    try:
        chosen = cases(args.size, args.only)
    except ValueError as error:
        parser.error(str(error))
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} thread(s), {args.rounds} rounds, load {os.getloadavg()[0]:.1f}\n")
    print("| case | peer | ours, ms | peer, ms | median of ratios | quartiles | range |")
    print("|---|---|--:|--:|--:|--:|--:|")
    try:
        for case in chosen:
            found = times_of(case, args.rounds, args.threads)
            for peer in found:
                if peer != OURS:
                    print(line(case.name, peer, found[OURS], found[peer]), flush=True)
    finally:
        torch.set_num_threads(before)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
