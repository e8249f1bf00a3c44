"""``make bench``: run the registered cases on the available device, print a table, write JSON and a figure."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, Run
from benchmarks.machine import Others, busy_before, cores, notice, pin_or_exit
from benchmarks.measure import device_name, device_peaks, graphed, interleaved, peak_bytes, spread, unsteady
from benchmarks.registry import cases

OURS = "fastrl"
RESULTS = Path(__file__).parent / "results"
VERSIONS = (
    "fastrl",
    "torch",
    "triton",
    "transformers",
    "trl",
    "peft",
    "liger-kernel",
    "scipy",
    "torch-linear-assignment",
)


def run_case(case: Case, device: torch.device, peaks: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Run one case; returns its row of the JSON with, for each contestant, measurements or why there are none."""
    torch.manual_seed(0)
    x = case.make(device)
    contestants: dict[str, Run | None] = {OURS: case.ours, **case.peers}
    results: dict[str, dict[str, Any]] = {}
    calls: dict[str, Any] = {}
    expected: tuple[Tensor, ...] | None = None
    for name, function in contestants.items():
        if function is None:
            results[name] = {"missing": "not installed, or not for this device"}
            continue
        call = lambda function=function: function(x)  # noqa: E731
        try:
            _reset(case, x)
            found = call()
            expected = expected or tuple(t.clone() if case.reset else t for t in found)
            compared = {"difference": difference(found, expected)}
            compared |= case.compare(found, expected) if case.compare is not None else {}
            del found  # may share its storage with the inputs
            _reset(case, x)
            results[name] = {**compared, "peak_bytes": peak_bytes(call, device)}
            calls[name] = graphed(call) if case.graph and device.type == "cuda" else call
        except Exception as error:  # a failing contestant is recorded; the run continues
            results[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    del expected
    reset = None if case.reset is None else (lambda: _reset(case, x))
    others = Others()
    times_of = interleaved(calls, device, min(rounds, case.rounds or rounds), reset=reset, cold=case.rounds is None)
    busy = others.busy()
    for name, times in times_of.items():
        results[name] |= summary(times)
        if OURS in times_of:
            pairs = zip(times["warm"].data, times_of[OURS]["warm"].data, strict=True)
            results[name]["ratios"] = spread([theirs / ours for theirs, ours in pairs])
    dtype = str(case.dtype).removeprefix("torch.")
    floor = max(case.flops / peaks["flops"].get(dtype, float("inf")), case.bytes / peaks["bytes_per_s"])
    for row in results.values():
        if "seconds" in row:
            row["percent_of_floor"] = 100 * floor / row["seconds"]
            row["ratio"] = row["ratios"]["median"] if "ratios" in row else None
    return {
        "name": case.name, "op": case.op, "shape": case.shape, "dtype": dtype, "floor_seconds": floor,
        "graph": case.graph and device.type == "cuda", "busy": busy, "results": results, **case.extra,
    }  # fmt: skip


def summary(times: dict[str, Any]) -> dict[str, Any]:
    """Median, quartile range and rounds of the measured times, in seconds."""
    warm, named = times["warm"], {"cold": "cold_seconds", "cpu": "cpu_seconds"}
    row = {"seconds": warm.median, "iqr": warm.iqr, "rounds": warm.rounds}
    return row | {named[kind]: times[kind].median for kind in times if kind in named}


def difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest difference of any result, relative to the largest expected entry."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if b.numel():
            scale = max(float(b.double().abs().max()), 1e-30)
            worst = max(worst, float((a.double() - b.double()).abs().max()) / scale)
    return worst


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Machine, device and versions of a run, as plain values."""
    device = device or default_device()
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "device": {"name": device_name(device), "kind": device.type},
        "threads": torch.get_num_threads(),
        "cores": len(cores()),
        "load": os.getloadavg()[0],
        "versions": versions,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--", "kernels", "csrc", "fastrl", "benchmarks/*.py")),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def default_device() -> torch.device:
    """The GPU if available."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def line(case: dict[str, Any], name: str, row: dict[str, Any]) -> str:
    """One line of the printed table."""
    start = f"{case['name'] if name == OURS else '':46} {name:22}"
    if "seconds" not in row:
        return f"{start} {row.get('missing') or row.get('error')}"
    cold = f"{1e3 * row['cold_seconds']:10.3f}" if "cold_seconds" in row else f"{'':10}"
    width = 100 * row["iqr"] / row["seconds"]
    times = f"{1e3 * row['seconds']:10.3f} {width:4.0f}%{'!' if width > 25 else ' '} {cold}"
    numbers = f"{row['percent_of_floor']:6.1f}% {row['peak_bytes'] / 2**20:10.1f}"
    return f"{start} {times} {numbers} {_ratio(name, row)}".rstrip()


def _ratio(name: str, row: dict[str, Any]) -> str:
    """Their time over ours: the median of the rounds, its quartiles, and a mark where these are far apart."""
    if name == OURS or "ratios" not in row:
        return ""
    found = row["ratios"]
    return f"{found['median']:.2f}x [{found['q1']:.2f}, {found['q3']:.2f}]{'!' if unsteady(found) else ''}"


def _reset(case: Case, x: dict[str, Any]) -> None:
    if case.reset is not None:
        case.reset(x)


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def main(argv: list[str] | None = None) -> int:
    """Run, print and write; returns 1 if one of our own callables failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", metavar="PATTERN", help="cases whose name contains or matches this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="[results/DEVICE.json; with --only or --quick: none]")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="figure [beside the JSON]")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 9 (CPU) or 15 (GPU)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch, on as many cores [all]")
    args = parser.parse_args(argv)
    device = default_device()
    pin_or_exit(parser, args.threads)
    try:
        chosen = cases("gpu" if device.type == "cuda" else "cpu", args.only)
    except ValueError as error:
        parser.error(str(error))
    target = args.json
    rounds = 3 if args.quick else 15 if device.type == "cuda" else 9
    busy = busy_before()
    print(notice(busy))
    peaks = device_peaks(device)
    report = environment(device) | {"busy": busy, "peaks": peaks, "cases": []}
    if target is None and args.only is None and not args.quick:
        target = RESULTS / (re.sub(r"[^a-z0-9]+", "-", report["device"]["name"].lower()).strip("-") + ".json")
    print(f"{report['device']['name']}, {report['threads']} threads, commit {report['commit']}")
    heads = f"{'ms':>10} {'IQR':>5}  {'cold ms':>10} {'floor':>7} {'peak MiB':>10} ratio [quartiles]"
    print(f"{'case':46} {'':22} {heads}   (!: quartiles further apart than a quarter of the median)")
    for case in chosen:
        row = run_case(case, device, peaks, rounds)
        report["cases"].append(row)
        print("\n".join(line(row, name, result) for name, result in row["results"].items()), flush=True)
        if target is not None:  # after every case, so that an interrupted run leaves its results
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(report, indent=1) + "\n")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if target is not None:
        from benchmarks.plot import plot

        print(f"wrote {target} and {plot(target, args.plot)}")
    return int(any("error" in row["results"][OURS] for row in report["cases"]))


if __name__ == "__main__":
    sys.exit(main())
