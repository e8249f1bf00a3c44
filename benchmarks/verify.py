"""``make verify``: every demo on three seeds in separate processes with its claim checked, then every study in its
quick form (``benchmarks.studies``); tables and JSON.

``--demos`` or ``--studies``: one of the two.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastrl.toy.demos.claims import Claim

RESULTS = Path(__file__).parent / "results" / "verify.json"
OF_RUN = ("commit", "modified", "date", "jobs", "threads", "device")  # what a row's numbers depend on


def jobs(family: str | None = None) -> list[tuple[str, str | None]]:
    """(method, task) of every demo, or of those that run on each family of small models; a demo with tasks lists them
    in its module's ``METRICS``."""
    from fastrl.toy.demos import BY_FAMILY, DEMOS

    chosen = {m: name for m, name in DEMOS.items() if family is None or m in BY_FAMILY}
    return [
        (m, task) for m, name in chosen.items() for task in getattr(importlib.import_module(name), "METRICS", [None])
    ]


def claim_of(method: str, task: str | None = None) -> Claim:
    """The claim of a method's demo: its module's ``CLAIM``, or that of the task in its ``CLAIMS``."""
    from fastrl.toy.demos import DEMOS

    module = importlib.import_module(DEMOS[method])
    return getattr(module, "CLAIMS", {}).get(task, module.CLAIM)


def run_demo(
    method: str, task: str | None, seed: int, out: Path, family: str | None = None, threads: int | None = None
) -> dict[str, Any]:
    """The demo's result, from the last line it prints.

    Args:
        method, task, seed, family: see ``fastrl demo``.
        out: folder of all runs.
        threads: of torch in the demo's process (None: its own choice).

    Raises:
        RuntimeError: the demo failed or printed no JSON object.
    """
    where = out / "-".join(filter(None, (method, task, str(seed))))
    command = [sys.executable, "-m", "fastrl.cli", "demo", "--method", method, "--seed", str(seed), "--out", str(where)]
    command += ["--task", task] if task else []
    command += ["--family", family] if family else []
    environment = None if threads is None else os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, env=environment)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        raise RuntimeError(f"demo {method} {task or ''} seed {seed}: exit status {done.returncode}, no result")
    found = json.loads(lines[-1])
    found.pop("out", None)  # a place on somebody's disk
    return {"method": method, "task": task, "seed": seed, **found}


def by_demo(results: list[dict[str, Any]]) -> dict[tuple[str, str | None], list[dict[str, Any]]]:
    """Results grouped by (method, task), in order."""
    groups: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for row in results:
        groups.setdefault((row["method"], row.get("task")), []).append(row)
    return groups


def table(results: list[dict[str, Any]]) -> str:
    """One line per run, and per demo the mean over seeds with the standard deviation of each change.

    The score is the one that the demo reports (for sampled answers if it samples), followed by that of greedy answers.
    A demo that compares several models adds a line for each, with means over seeds; one with further measures
    (counting: ``distance`` of matched points, and their reward ``points``) a line for each of them. Below each demo
    stand its comparisons on the set that nothing was chosen on, which its claim is held to: the change on every seed
    with its 95 % interval over records, the spread over seeds, and how many records it leaves out.
    """
    scores = f"{'before':>7} {'after':>7} {'change':>15}"
    lines = [f"{'demo':25} {'metric':9} {'seed':>5} {scores} | greedy {scores} {'seconds':>8}"]
    for (method, task), rows in by_demo(results).items():
        name = f"{method} {task or ''}".strip()
        for row in rows:
            lines.append(_line(name, row["metric"], str(row["seed"]), [row]))
        lines.append(_line(name, rows[0]["metric"], "mean", rows))
        lines += [_line(name, further, "mean", rows, f"{further}_") for further in _further(method, task, rows)]
        lines += _compared(rows)
        lines += _unseen(rows)
    return "\n".join(lines)


def _further(method: str, task: str | None, rows: list[dict[str, Any]]) -> list[str]:
    """Measures of a demo besides its main one, the task's in its module's ``BESIDE``, that every run has."""
    from fastrl.toy.demos import DEMOS

    names = getattr(importlib.import_module(DEMOS[method]), "BESIDE", {}).get(task, ())
    places = [f"{how}{{}}_{when}" for how in ("", "greedy_") for when in ("before", "after")]
    return [name for name in names if all(row.get(place.format(name)) is not None for row in rows for place in places)]


def _line(name: str, metric: str, seed: str, rows: list[dict[str, Any]], key: str = "") -> str:
    cells = [_scores(rows, key), _scores(rows, f"greedy_{key}")]
    return f"{name:25} {metric:9} {seed:>5} {cells[0]} |        {cells[1]} {mean(r['seconds'] for r in rows):8.0f}"


def _scores(rows: list[dict[str, Any]], prefix: str) -> str:
    before, after = ([row[f"{prefix}{key}"] for row in rows] for key in ("before", "after"))
    changes = [new - old for old, new in zip(before, after, strict=True)]
    spread = f" ± {stdev(changes):.3f}" if len(changes) > 1 else ""
    return f"{mean(before):7.3f} {mean(after):7.3f} {f'{mean(changes):+.3f}{spread}':>15}"


def _compared(rows: list[dict[str, Any]]) -> list[str]:
    models = [row["models"] for row in rows if "models" in row]
    if not models:
        return []
    lines = []
    for name in models[0]:
        means = {key: mean(found[name][key] for found in models) for key in models[0][name]}
        lines.append(f"  {name:23} " + "  ".join(f"{key} {value:.3f}" for key, value in means.items()))
    return lines


def _unseen(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"  on {rows[0]['unseen']['n']} others, 95 % intervals over them:"]
    for name in rows[0]["unseen"]["changes"]:
        found = [row["unseen"]["changes"][name] for row in rows if name in row["unseen"]["changes"]]
        each = "  ".join(f"{c['change']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]" for c in found)
        spread = f"  ± {stdev(c['change'] for c in found):.3f}" if len(found) > 1 else ""
        means = f"{mean(c['before'] for c in found):.3f} {mean(c['after'] for c in found):.3f}"
        without = [str(c.get("left_out", 0)) for c in found]
        left_out = f"  without {', '.join(without)}" if set(without) != {"0"} else ""
        lines.append(f"    {name:32} {means}  {each}{spread}{left_out}")
    return lines


def broken_claims(results: list[dict[str, Any]]) -> list[str]:
    """A line for each claim that does not hold."""
    return [
        f"{method} {task or ''}".strip() + f" {line} (claim: {claim.text})"
        for (method, task), rows in by_demo(results).items()
        for claim in [claim_of(method, task)]
        for line in claim.broken(rows)
    ]


def stored_results(target: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run, each with what is known of that run (``OF_RUN``); none without a file.

    Raises:
        ValueError: the file has something else.
    """
    if not target.is_file():
        return []
    try:
        found = json.loads(target.read_text(encoding="utf-8"))
        rows = [{key: found[key] for key in OF_RUN} | row for row in found["results"]]
        broken_claims([row for row in rows if _is_of(row, jobs(None))])  # rows that it cannot read are found now
        return rows
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{target} has no results of demos ({type(error).__name__}: {error})") from None


def with_others(
    found: dict[str, Any],
    before: list[dict[str, Any]],
    chosen: list[tuple[str, str | None]],
    every: list[tuple[str, str | None]],
) -> dict[str, Any]:
    """A run of the ``chosen`` of ``every`` demo with the rows that others have from ``before``, each row with its
    ``OF_RUN``; ``commit`` names all commits, ``modified`` and ``broken`` are of all rows, the rest is of this run."""
    kept = [row for row in before if _is_of(row, every) and not _is_of(row, chosen)]
    rows = kept + [{key: found[key] for key in OF_RUN} | row for row in found["results"]]
    rows.sort(key=lambda row: next(at for at, demo in enumerate(every) if _is_of(row, [demo])))
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    modified = any(row["modified"] for row in rows)
    return {**found, "commit": commits, "modified": modified, "results": rows, "broken": broken_claims(rows)}


def _is_of(row: dict[str, Any], demos: list[tuple[str, str | None]]) -> bool:
    """Whether a row is of one of these demos; of one with a single task, none is asked for but one is noted."""
    return any(row["method"] == method and task in (None, row.get("task")) for method, task in demos)


def main(argv: list[str] | None = None) -> int:
    """Run the chosen demos and studies, print and write; returns 1 if one failed or a demo's claim does not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify", description=(__doc__ or "").split("\n\n")[0])
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--demos", action="store_true", help="the demos alone")
    part.add_argument("--studies", action="store_true", help="the studies alone")
    only = "part of a demo's 'method task', whose results replace its earlier ones in --json, or of a study's name"
    parser.add_argument("--only", default="", metavar="TEXT", help=only)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="of demos")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="at once, each with its part of the cores")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folders [runs/verify, or a new one next to it]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="of demos [benchmarks/results/verify[-TYPE].json]")
    parser.add_argument(
        "--family", metavar="TYPE", help="model type of the small models: demos alone, of those with it"
    )
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs: at least one at a time, got {args.jobs}")
    from fastrl.studies import STUDIES
    from fastrl.toy.demos import fresh

    chosen = [(method, task) for method, task in jobs(args.family) if args.only in f"{method} {task or ''}"]
    demos = [] if args.studies else chosen
    studies = [] if args.demos or args.family else [name for name in STUDIES if args.only in name]
    if args.studies and args.family:
        parser.error("--family is for demos: studies have their own models")
    if not demos and not studies:
        parser.error(f"no demo or study of those asked for matches {args.only!r}")
    if not demos and args.json:
        parser.error("--json is for demos; studies write studies.json in --out")
    target = args.json or RESULTS.with_name("-".join(filter(None, (RESULTS.stem, args.family))) + RESULTS.suffix)
    try:
        before = stored_results(target) if demos and args.only else []
    except ValueError as error:
        parser.error(str(error))
    out = args.out if args.out is not None else fresh(Path("runs/verify"))
    failed = _demos(demos, before, target, args, out) if demos else False
    return int((_studies(studies, args, out / "studies") if studies else False) or failed)


def _demos(
    chosen: list[tuple[str, str | None]],
    before: list[dict[str, Any]],
    target: Path,
    args: argparse.Namespace,
    out: Path,
) -> bool:
    """Run and print demos, and write them with the rows ``before`` of others; whether one failed or misses its
    claim."""
    from fastrl.studies.workers import cores

    runs = [(method, task, seed) for method, task in chosen for seed in args.seeds]
    threads = None if args.jobs == 1 else max(1, cores() // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        done = list(pool.map(lambda run: _attempt(*run, out, args.family, threads), runs))
    results = [each for each in done if isinstance(each, dict)]
    failed = [each for each in done if isinstance(each, str)]
    broken = broken_claims(results)
    if results:
        from benchmarks.run import environment  # what results depend on, besides the seeds

        print(table(results))
        how = {"jobs": args.jobs} | ({} if threads is None else {"threads": threads})
        how |= {} if args.family is None else {"family": args.family}
        found = environment() | how | {"results": results, "failed": failed}
        _write(target, with_others(found, before, chosen, jobs(args.family)))
    held = [f"{method} {task or ''}: {claim_of(method, task).text}" for method, task in by_demo(results)]
    print("\n".join([*failed, *broken]) or "\n".join(["every claim holds:", *(f"  {line}" for line in held)]))
    return bool(failed or broken)


def _attempt(*demo: Any) -> dict[str, Any] | str:
    """The result of ``run_demo``, or why there is none."""
    try:
        return run_demo(*demo)
    except RuntimeError as error:
        return str(error)


def _studies(names: list[str], args: argparse.Namespace, out: Path) -> bool:
    """Run, print and write studies in their quick form; whether one failed."""
    from benchmarks.studies import line, run_all, run_quick

    results, failed = run_all(names, out, partial(run_quick, processes=args.jobs))
    for result in results.values():
        print(line(result))
    _write(out / "studies.json", {"results": results, "failed": failed})
    print("\n".join(failed) or f"all of {len(names)} studies ran; a claim that is not seen is a result, not a failure")
    return bool(failed)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
