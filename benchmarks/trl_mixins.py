"""``FusedGRPOMixin`` and ``SharedPrefixGRPOMixin`` beside plain TRL: the same ``GRPOTrainer.train()``, as ratios.

All three run TRL's own loop over the same records with answers of a forced length, in float32 (bfloat16 on a GPU) and
with the same micro-batches. In a round each runs a step to warm up and a timed one, in the reverse order in every other
round, so that a disturbance affects all of them. Seconds are medians with quartiles, a ratio is plain TRL's value over
the other's in the same round; CPU seconds are those of this process only. FLOPs and bytes are counted in the first
round. Tests check that they compute the same (``tests/kernels/integrations/test_trl.py``,
``tests/fastrl/integrations/test_trl.py``).

    python -m benchmarks.trl_mixins --threads 2
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import Others, busy_before, notice, pin_or_exit
from benchmarks.measure import spread
from benchmarks.run import RESULTS, default_device, environment
from benchmarks.table import quartiles
from benchmarks.versus.model import build_folder
from benchmarks.versus.theirs import Trl
from benchmarks.versus.work import GOAL, Work, make_records

COMPARED = ("seconds", "cpu_seconds", "forward", "backward", "flops", "step_bytes")
LEAST_ROUNDS = 7  # of results that are written without being asked for

Rounds = dict[str, list[float]]  # the values of a side by what was measured


def sides() -> dict[str, type | None]:
    """The mixin placed before ``GRPOTrainer`` on each side."""
    from fastrl.integrations.trl import SharedPrefixGRPOMixin
    from fastrl_kernels.integrations.trl import FusedGRPOMixin

    return {"trl": None, "fused": FusedGRPOMixin, "shared prefix": SharedPrefixGRPOMixin}


def measure(folder: Path, work: Work, pictures: Path, device: torch.device, rounds: int) -> dict[str, Rounds]:
    """Measurements of each side, one per round; FLOPs and bytes of a step are in the first only."""
    from fastrl.models.load import load_tokenizer

    found: dict[str, Rounds] = {name: {key: [] for key in COMPARED} for name in sides()}
    for turn in range(rounds):
        kinds = ("warm", "time", "count") if turn == 0 else ("warm", "time")
        records = make_records(work, work.prompts * len(kinds), pictures, load_tokenizer(folder))
        for name in reversed(found) if turn % 2 else found:
            side = Trl(folder, work, work.group, records, train="full", device=device, mixin=sides()[name])
            side.run(kinds)
            recorder = side.recorder
            row: dict[str, Any] = {"seconds": recorder.seconds, "cpu_seconds": recorder.cpu_seconds}
            row |= {phase: [step[phase] for step in recorder.by_phase] for phase in ("forward", "backward")}
            row |= {key: [] if turn else [getattr(recorder, key)] for key in ("flops", "step_bytes")}
            for key, values in row.items():
                found[name][key] += values
            del side, recorder
            gc.collect()
        print(f"  round {turn + 1} of {rounds}", file=sys.stderr)
    return found


def summary(row: Rounds) -> dict[str, dict[str, float]]:
    """Quartiles of every value of a side."""
    return {key: spread(row[key]) for key in COMPARED}


def ratios(found: dict[str, Rounds]) -> dict[str, dict[str, dict[str, float]]]:
    """Quartiles of plain TRL's values divided by each other side's of the same round."""
    plain = found["trl"]
    return {
        name: {key: spread([a / b for a, b in zip(plain[key], row[key], strict=True)]) for key in COMPARED}
        for name, row in found.items()
        if name != "trl"
    }


def line(name: str, ratio: dict[str, dict[str, float]]) -> str:
    """The printed line of a side."""
    return f"plain TRL over {name}: " + ", ".join(
        f"{key} {row['median']:.2f}{quartiles(row)}" for key, row in ratio.items()
    )


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_mixins", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="[the GPU if available]")
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS, help=f"timed steps of each side [{LEAST_ROUNDS}]")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch, on as many cores [all]")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="[results/trl-mixins-DEVICE.json; fewer rounds: none]"
    )
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds: at least 1, got {args.rounds}")
    pin_or_exit(parser, args.threads)
    device = torch.device(args.device) if args.device else default_device()
    size = "3b" if device.type == "cuda" else "small"
    busy = busy_before()
    print(notice(busy))
    report = environment(device) | {"busy": busy, "work": vars(GOAL), "model": size, "rounds": args.rounds}
    others = Others()
    with tempfile.TemporaryDirectory() as temporary:
        folder = build_folder(size, Path(temporary) / size, device)
        found = measure(folder, GOAL, Path(temporary) / "pictures", device, args.rounds)
    report |= {"busy_during": others.busy(), "sides": {name: summary(row) for name, row in found.items()}}
    report |= {"ratio": ratios(found), "all_rounds": found}
    print(notice(report["busy_during"]))
    for name, row in report["ratio"].items():
        print(line(name, row))
    name = re.sub(r"[^a-z0-9]+", "-", report["device"]["name"].lower()).strip("-")
    target = args.json or (RESULTS / f"trl-mixins-{name}.json" if args.rounds >= LEAST_ROUNDS else None)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
