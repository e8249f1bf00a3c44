"""``fastrl report``: one run's metrics as a self-contained HTML page with curves and sample answers drawn as boxes."""

from __future__ import annotations

import base64
import html
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.answers import View
from fastrl.run.logs import read_rows

if TYPE_CHECKING:
    from fastrl.data.records import Record

# Families of metrics with the names at the start of their keys, in the order of the page.
FAMILIES = {
    "reward": ("reward/",),
    "loss": ("loss",),
    "gradient": ("grad_norm",),
    "learning rate": ("lr",),
    "KL, entropy, clipped": ("kl", "entropy", "clip/"),
    "sampler against trainer": ("sampler/",),
    "advantage": ("advantage/",),
    "completion length": ("completion/length",),
    "truncated": ("completion/truncated",),
    "groups": ("groups/",),
    "seconds": ("time/",),
    "speed": ("speed/",),
    "memory (GiB)": ("memory/",),
}
PICTURES = 12  # sample answers that are drawn
TASKS_WITH_BOXES = ("grounding", "counting", "detection")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222 }
h1, h2 { font-weight: 600 } h2 { margin-top: 2.5rem }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem }
.charts img, .pictures img { width: 100% } .pictures { display: grid; grid-template-columns: repeat(6, 1fr); gap: .5rem }
table { border-collapse: collapse; width: 100% } td, th { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; vertical-align: top }
td.answer { font-family: ui-monospace, monospace; font-size: .85em; word-break: break-word } pre { background: #f6f6f6; padding: 1rem; overflow: auto }
"""  # noqa: E501


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of the run in folder ``run`` to ``out`` (default ``run/report.html``) and return its path.

    Curves are drawn of every number in ``metrics.jsonl``. Sample answers are drawn over their pictures where the run's
    data can still be read; a page without pictures says why.

    Raises:
        FileNotFoundError: the folder holds no ``metrics.jsonl``.
        ValueError: ``metrics.jsonl`` has no row.
    """
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        raise FileNotFoundError(f"{run} is no run folder: it holds no metrics.jsonl")
    rows = read_rows(metrics)
    if not rows:
        raise ValueError(f"{metrics} has no row yet")
    samples = read_rows(run / "samples.jsonl") if (run / "samples.jsonl").is_file() else []
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8") if (run / "recipe.yaml").is_file() else ""
    parts = [
        f"<h1>{html.escape(run.resolve().name)}</h1>",
        f"<p>{html.escape(headline(rows))}</p>",
        f'<h2>Curves</h2><div class="charts">{"".join(_charts(rows))}</div>',
        _sample_section(samples, recipe),
        f"<h2>Recipe</h2><pre>{html.escape(recipe)}</pre>" if recipe else "",
    ]
    title = html.escape(run.resolve().name)
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    out = out if out is not None else run / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page + "\n".join(parts) + "</html>\n", encoding="utf-8")
    return out


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: steps, time, and the mean reward of the first and the last tenth of the steps."""
    seconds = sum(row.get("time/step") or 0.0 for row in rows)
    text = f"{len(rows)} steps, {seconds / 60:.1f} minutes"
    rewards = [row["reward/mean"] for row in rows if row.get("reward/mean") is not None]
    if not rewards:
        return text
    tenth = max(1, len(rewards) // 10)
    first, last = statistics.fmean(rewards[:tenth]), statistics.fmean(rewards[-tenth:])
    return f"{text}; mean reward {first:.3f} in the first tenth of them, {last:.3f} in the last"


def families(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The keys of the metrics by family, without those that never hold a number; what fits none is ``other``."""
    numbers = dict.fromkeys(k for row in rows for k, v in row.items() if isinstance(v, int | float) and k != "step")
    found: dict[str, list[str]] = {}
    for key in numbers:
        name = next(
            (f for f, starts in FAMILIES.items() if key in starts or key.startswith(_prefixes(starts))), "other"
        )
        found.setdefault(name, []).append(key)
    return {name: found[name] for name in (*FAMILIES, "other") if name in found}


def _prefixes(starts: Iterable[str]) -> tuple[str, ...]:
    return tuple(start for start in starts if "/" in start)


def _charts(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    for name, keys in families(rows).items():
        yield f'<img alt="{html.escape(name)}" src="{_chart(name, keys, rows)}">'


def _chart(name: str, keys: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A chart of some metrics over the steps, as the address of an image that is in the page itself."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for key in keys:
        points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        axis.plot(*zip(*points, strict=True), linewidth=1.2, label=key, marker="." if len(points) == 1 else "")
    axis.set_title(name, fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    if len(keys) > 1:
        axis.legend(fontsize=6, ncols=2)
    return _address(figure)


def _address(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _sample_section(samples: Sequence[Mapping[str, Any]], recipe: str) -> str:
    if not samples:
        return ""
    rows = "".join(_sample_row(sample) for sample in samples)
    head = "".join(f"<th>{name}</th>" for name in ("step", "question", "answer", "reward"))
    return f"<h2>Sample answers</h2>{_pictures(samples, recipe)}<table><tr>{head}</tr>{rows}</table>"


def _sample_row(sample: Mapping[str, Any]) -> str:
    components = {k: v for k, v in (sample.get("rewards") or {}).items() if v is not None}
    parts = ", ".join(f"{name} {value:.2f}" for name, value in components.items())
    reward = sample.get("reward")
    shown = f"{reward:.3f}" if isinstance(reward, int | float) else "–"
    cells = [html.escape(str(sample.get(name, ""))) for name in ("step", "question", "answer")]  # any text may be there
    cells.append(html.escape(f"{shown} ({parts})" if parts else shown))
    return "<tr><td>{}</td><td>{}</td><td class='answer'>{}</td><td>{}</td></tr>".format(*cells)


def _pictures(samples: Sequence[Mapping[str, Any]], recipe: str) -> str:
    """The last samples drawn over their pictures: truth green, answer red."""
    drawable = [s for s in samples if s.get("task") in TASKS_WITH_BOXES and s.get("views")][-PICTURES:]
    if not drawable:
        return ""
    try:
        records = _records(recipe, {str(sample["id"]) for sample in drawable})
    except (ValueError, OSError) as error:
        return f"<p>No pictures: the run's data cannot be read any more ({html.escape(str(error))}).</p>"
    shown = [_picture(sample, records[str(sample["id"])]) for sample in drawable if str(sample["id"]) in records]
    return f'<p>Truth green, answer red.</p><div class="pictures">{"".join(shown)}</div>'


def _records(recipe: str, wanted: set[str]) -> dict[str, Record]:
    import yaml

    from fastrl.data import load_data
    from fastrl.recipe import build_recipe

    data = build_recipe(yaml.safe_load(recipe), source="recipe.yaml").data
    return {record.id: record for record in load_data(data.spec, skip_bad=True) if record.id in wanted}


def _picture(sample: Mapping[str, Any], record: Record) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from fastrl.report.figures import draw_answer

    seen = replace(record, views=tuple(View(*view) for view in sample["views"]), frame=sample["frame"])
    figure = Figure(figsize=(2.4, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    draw_answer(axis, seen, str(sample.get("answer", "")))
    axis.set_title(f"step {sample['step']}, reward {sample.get('reward') or 0:.2f}", fontsize=8)
    return f'<img alt="{html.escape(str(sample.get("question", "")))}" src="{_address(figure)}">'
