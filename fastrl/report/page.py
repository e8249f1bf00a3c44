"""``fastrl report``: one run's metrics as a self-contained HTML page with curves and sample answers drawn as boxes."""

from __future__ import annotations

import base64
import html
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.answers import View
from fastrl.data.disk import nothing_empty_left
from fastrl.data.files import write_atomically
from fastrl.data.validate import is_number
from fastrl.report.curves import chart, families
from fastrl.report.text import attribute, label, plain, shown
from fastrl.run.logs import is_step, read_anyhow

if TYPE_CHECKING:
    from fastrl.data.records import Record

PICTURES = 12  # number of sample answers that are drawn
DRAWN = 100_000  # characters of an answer in which boxes are searched
TASKS_WITH_BOXES = ("grounding", "counting", "detection")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222 }
h1, h2 { font-weight: 600 } h2 { margin-top: 2.5rem }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem }
figure { margin: 0 } figcaption { font-size: .85em; color: #555 }
.charts img, .pictures img { width: 100% } .pictures { display: grid; grid-template-columns: repeat(6, 1fr); gap: .5rem }
table { border-collapse: collapse; width: 100% } td, th { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; vertical-align: top }
td.answer { font-family: ui-monospace, monospace; font-size: .85em; word-break: break-word } pre { background: #f6f6f6; padding: 1rem; overflow: auto }
"""  # noqa: E501


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of the run in folder ``run`` to ``out`` (default ``run/report.html``) and return its path.

    Curves are drawn for every number in ``metrics.jsonl``. Sample answers are drawn on their pictures if the run's data
    can still be read; otherwise the page states the reason. Unreadable lines of the logs are left out and counted.

    Raises:
        FileNotFoundError: the folder has no ``metrics.jsonl``.
        ValueError: ``metrics.jsonl`` has no row.
    """
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        raise FileNotFoundError(f"{run} is not a run folder: it has no metrics.jsonl")
    rows, others = read_anyhow(metrics)
    if not rows:
        raise ValueError(f"{metrics} has no row yet")
    samples, broken = _read(run / "samples.jsonl")
    evaluations, unread = _read(run / "eval.jsonl")
    stored = run / "recipe.yaml"
    recipe = stored.read_bytes().decode("utf-8", "replace") if stored.is_file() else ""
    stepped, without = _with_steps(rows)
    evaluated = [row for row in evaluations if is_step(row.get("step")) and is_number(row["step"])]
    lines = {"metrics.jsonl": others, "samples.jsonl": broken, "eval.jsonl": unread + len(evaluations) - len(evaluated)}
    notes = [without, *(_left_out(count, name) for name, count in lines.items())]
    parts = [
        f"<h1>{shown(run.resolve().name)}</h1>",
        f"<p>{shown(headline(stepped, evaluated))}</p>",
        *(f"<p>{note}</p>" for note in notes if note),
        _evaluation_section(evaluated),
        f'<h2>Curves</h2><div class="charts">{"".join(_charts(stepped, _loss_note(stored)))}</div>',
        _sample_section(samples, stored),
        f"<h2>Recipe</h2><pre>{shown(recipe, 100_000)}</pre>" if recipe else "",
    ]
    return write_page_file(out if out is not None else run / "report.html", page(run.resolve().name, parts))


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page of HTML parts with the style of all pages; ``title`` is plain text."""
    head = f"<title>{html.escape(plain(title, 200))}</title><style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><meta charset="utf-8">{head}' + "\n".join(parts) + "</html>\n"


def write_page_file(path: Path, text: str) -> Path:
    """Write a page, with the folders it needs; nothing new is left where that fails. Returns ``path``."""
    with nothing_empty_left(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    return path


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of an optional log, and the number of its lines that are not rows."""
    return read_anyhow(path) if path.is_file() else ([], 0)


def _with_steps(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """Rows that have a step (all rows if none has one), and a message about the others."""
    stepped = [row for row in rows if is_step(row.get("step"))]
    if not stepped:
        return [
            {**row, "step": n} for n, row in enumerate(rows, 1)
        ], "No row has a step: they are shown in their order."
    without = len(rows) - len(stepped)
    return stepped, f"Left out: {without} of the rows, which have no step." if without else ""


def _left_out(lines: int, name: str) -> str:
    return f"Left out: {lines} of the lines of {name}, which cannot be read." if lines else ""


def headline(rows: Sequence[Mapping[str, Any]], evaluated: Sequence[Mapping[str, Any]] = ()) -> str:
    """One sentence: steps, time, and the mean reward of the first and the last tenth of the steps."""
    text = f"{len(rows)} steps, {_minutes(rows, 'time/step')} minutes"
    if evaluated:
        text += f", {len(evaluated)} evaluations, {_minutes(evaluated, 'time/eval')} minutes"
    equal = sum(row.get("reward/group_std") == 0 for row in rows)
    if equal:
        text += f" ({equal} steps without a learning signal: the rewards of every group were equal)"
    rewards = [float(row["reward/mean"]) for row in rows if is_number(row.get("reward/mean"))]
    if not rewards:
        return text
    tenth = max(1, len(rewards) // 10)
    first, last = statistics.fmean(rewards[:tenth]), statistics.fmean(rewards[-tenth:])
    return f"{text}; mean reward {first:.3f} in the first tenth of them, {last:.3f} in the last"


def _minutes(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    return f"{math.fsum(row[key] for row in rows if is_number(row.get(key))) / 60:.1f}"


def measured(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Keys of evaluations by metric, for greedy and sampled answers; without the number of records."""
    found: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for row in rows for key, value in row.items() if is_number(value)):
        metric = key.removeprefix("eval/").removeprefix("sampled/")
        if key.startswith("eval/") and metric.rpartition("/")[2] != "n":
            found.setdefault(metric, []).append(key)
    return found


def _evaluation_section(rows: Sequence[Mapping[str, Any]]) -> str:
    """A chart of each metric, with the best step marked."""
    if not rows:
        return ""
    best = max((row["step"] for row in rows if row.get("best") is True), default=None)
    charts = [
        f'<img alt="{html.escape(plain(name, 60))}" src="{figure_address(chart(name, keys, rows, mark=best))}">'
        for name, keys in measured(rows).items()
    ]
    caption = f"<p>Best after step {best} (dotted line).</p>" if best is not None else ""
    return f'<h2>Evaluation</h2>{caption}<div class="charts">{"".join(charts)}</div>'


def _charts(rows: Sequence[Mapping[str, Any]], note: str) -> Iterable[str]:
    """A figure element for each chart; ``note``: caption of the loss."""
    for name, keys in families(rows).items():
        title = html.escape(plain(name, 200))
        caption = f"<figcaption>{shown(note)}</figcaption>" if note and name == "loss" else ""
        yield f'<figure><img alt="{title}" src="{figure_address(chart(name, keys, rows))}">{caption}</figure>'


def _loss_note(recipe: Path) -> str:
    """What the method of a run says about its loss; nothing where the recipe cannot be read any more."""
    from fastrl.methods import method_for
    from fastrl.recipe import load_recipe

    try:
        stored = load_recipe(recipe)
        return method_for(stored.method).loss_note(stored.method, stored.optim.updates_per_batch)
    except (ValueError, OSError):
        return ""


def figure_address(figure: Any) -> str:
    """A figure as the ``src`` of an image: its PNG, in the page itself."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _sample_section(samples: Sequence[Mapping[str, Any]], recipe: Path) -> str:
    if not samples:
        return ""
    rows = "".join(_sample_row(sample) for sample in samples)
    head = "".join(f"<th>{name}</th>" for name in ("step", "question", "truth", "answer", "reward"))
    return f"<h2>Sample answers</h2>{_pictures(samples, recipe)}<table><tr>{head}</tr>{rows}</table>"


def _sample_row(sample: Mapping[str, Any]) -> str:
    components = sample.get("rewards")
    numbers = components.items() if isinstance(components, Mapping) else ()
    parts = ", ".join(f"{name} {value:.2f}" for name, value in numbers if is_number(value))
    reward = sample.get("reward")
    total = f"{reward:.3f}" if is_number(reward) else "–"
    texts = {name: shown(sample.get(name, "")) for name in ("step", "question", "truth", "answer")}  # may be anything
    texts["reward"] = shown(f"{total} ({parts})" if parts else total)
    kinds = {name: " class='answer'" if name in ("truth", "answer") else "" for name in texts}
    return "<tr>" + "".join(f"<td{kinds[name]}>{text}</td>" for name, text in texts.items()) + "</tr>"


def _pictures(samples: Sequence[Mapping[str, Any]], recipe: Path) -> str:
    """The last samples drawn on their pictures: truth green, answer red."""
    drawable = [s for s in samples if s.get("task") in TASKS_WITH_BOXES and s.get("views")][-PICTURES:]
    if not drawable:
        return ""
    try:
        records = _records(recipe, {str(sample.get("id")) for sample in drawable})
    except (ValueError, OSError) as error:
        return f"<p>No pictures: the run's data cannot be read any more ({shown(error)}).</p>"
    drawn, failed = [], 0
    for sample in drawable:
        record = records.get(str(sample.get("id")))
        try:
            drawn += [_picture(sample, record)] if record is not None else []
        except (ValueError, TypeError, KeyError, OSError, OverflowError):  # invalid views, a missing picture
            failed += 1
    left = f" Not drawn: {failed} whose picture or sizes cannot be read." if failed else ""
    return f'<p>Truth green, answer red.{left}</p><div class="pictures">{"".join(drawn)}</div>'


def _records(recipe: Path, wanted: set[str]) -> dict[str, Record]:
    from fastrl.recipe import load_recipe, load_records

    found = load_records(load_recipe(recipe), skip_bad=True)
    return {record.id: record for record in found if record.id in wanted}


def _picture(sample: Mapping[str, Any], record: Record) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from fastrl.report.figures import draw_answer

    seen = replace(record, views=tuple(View(*view) for view in sample["views"]), frame=sample.get("frame", "auto"))
    figure = Figure(figsize=(2.4, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    draw_answer(axis, seen, str(sample.get("answer", ""))[:DRAWN])
    reward = sample.get("reward")
    total = f", reward {reward:.2f}" if is_number(reward) else ""
    axis.set_title(label(f"step {sample.get('step', '–')}{total}"), fontsize=8)
    return f'<img alt="{attribute(sample.get("question", ""))}" src="{figure_address(figure)}">'
