"""``FusedGRPOMixin`` and ``SharedPrefixGRPOMixin`` beside plain TRL: the same ``GRPOTrainer.train()``, as ratios.

All three run TRL's own loop over the same records with answers of a forced length, in float32 (bfloat16 on a GPU) and
with the same micro-batches. They alternate after a few steps, so that a disturbance affects all of them; seconds are
medians over all timed steps, CPU seconds those of this process only. Tests check that they compute the same
(``tests/kernels/integrations/test_trl.py``, ``tests/fastrl/integrations/test_trl.py``).

    python -m benchmarks.trl_mixins --rounds 3
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.run import RESULTS, default_device, environment
from benchmarks.versus.model import build_folder
from benchmarks.versus.theirs import Trl
from benchmarks.versus.work import GOAL, Work, make_records

COMPARED = ("seconds", "cpu_seconds", "forward", "backward", "flops", "step_bytes")


def sides() -> dict[str, type | None]:
    """The mixin placed before ``GRPOTrainer`` on each side."""
    from fastrl.integrations.trl import SharedPrefixGRPOMixin
    from fastrl_kernels.integrations.trl import FusedGRPOMixin

    return {"trl": None, "fused": FusedGRPOMixin, "shared prefix": SharedPrefixGRPOMixin}


def measure(folder: Path, work: Work, pictures: Path, device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Measurements of each side: medians of ``rounds`` steps, FLOPs and bytes of one step."""
    from fastrl.models.load import load_tokenizer

    found: dict[str, dict[str, list[float]]] = {name: {key: [] for key in COMPARED} for name in sides()}
    for turn in range(rounds):
        kinds = ("warm", "time", "count") if turn == 0 else ("warm", "time")
        records = make_records(work, work.prompts * len(kinds), pictures, load_tokenizer(folder))
        for name, mixin in sides().items():
            side = Trl(folder, work, work.group, records, train="full", device=device, mixin=mixin)
            side.run(kinds)
            recorder = side.recorder
            row: dict[str, Any] = {"seconds": recorder.seconds, "cpu_seconds": recorder.cpu_seconds}
            row |= {phase: [step[phase] for step in recorder.by_phase] for phase in ("forward", "backward")}
            row |= {key: [] if turn else [getattr(recorder, key)] for key in ("flops", "step_bytes")}
            for key, values in row.items():
                found[name][key] += values
            del side, recorder
            gc.collect()
    return {name: {key: statistics.median(values) for key, values in row.items()} for name, row in found.items()}


def ratios(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Plain TRL's values divided by each other side's."""
    plain = found["trl"]
    return {name: {key: plain[key] / row[key] for key in COMPARED} for name, row in found.items() if name != "trl"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_mixins", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="[the GPU if available]")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps per side [3]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="[results/trl-mixins-DEVICE.json]")
    args = parser.parse_args(argv)
    device = torch.device(args.device) if args.device else default_device()
    size = "3b" if device.type == "cuda" else "small"
    with tempfile.TemporaryDirectory() as temporary:
        folder = build_folder(size, Path(temporary) / size, device)
        found = measure(folder, GOAL, Path(temporary) / "pictures", device, args.rounds)
    report = environment(device) | {"work": vars(GOAL), "model": size, "rounds": args.rounds, "sides": found}
    report["ratio"] = ratios(found)
    for name, row in report["ratio"].items():
        print(f"plain TRL over {name}: " + ", ".join(f"{key} {value:.2f}" for key, value in row.items()))
    name = re.sub(r"[^a-z0-9]+", "-", report["device"]["name"].lower()).strip("-")
    target = args.json or RESULTS / f"trl-mixins-{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
