"""``python -m benchmarks.aot_table DOC``: puts results/aot.json as a compact table between two marks of a document."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "aot.json"
BEGIN, END = "<!-- aot table: begin -->", "<!-- aot table: end -->"


def table(payload: dict[str, Any]) -> str:
    """Markdown: a line per kernel and configuration; registers, shared bytes and instructions per architecture."""
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for row in payload["kernels"]:
        by_name.setdefault(row["name"], {})[row["arch"]] = row
    architectures = sorted({row["arch"] for row in payload["kernels"]})
    head = ["kernel/configuration", "warps", *(f"sm_{arch}" for arch in architectures), "spills"]
    lines = [" | ".join(head), " | ".join(["---", *["--:"] * (len(head) - 1)])]
    for name, rows in by_name.items():
        cells = [f"{r['registers']} / {r['shared']} / {r['instructions']}" for r in (rows[a] for a in architectures)]
        spills = sum(row["spills"] + row["stack"] for row in rows.values())
        lines.append(" | ".join([f"`{name}`", str(next(iter(rows.values()))["warps"]), *cells, str(spills)]))
    return "\n".join(f"| {line} |" for line in lines)


def embed(document: str, payload: dict[str, Any]) -> str:
    """The document with the table between its marks.

    Raises:
        ValueError: the marks are missing.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no {BEGIN!r} … {END!r}")
    return f"{before}{BEGIN}\n\n{table(payload)}\n\nTriton {payload['triton']}.\n{END}{after}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot_table", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("document", type=Path, metavar="DOC")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE")
    args = parser.parse_args(argv)
    args.document.write_text(embed(args.document.read_text(), json.loads(args.json.read_text())))


if __name__ == "__main__":
    main()
