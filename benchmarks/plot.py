"""``python -m benchmarks.plot FILE``: a figure of one results file, from the file alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

OURS = "fastrl"


def plot(results: Path, out: Path | None = None) -> Path:
    """Draw each peer's time and memory relative to ours (right of the line: ours is better); returns the PNG.

    Memory of tensors is compared if both sides need at least a megabyte.

    Raises:
        ValueError: no case in the file has a measured peer.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    report = json.loads(results.read_text())
    bars = list(_bars(report))
    if not bars:
        raise ValueError(f"{results}: no case with a measured peer")
    labels = [label for label, _, _ in bars]
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.2 + 0.3 * len(bars)), sharey=True, constrained_layout=True)
    for axis, title, values in zip(
        axes, ("time ÷ ours", "tensor memory ÷ ours"), zip(*[bar[1:] for bar in bars], strict=True), strict=True
    ):
        known = [(i, value) for i, value in enumerate(values) if value]
        axis.barh([i for i, _ in known], [value - 1 for _, value in known], left=1, color="#3b6ea5")
        for i, value in known:
            axis.text(max(value, 1), i, f" {value:.0f}×" if value >= 9.5 else f" {value:.2g}×", va="center", fontsize=8)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale("log")
        low, high = min([1.0, *(value for _, value in known)]), max([1.0, *(value for _, value in known)])
        axis.set_xlim(low / 1.6, high * 2.5)
        axis.set_title(title, fontsize=10)
    axes[0].set_yticks(range(len(labels)), labels, fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle(
        f"{report['device']['name']}, {report['threads']} threads, commit {report['commit']}, {report['date']}"
    )
    out = out or results.with_suffix(".png")
    figure.savefig(out, dpi=120)
    plt.close(figure)
    return out


def _bars(report: dict[str, Any]) -> Any:
    """(label, time ratio, memory ratio or None) of every measured peer."""
    for case in report["cases"]:
        ours = case["results"][OURS]
        for name, row in case["results"].items():
            if name != OURS and row.get("ratio"):
                worth_it = min(ours["peak_bytes"], row["peak_bytes"]) >= 1 << 20  # below, other memory matters more
                memory = row["peak_bytes"] / ours["peak_bytes"] if worth_it else None
                yield f"{case['name']} vs {name}", row["ratio"], memory


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="PNG")
    args = parser.parse_args(argv)
    print(plot(args.results, args.out))


if __name__ == "__main__":
    main()
