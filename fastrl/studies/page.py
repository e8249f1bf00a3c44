"""A study as one self-contained HTML page: the claim, the tables, the plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

from fastrl.report.page import figure_address, page, write_page_file
from fastrl.report.text import label, shown
from fastrl.studies.base import Plot, Study
from fastrl.studies.outcome import arm_rows, change_rows, claim_rows, conditions, interval, interval_of

COLORS = {"rises": "#1a9850", "falls": "#d73027", "level": "#777777"}


def write_page(study: Study, result: Mapping[str, Any], path: Path) -> Path:
    """Write the page of a study's results."""
    about, place = study.about, result["machine"]
    texts = {"Paper": about.paper, "Design": about.design, "Expected": about.expected}
    cost = (
        f"{result['seconds']:.0f} s of runs, {result['process_cpu_seconds']:.0f} s of one core in all, {place['cpu']}"
    )
    code = f"fastrl {result['version']}" + (f", commit {result['commit']}" if result["commit"] else "")
    told = f"{conditions(result)}. {cost}, {code}."
    charts = [_forest(result["changes"]), *(_plot(plot, result["arms"]) for plot in study.plots())]
    findings = [[name, f"{f['value']:+.3f}", interval(f)] for name, f in result["findings"].items()]
    told_of = interval_of(result)
    parts = [
        f"<h1>{shown(about.question)}</h1>",
        *(f"<p><b>{name}.</b> {shown(text)}</p>" for name, text in texts.items()),
        f"<p>{shown(told)}</p>",
        *(["<h2>Expected and found</h2>", _table(*claim_rows(result))] if result["claims"] else []),
        f"<h2>Compared</h2><p>{shown(told_of[0].upper() + told_of[1:])}.</p>",
        _table(*change_rows(result)),
        _table(["finding", "value", "95 % interval"], findings) if findings else "",
        "<h2>Arms</h2>",
        _table(*arm_rows(study, result)),
        '<h2>Plots</h2><div class="charts">',
        *(f'<figure><img alt="plot" src="{figure_address(chart)}"></figure>' for chart in charts if chart is not None),
        "</div>",
    ]
    return write_page_file(path, page(f"fastrl study {about.name}", parts))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{shown(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{shown(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _forest(changes: Mapping[str, Mapping[str, Any]]) -> Any:
    """Every comparison's change with its interval; small dots are the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from fastrl.studies.outcome import verdict

    if not changes:
        return None
    figure = Figure(figsize=(7, 0.7 + 0.32 * len(changes)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for place, found in enumerate(changes.values()):
        color = COLORS[verdict(found)]
        axis.plot([found["low"], found["high"]], [place, place], color=color, linewidth=2)
        axis.plot(found["seeds"], [place] * len(found["seeds"]), ".", color="#bbbbbb", markersize=5)
        axis.plot([found["change"]], [place], "o", color=color, markersize=5)
    axis.axvline(0, color="gray", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(changes)), [label(name) for name in changes], fontsize=7)
    axis.invert_yaxis()
    axis.set_title("change with its 95 % interval; small dots: seeds", fontsize=9)
    return figure


def _plot(plot: Plot, arms: Mapping[str, Mapping[str, Any]]) -> Any:
    """A measure of arms along an axis; bars are the standard deviation over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not any(arm in arms for line in plot.lines for _, arm in line.points):
        return None
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for line in plot.lines:
        points = [(x, arms[arm][plot.measure]) for x, arm in line.points if arm in arms]
        if points:
            bars = [stdev(p["seeds"]) if len(p["seeds"]) > 1 else 0.0 for _, p in points]
            axis.errorbar(
                [x for x, _ in points], [p["mean"] for _, p in points], bars, marker="o", capsize=2, label=line.label
            )
    axis.set(title=label(plot.title), xlabel=label(plot.across))
    axis.legend(fontsize=7)
    return figure
