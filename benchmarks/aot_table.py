"""``python -m benchmarks.aot_table DOC``: writes results/aot.json as a compact table between two marks of a
document."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.table import embed as place

RESULTS = Path(__file__).parent / "results" / "aot.json"
BEGIN, END = "<!-- aot table: begin -->", "<!-- aot table: end -->"


def table(payload: dict[str, Any]) -> str:
    """Markdown, a line per kernel: the range over its configurations of registers, shared bytes and instructions."""
    kernels: dict[str, list[dict[str, Any]]] = {}
    for row in payload["kernels"]:
        kernels.setdefault(row["name"], []).append(row)
    architectures = sorted({row["arch"] for row in payload["kernels"]})
    head = ["kernel", "launched by", "compiled", *(f"sm_{arch}" for arch in architectures), "bytes of stack"]
    lines = [" | ".join(head), " | ".join(["---", "---", *["--:"] * (len(head) - 2)])]
    for name, rows in sorted(kernels.items()):
        cells = [_cell([row for row in rows if row["arch"] == arch]) for arch in architectures]
        callers = ", ".join(f"`{caller}`" for caller in sorted({row["call"].partition("(")[0] for row in rows}))
        lines.append(" | ".join([f"`{name}`", callers, str(len(rows)), *cells, str(max(r["stack"] for r in rows))]))
    return "\n".join(f"| {line} |" for line in lines)


def _cell(rows: list[dict[str, Any]]) -> str:
    ends = [(min(r[key] for r in rows), max(r[key] for r in rows)) for key in ("registers", "shared", "instructions")]
    return " / ".join(str(low) if low == high else f"{low}–{high}" for low, high in ends)


def embed(document: str, payload: dict[str, Any]) -> str:
    """The document with the table between its marks. Raises ``ValueError`` if they are missing."""
    return place(document, BEGIN, END, f"{table(payload)}\n\nTriton {payload['triton']}.")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot_table", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("document", type=Path, metavar="DOC")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE")
    args = parser.parse_args(argv)
    args.document.write_text(embed(args.document.read_text(), json.loads(args.json.read_text())))


if __name__ == "__main__":
    main()
