"""Learning rates of PerPO's demo: each kind of loss at each rate of one grid, on scenes that settings are chosen on.

``python -m benchmarks.perpo_rates`` builds the demo's lists once and trains each kind on them at each rate. The rate of
a kind is the one of the highest mean IoU of sampled answers on the demo's first held-out set; claims are held to the
second one (``fastrl.toy.demos.evidence``). Results go into ``results/perpo-rates.json``, by family of the small model.
Where the best is at an end of the grid, ``--rates`` tries more, for every kind, and keeps what was tried before.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrl.data import load_data
from fastrl.models.open import open_policy
from fastrl.recipe import load_recipe
from fastrl.toy.demos import fresh
from fastrl.toy.demos.families import DEFAULT, RECIPES, recipe_for
from fastrl.toy.demos.perpo import METHODS, PROMPTS, STEPS, measure, sample_lists, train_on
from fastrl.toy.demos.scenes import scenes_like

RESULTS = Path(__file__).parent / "results" / "perpo-rates.json"
GRID = (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
SEED, HELD_OUT = 0, 512

Row = Mapping[str, Any]  # ``kind``, ``rate``, ``sampled`` and ``greedy`` mean IoU, ``cpu_seconds``


def grid(
    family: str,
    out: Path,
    *,
    rates: Sequence[float] = GRID,
    prompts: int = PROMPTS,
    steps: int = STEPS,
    n: int = HELD_OUT,
) -> list[Row]:
    """A row for every kind at every rate, trained and measured as the demo does on seed ``SEED``.

    Args:
        family: model type of the small model.
        out: an empty folder for lists and runs.
        rates: the grid.
        prompts, steps, n: scenes with lists, steps of training, held-out scenes.
    """
    name = recipe_for("perpo-grounding", family)
    base = load_recipe(name)
    records = load_data(scenes_like(base.data.spec, n=n))
    lists = out / "lists.jsonl"
    sample_lists(base, lists, prompts, SEED, open_policy(base.model.path), print)
    rows: list[Row] = []
    for kind in METHODS:
        for rate in rates:
            began = time.process_time()
            policy = train_on(lists, name, kind, rate, out / f"{kind}-{rate:g}", SEED, steps)
            found = measure(policy, records, base.rollout.max_new_tokens)
            scores = {"sampled": found.sampled["mean_iou"], "greedy": found.greedy["mean_iou"]}
            rows.append({"kind": kind, "rate": rate, **scores, "cpu_seconds": round(time.process_time() - began)})
            print(rows[-1], flush=True)
    return rows


def merged(before: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """All rows by kind and rate; of the same kind and rate the new one."""
    rows = {(row["kind"], row["rate"]): row for row in (*before, *new)}
    order = list(METHODS)
    return [rows[key] for key in sorted(rows, key=lambda key: (order.index(key[0]), key[1]))]


def chosen(rows: Sequence[Row]) -> dict[str, float]:
    """The rate of each kind: the highest ``sampled``; of equal ones the lowest rate."""
    kinds = dict.fromkeys(row["kind"] for row in rows)
    return {
        kind: max((row for row in rows if row["kind"] == kind), key=lambda row: (row["sampled"], -row["rate"]))["rate"]
        for kind in kinds
    }


def table(rows: Sequence[Row]) -> str:
    """The grid as a Markdown table of sampled mean IoU; the highest of each kind is bold."""
    rates = sorted({row["rate"] for row in rows})
    lines = ["| learning rate | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---|" + "--:|" * len(rates)]
    for kind, best in chosen(rows).items():
        values = {row["rate"]: f"{row['sampled']:.3f}" for row in rows if row["kind"] == kind}
        cells = [f"**{values[rate]}**" if rate == best else values[rate] for rate in rates]
        lines.append(f"| {METHODS[kind]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the grid of one family, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.perpo_rates", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--family", choices=RECIPES, default=DEFAULT, help=f"model type of the small model [{DEFAULT}]")
    parser.add_argument("--rates", type=float, nargs="+", default=GRID, metavar="RATE", help="[the whole grid]")
    parser.add_argument("--out", type=Path, metavar="DIR", help="lists and runs [runs/perpo-rates, or a new one]")
    parser.add_argument(
        "--json", type=Path, default=RESULTS, metavar="FILE", help="[benchmarks/results/perpo-rates.json]"
    )
    args = parser.parse_args(argv)
    from benchmarks.run import environment  # what results depend on, besides the seed

    out = args.out if args.out is not None else fresh(Path("runs/perpo-rates"))
    made = environment()
    new = [{**row, "commit": made["commit"]} for row in grid(args.family, out, rates=args.rates)]
    before = json.loads(args.json.read_text(encoding="utf-8")) if args.json.is_file() else {}
    rows = merged(before.get(args.family, {}).get("grid", []), new)
    before[args.family] = made | {"seed": SEED, "held_out": HELD_OUT, "chosen": chosen(rows), "grid": rows}
    args.json.write_text(json.dumps(before, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
