"""Charts of a run's metrics; each chart has metrics of the same unit and similar size, with the legend beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

from fastrl.data.validate import is_number
from fastrl.report.text import label

# Charts and their metrics, in the order of the page. A metric belongs to the first chart with a matching pattern.
FAMILIES = {
    "spread of rewards": ("reward/std", "reward/group_std"),
    "reward": ("reward/*",),
    "reward of each source": ("source/*/reward/*",),
    "loss": ("loss",),
    "gradient norm": ("grad_norm",),
    "learning rate": ("lr",),
    "KL divergence (nats)": ("kl",),
    "entropy (nats)": ("entropy",),
    "clipped (fraction of tokens)": ("clip/*",),
    "probability ratio": ("ratio/*", "sampler/ratio*"),
    "sampler against trainer (nats)": ("sampler/*",),
    "advantage": ("advantage/*",),
    "answer length (tokens)": ("completion/length*",),
    "truncated answers (fraction)": ("completion/truncated", "source/*/completion/truncated"),
    "prompts of each source": ("source/*/prompts",),
    "rounds of further prompts": ("groups/resample_rounds",),
    "groups": ("groups/*",),
    "faults of an answer (mean number)": ("answers/*",),
    "update skipped (1: yes)": ("update/skipped",),
    "tokens of a step": ("update/tokens",),
    "micro-batches of a step": ("update/micro_batches",),
    "prompts so far": ("data/consumed",),
    "epoch": ("data/epoch",),
    "seconds": ("time/*",),
    "tokens per second": ("speed/*token*",),
    "images per second": ("speed/*image*",),
    "memory (GiB)": ("memory/*",),
}
SPAN = 50.0  # largest ratio of peak values of curves on one axis
MOST = 10  # most curves in one chart
FARTHEST = 1e100  # an axis to 1e308 overflows


def families(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The metrics' keys by chart, without those that never have a number.

    Metrics without a family are grouped by their prefix before the slash, and by whether their values are 0 or 1, whole
    numbers or others. A family whose curves do not fit on one axis, or are too many, is split into several charts.
    """
    peaks = _peaks(rows)
    found: dict[str, list[str]] = {}
    for key in peaks:
        found.setdefault(_family(key) or _unnamed(key, rows), []).append(key)
    order = {name: place for place, name in enumerate(FAMILIES)}
    charts: dict[str, list[str]] = {}
    for name in sorted(found, key=lambda name: order.get(name, len(order))):
        parts = list(_readable(found[name], peaks))
        for number, keys in enumerate(parts, 1):
            charts[f"{name} ({number} of {len(parts)})" if len(parts) > 1 else name] = keys
    return charts


def chart(name: str, keys: Sequence[str], rows: Sequence[Mapping[str, Any]], *, mark: int | None = None) -> Any:
    """A figure of metrics over steps, with a legend to the right if there are several. ``mark``: a step to mark with a
    dotted line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for key in keys:
        points = [(drawn(row["step"]), drawn(row[key])) for row in rows if is_number(row.get(key))]
        axis.plot(*zip(*points, strict=True), linewidth=1.2, label=label(key), marker="." if len(points) == 1 else "")
    if mark is not None:
        axis.axvline(drawn(mark), color="gray", linestyle=":", linewidth=1)
    axis.set_title(label(name), fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    if len(keys) > 1:
        figure.legend(loc="outside right upper", fontsize=6, frameon=False)
    return figure


def drawn(value: float) -> float:
    """A value as a place on an axis, within ``FARTHEST``."""
    return float(max(-FARTHEST, min(FARTHEST, value)))


def _peaks(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Largest absolute value of each metric that has a number in any row."""
    peaks: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            if key != "step" and is_number(value):
                peaks[key] = max(peaks.get(key, 0.0), abs(float(value)))
    return peaks


def _family(key: str) -> str | None:
    fits = (name for name, patterns in FAMILIES.items() if any(fnmatchcase(key, pattern) for pattern in patterns))
    return next(fits, None)


def _unnamed(key: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Name of the chart for a metric without a family."""
    values = {float(row[key]) for row in rows if is_number(row.get(key))}
    whole = all(value == int(value) for value in values)
    kind = "0 or 1" if values <= {0.0, 1.0} else "whole numbers" if whole else "numbers"
    return f"{key.split('/')[0] if '/' in key else 'other'} ({kind})"


def _readable(keys: Iterable[str], peaks: Mapping[str, float]) -> Iterable[list[str]]:
    """Split a family's keys into charts: peak values within ``SPAN``, at most ``MOST`` curves each."""
    ranked = sorted((key for key in keys if peaks[key] > 0), key=lambda key: -peaks[key])
    number, largest, groups = 0, peaks[ranked[0]] if ranked else 0.0, {}
    for place, key in enumerate(ranked):
        if peaks[key] * SPAN < largest:
            number, largest = number + 1, peaks[ranked[place]]
        groups[key] = number
    flat = [key for key in keys if key not in groups]  # always 0, which is readable on any axis
    for _, members in groupby([*flat, *ranked], key=lambda key: groups.get(key, 0)):
        held = sorted(members)
        yield from (held[start : start + MOST] for start in range(0, len(held), MOST))
