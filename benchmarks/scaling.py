"""How a whole optimizer step grows: ``python -m benchmarks.scaling`` draws time and memory against the counted work.

One quantity at a time grows from a common step of GRPO (a prompt of 300 tokens with a picture of 448 pixels, eight
answers of 24 tokens, a model of 6.9 M parameters with 3,200 words): answers in a group, tokens of the prompt, tokens of
an answer, pictures, words of the vocabulary. Each point is a run of its own: one step to warm up, timed steps (median
and quartiles), one whose FLOPs and allocations are counted. Beside the growth of time and peak memory stands that of
the counted FLOPs: where time keeps to them, nothing is spent on anything else. An operator whose FLOPs grow faster than
the quantity between the last two points is named with its share of the work.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import Others, busy_before, notice, pin_or_exit
from benchmarks.measure import spread, unsteady
from benchmarks.run import RESULTS, environment
from benchmarks.versus.model import SMALL_VOCABULARY, build_folder
from benchmarks.versus.ours import Fastrl
from benchmarks.versus.work import Work, make_records

BASE = Work("step", 300, 24, 1, picture=448)
AXES: dict[str, tuple[int, ...]] = {
    "group": (2, 4, 8, 16, 32, 64),
    "prompt": (100, 300, 1000, 2000, 4000),
    "answer": (8, 32, 128, 512, 1024),
    "pictures": (1, 2, 4, 8, 16),
    "vocabulary": (2000, 8000, 32000, 152000),  # the shipped tokenizer has 1,994 words already
}
_FASTER = 1.1  # exponent above which an operator counts as growing faster than the quantity
_WORTH = 0.005  # share of the work below which that is not worth a name
_CPU = torch.device("cpu")


def work_of(axis: str, value: int) -> tuple[Work, int]:
    """The step at a point of an axis, and its vocabulary."""
    if axis == "vocabulary":
        return BASE, value
    if axis == "pictures":  # of 64 tokens each
        return replace(BASE, picture=224, pictures=value, prompt=max(300, 40 + 70 * value)), SMALL_VOCABULARY
    if axis == "prompt":  # text but for a small picture, so that vision stays the same
        return replace(BASE, picture=224, prompt=value), SMALL_VOCABULARY
    return replace(BASE, **{axis: value}), SMALL_VOCABULARY


def measure(axis: str, value: int, root: Path, rounds: int) -> dict[str, Any]:
    """One point: seconds, peak bytes and FLOPs, also by operator."""
    work, vocabulary = work_of(axis, value)
    folder = build_folder("small", root / f"model-{vocabulary}", _CPU, vocabulary=vocabulary)
    kinds = ("warm", *["time"] * rounds, "count")
    from fastrl.models.load import load_tokenizer

    pictures = root / f"{work.picture}-{work.pictures}-{work.prompt}"
    records = make_records(work, len(kinds) * work.prompts, pictures, load_tokenizer(folder))
    side = Fastrl(folder, work, work.group, records, train="full", device=_CPU)
    others = Others()
    for kind in kinds:
        side.step(kind)
    recorder = side.recorder
    row = {
        "axis": axis, "value": value, "work": asdict(work), "vocabulary": vocabulary, "tokens": work.tokens(),
        "seconds": spread(recorder.seconds), "cpu_seconds": spread(recorder.cpu_seconds), "busy": others.busy(),
        "static_bytes": side.static_bytes, "step_bytes": recorder.step_bytes, "flops": recorder.flops,
        "flops_by_operator": recorder.flops_by_operator,
    }  # fmt: skip
    del side, recorder
    gc.collect()
    return row


def exponent(first: float, second: float, grown: float) -> float:
    """``e`` where ``second = first * grown**e``."""
    return math.log(second / first) / math.log(grown)


def growth(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Exponents of an axis between its last two points, and the operators that grow faster than the quantity."""
    before, last = rows[-2:]
    grown = last["value"] / before["value"]
    found: dict[str, Any] = {
        "time": exponent(before["seconds"]["median"], last["seconds"]["median"], grown),
        "flops": exponent(before["flops"], last["flops"], grown),
        "memory": exponent(before["step_bytes"], last["step_bytes"], grown),
    }
    named = {}
    for name, flops in last["flops_by_operator"].items():
        earlier = before["flops_by_operator"].get(name)
        share = flops / last["flops"]
        if earlier and share >= _WORTH and exponent(earlier, flops, grown) > _FASTER:
            named[name] = {"exponent": exponent(earlier, flops, grown), "share": share}
    return found | {"faster": named}


def line(row: dict[str, Any]) -> str:
    """A printed point."""
    seconds = row["seconds"]
    mark = "!" if unsteady(seconds) else " "
    times = f"{seconds['median']:8.3f} s [{seconds['q1']:.3f}, {seconds['q3']:.3f}]{mark}"
    rate = row["flops"] / seconds["median"] / 1e9
    return (
        f"  {row['value']:7} {times} {row['step_bytes'] / 2**20:8.1f} MiB {row['flops'] / 1e9:9.2f} GFLOP "
        f"{rate:7.1f} GFLOP/s"
    )


def summary(axis: str, rows: Sequence[dict[str, Any]]) -> str:
    """The printed end of an axis."""
    found = growth(rows)
    said = ", ".join(f"{name} {found[name]:.2f}" for name in ("time", "flops", "memory"))
    named = ", ".join(
        f"{name} ({each['exponent']:.2f}, {100 * each['share']:.1f} % of the FLOPs)"
        for name, each in found["faster"].items()
    )
    return f"  {axis} from {rows[-2]['value']} to {rows[-1]['value']}, exponents: {said}; faster: {named or 'nothing'}"


def plot(report: dict[str, Any], target: Path) -> Path:
    """Draw time and memory of every axis, with the counted FLOPs through the first point, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    axes = list(_by_axis(report["points"]))
    figure, grid = plt.subplots(2, len(axes), figsize=(3.2 * len(axes), 6), constrained_layout=True, squeeze=False)
    for column, (name, rows) in enumerate(axes):
        x = [row["value"] for row in rows]
        seconds = [row["seconds"] for row in rows]
        work = [row["flops"] / rows[0]["flops"] for row in rows]
        low = [s["median"] - s["q1"] for s in seconds]
        high = [s["q3"] - s["median"] for s in seconds]
        top, bottom = grid[0][column], grid[1][column]
        top.errorbar(x, [s["median"] for s in seconds], yerr=[low, high], marker="o", label="seconds")
        top.plot(x, [seconds[0]["median"] * w for w in work], "--", color="grey", label="∝ counted FLOPs")
        bottom.plot(x, [row["step_bytes"] / 2**20 for row in rows], marker="o", color="#a33", label="MiB of a step")
        bottom.plot(x, [rows[0]["step_bytes"] / 2**20 * w for w in work], "--", color="grey", label="∝ counted FLOPs")
        top.set_title(name, fontsize=10)
        for axis in (top, bottom):
            axis.set_xscale("log")
            axis.set_yscale("log")
        if column == 0:
            top.legend(fontsize=7)
            bottom.legend(fontsize=7)
    busy = f", others took {report['busy']:.2f} cores before it"
    figure.suptitle(
        f"{report['device']['name']}, {report['threads']} threads, commit {report['commit']}{busy}", fontsize=9
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


def _by_axis(points: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for axis in AXES:
        rows = [row for row in points if row["axis"] == axis]
        if rows:
            yield axis, rows


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=tuple(AXES), metavar="AXIS", help=f"of {', '.join(AXES)} [all]")
    parser.add_argument("--largest", type=int, metavar="N", help="leave out points above this value")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of a point [7]")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch, on as many cores [all]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="[results/scaling-DEVICE.json; with --only: none]")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds: at least 1, got {args.rounds}")
    pin_or_exit(parser, args.threads)
    busy = busy_before()
    print(notice(busy))
    report: dict[str, Any] = environment(_CPU) | {"busy": busy, "points": [], "growth": {}}
    name = re.sub(r"[^a-z0-9]+", "-", report["device"]["name"].lower()).strip("-")
    target = args.json or (None if args.only or args.largest else RESULTS / f"scaling-{name}.json")
    with tempfile.TemporaryDirectory() as root:
        for axis in args.only or AXES:
            print(axis)
            rows = []
            for value in AXES[axis]:
                if args.largest is None or value <= args.largest:
                    rows.append(measure(axis, value, Path(root), args.rounds))
                    print(line(rows[-1]), flush=True)
            report["points"] += rows
            if len(rows) > 1:
                report["growth"][axis] = growth(rows)
                print(summary(axis, rows), flush=True)
            if target is not None:  # after every axis, so that an interrupted run leaves its results
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(json.dumps(report, indent=1) + "\n")
    if target is not None:
        print(f"wrote {target} and {plot(report, target.with_suffix('.png'))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
