"""``make verify``: every demo on three seeds, each in its own process, as one table and one JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

RESULTS = Path(__file__).parent / "results" / "verify.json"


def jobs() -> list[tuple[str, str | None]]:
    """(method, task) of every demo; a demo with tasks lists them in its module's ``TASKS`` or ``METRICS``."""
    from fastrl.demo import DEMOS

    return [
        (m, task) for m, name in DEMOS.items() for task in getattr(importlib.import_module(name), "METRICS", [None])
    ]


def run_demo(method: str, task: str | None, seed: int, out: Path) -> dict[str, Any]:
    """The demo's result, from the last line it prints.

    Raises:
        RuntimeError: the demo failed, or printed no JSON object.
    """
    where = out / "-".join(filter(None, (method, task, str(seed))))
    command = [sys.executable, "-m", "fastrl.cli", "demo", "--method", method, "--seed", str(seed), "--out", str(where)]
    done = subprocess.run([*command, *(["--task", task] if task else []), "--json"], stdout=subprocess.PIPE, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        raise RuntimeError(f"demo {method} {task or ''} seed {seed}: exit status {done.returncode}, no result")
    return {"method": method, "task": task, "seed": seed, **json.loads(lines[-1])}


def table(results: list[dict[str, Any]]) -> str:
    """One line per run, and per demo the mean over seeds with the standard deviation of the change."""
    lines = [f"{'demo':28} {'metric':12} {'seed':>6} {'before':>8} {'after':>8} {'change':>16} {'seconds':>8}"]
    demos = dict.fromkeys((row["method"], row.get("task")) for row in results)
    for method, task in demos:
        rows = [row for row in results if (row["method"], row.get("task")) == (method, task)]
        changes = [row["after"] - row["before"] for row in rows]
        name = f"{method} {task or ''}".strip()
        for row, change in zip(rows, changes, strict=True):
            lines.append(_line(name, row["metric"], str(row["seed"]), row, f"{change:+.3f}"))
        means = {key: mean(row[key] for row in rows) for key in ("before", "after", "seconds")}
        spread = f" ± {stdev(changes):.3f}" if len(changes) > 1 else ""
        lines.append(_line(name, rows[0]["metric"], "mean", means, f"{mean(changes):+.3f}{spread}"))
    return "\n".join(lines)


def _line(name: str, metric: str, seed: str, row: dict[str, Any], change: str) -> str:
    numbers = f"{row['before']:8.3f} {row['after']:8.3f} {change:>16} {row['seconds']:8.0f}"
    return f"{name:28} {metric:12} {seed:>6} {numbers}"


def main(argv: list[str] | None = None) -> int:
    """Run what is asked for, print, write; returns 1 where a demo failed or did not improve on a seed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="demos whose 'method task' contains this")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/verify"), metavar="DIR", help="run folders [runs/verify]"
    )
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="[benchmarks/results/verify.json]")
    args = parser.parse_args(argv)
    chosen = [(method, task) for method, task in jobs() if args.only in f"{method} {task or ''}"]
    if not chosen:
        parser.error(f"no demo matches {args.only!r}")
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    for method, task in chosen:
        for seed in args.seeds:
            try:
                results.append(run_demo(method, task, seed, args.out))
            except RuntimeError as error:
                failed.append(str(error))
    worse = [f"{r['method']} {r['task'] or ''} seed {r['seed']}: worse" for r in results if r["after"] <= r["before"]]
    if results:
        from benchmarks.run import environment  # what the table depends on, beside the seeds

        print(table(results))
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(environment() | {"results": results}, indent=1) + "\n")
    print("\n".join([*failed, *worse]) or f"{len(results)} runs, all better than before")
    return int(bool(failed or worse))


if __name__ == "__main__":
    sys.exit(main())
