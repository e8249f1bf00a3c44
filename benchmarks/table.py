"""``python -m benchmarks.table [FILE …]``: results JSON as Markdown tables (default: every file in results/)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.measure import unsteady
from benchmarks.versus.measure import PHASES

RESULTS = Path(__file__).parent / "results"
OURS = "fastrl"


def embed(document: str, begin: str, end: str, text: str) -> str:
    """The document with ``text`` between its marks ``begin`` and ``end``.

    Raises:
        ValueError: the marks are missing.
    """
    before, first, rest = document.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise ValueError(f"the document has no {begin!r} … {end!r}")
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def tables(report: dict[str, Any]) -> str:
    """Markdown of one results file of any command; empty for kinds without a table."""
    if "fairness" in report:
        return f"{_made_with(report)}\n\n{_gradients(report)}\n\n{steps(report)}"
    if "other_commit" in report:
        return f"{_made_with(report)}\n\n{pairs(report)}"
    if "cases" in report:
        return f"{_made_with(report)}\n\n{kernels(report)}"
    return ""


def kernels(report: dict[str, Any]) -> str:
    """A line per case of ``make bench``: our time, fraction of the floor and peak, each peer's time over ours."""
    head = ["case", "ms", "of the floor", "peak MiB", "peers: time ÷ ours (peak MiB)"]
    return _markdown(head, (_kernel_cells(case) for case in report["cases"] if "seconds" in case["results"][OURS]))


def pairs(report: dict[str, Any]) -> str:
    """A line per case of ``benchmarks.paired``: the other checkout's time over this one's, with its quartiles."""
    head = [f"case, {report['other_commit']} ÷ {report['commit']}", "seconds", "CPU seconds"]
    return _markdown(head, (_pair_cells(case) for case in report["cases"]))


def _pair_cells(case: dict[str, Any]) -> list[str]:
    found = (case["seconds_ratio"], case["cpu_seconds_ratio"])
    return [case["work"]["name"], *(f"{r['median']:.2f}{quartiles(r)}" for r in found)]


def quartiles(found: dict[str, float] | None) -> str:
    """`` [q1, q3]``, with an exclamation mark where they are further apart than a quarter of the median."""
    if found is None:
        return ""
    return f" [{found['q1']:.2f}, {found['q3']:.2f}]{'!' if unsteady(found) else ''}"


def _kernel_cells(case: dict[str, Any]) -> list[str]:
    ours = case["results"][OURS]
    measured = {name: row for name, row in case["results"].items() if name != OURS and row.get("ratio")}
    peers = [
        f"{name} {row['ratio']:.2f}×{quartiles(row.get('ratios'))} ({row['peak_bytes'] / 2**20:.1f})"
        for name, row in measured.items()
    ]
    numbers = [f"{1e3 * ours['seconds']:.3g}", f"{ours['percent_of_floor']:.0f} %", f"{ours['peak_bytes'] / 2**20:.1f}"]
    return [case["name"], *numbers, ", ".join(peers) or "none installed"]


def steps(report: dict[str, Any]) -> str:
    """A line per case of ``vs_trl``: seconds of a whole optimizer step, and TRL's numbers over fastrl's."""
    phases = [name for name in PHASES if name in ("generate", "forward", "backward")]
    head = [
        "step",
        "P / R / G × prompts",
        "trained",
        "rows in a micro-batch",
        "TRL s",
        "fastrl s",
        "**step** [quartiles]",
        "with a matmul for patches",
        "CPU time",
        *phases,
    ]
    return _markdown([*head, "peak memory", "FLOPs"], (_step_cells(case, phases) for case in report["cases"]))


def _step_cells(case: dict[str, Any], phases: Iterable[str]) -> list[str]:
    work, rows = case["work"], case["rows"]
    cells = [
        work["name"],
        f"{work['prompt']} / {work['answer']} / {work['group']} × {work['prompts']}",
        case["train"],
        f"{rows['trl']} / {rows[OURS]} ({case['micro_batch']})",
    ]
    sides = (case["sides"]["trl"], case["sides"][OURS])
    cells += [f"{side['seconds']:.2f}" if "seconds" in side else side["error"] for side in sides]
    ratio = case["ratio"]
    step = f"**{ratio['seconds']:.1f}×**{quartiles(ratio.get('spread'))}" if "seconds" in ratio else ""
    matmul = case.get("ratio_matmul", {})
    return [
        *cells,
        step,
        f"{matmul['seconds']:.1f}×{quartiles(matmul.get('spread'))}" if "seconds" in matmul else "",
        *(f"{ratio[n]:.1f}×" if n in ratio else "" for n in ("cpu_seconds", *phases, "peak_bytes", "flops")),
    ]


def _gradients(report: dict[str, Any]) -> str:
    found = [
        f"{row['train']}: cosine {row['cosine']:.7f}, norm ratio {row['norm_ratio']:.6f}" for row in report["gradients"]
    ]
    return "Gradients of one step from the same tokens: " + "; ".join(found) + "."


def _made_with(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    busy = f", others took {report['busy']:.2f} cores" if report.get("busy") is not None else ""
    where = f"{report['device']['name']}, {report['threads']} threads, load {report['load']:.1f}{busy}"
    return f"{where}, commit {report['commit']}, {report['date']}: {versions}"


def _markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=(__doc__ or "").split(":", 2)[-1])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    for file in args.files or sorted(RESULTS.glob("*.json")):
        found = tables(json.loads(file.read_text()))
        if found:
            print(f"### {file.stem}\n\n{found}\n")


if __name__ == "__main__":
    main()
