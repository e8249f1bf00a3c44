"""Figure of temporal perplexities: their distribution, and the scores of single frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastrl.data.disk import nothing_empty_left

if TYPE_CHECKING:
    from fastrl.evaluate.tpl import TemporalPerplexity

POSITIONS = 20  # bins along a clip, for clips of different length


def draw_tpl(results: Sequence[TemporalPerplexity], path: Path, *, form: str, threshold: float | None = None) -> None:
    """Draw a histogram of TPL (with the filter's threshold), and next to it the score of single frames along the clip.

    The right part is the mean over records of ℓ(frame alone) − ℓ(all frames) by the frame's position in its clip (0:
    the first frame, 1: the last); near 0, a single frame is as informative as the clip.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    values = [result.tpl for result in results]
    left.hist(values, bins=min(40, max(5, len(values) // 4)), color="#4575b4")
    left.axvline(sum(values) / len(values), color="black", linewidth=1, label="mean")
    if threshold is not None:
        left.axvline(threshold, color="#d73027", linestyle="--", linewidth=1, label="kept from here")
    left.set_xlabel("temporal perplexity" + (" (nats per token)" if form == "log" else ""))
    left.set_ylabel("records")
    left.legend(fontsize=8)
    places, means = mean_curve(results)
    right.plot(places, means, marker="o", color="#4575b4")
    right.axhline(0, color="black", linewidth=0.5)
    right.set_xlabel("place of the frame in its clip")
    right.set_ylabel("log-prob: frame alone − all frames")
    with nothing_empty_left(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def mean_curve(results: Sequence[TemporalPerplexity]) -> tuple[list[float], list[float]]:
    """Positions in the clip (0 to 1), and the mean over records of ℓ(frame alone) − ℓ(all frames) there."""
    found: dict[float, list[float]] = {}
    for result in results:
        for frame, score in result.curve.items():
            place = (frame - 1) / (result.frames - 1) if result.frames > 1 else 0.0
            found.setdefault(round(place * POSITIONS) / POSITIONS, []).append(score - result.full)
    places = sorted(found)
    return places, [sum(found[place]) / len(found[place]) for place in places]
