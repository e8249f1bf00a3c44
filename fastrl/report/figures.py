"""Figures: pictures with true and predicted boxes before and after training, and with the attention of answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrl.data.disk import nothing_empty_left
from fastrl.data.pictures import open_picture
from fastrl.data.records import Record
from fastrl.run.samples import ANSWER, TRUTH, answer_boxes, true_boxes

FARTHEST = 1e9  # pixels; an answer may have coordinates whose differences overflow


def before_after(
    before: Sequence[tuple[Record, str]], after: Sequence[tuple[Record, str]], path: Path, *, columns: int = 6
) -> None:
    """Draw the same records with the answers before (upper row) and after (lower row); truth green, prediction red."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = max(1, min(columns, len(before)))
    figure = Figure(figsize=(2.3 * count, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, count, squeeze=False)
    for row, (name, answers) in enumerate((("before", before), ("after", after))):
        for axis, (record, answer) in zip(axes[row], answers, strict=False):
            draw_answer(axis, record, answer)
            axis.set_title(_title(record) if row == 0 else "", fontsize=7, wrap=True)
        axes[row][0].set_ylabel(name)
    figure.suptitle("truth green, answer red", fontsize=9)
    _save(figure, path)


def truths(records: Sequence[Record], path: Path) -> None:
    """Draw each record's first picture with its true boxes and points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * max(1, len(records)), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, len(records)), squeeze=False)[0]
    for axis, record in zip(axes, records, strict=False):
        if record.images:
            draw_answer(axis, record, "")
            points = record.target.get("points") or []
            axis.plot([x for x, _ in points], [y for _, y in points], "o", color=TRUTH, markersize=4)
        axis.set_title(_title(record), fontsize=7, wrap=True)
    _save(figure, path)


def draw_answer(axis: Any, record: Record, answer: str) -> None:
    """One picture with its true boxes and the boxes of an answer, in pixels of the original image."""
    from matplotlib.patches import Rectangle

    axis.imshow(open_picture(record.images[0]))
    axis.set_xticks([])
    axis.set_yticks([])
    for color, boxes, style in (
        (TRUTH, true_boxes(record), "-"),
        (ANSWER, answer_boxes(record, answer), "--"),
    ):
        for box in boxes:
            x1, y1, x2, y2 = (max(-FARTHEST, min(FARTHEST, value)) for value in box)
            axis.add_patch(
                Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, linestyle=style, linewidth=1.5)
            )


def heat_maps(pictures: Sequence[tuple[Any, Sequence[Any]]], path: Path) -> None:
    """Draw each picture (a file or PIL image) in its own row, once plain and once with each of its maps.

    A map [rows, columns] covers the whole picture. All maps of a row have one colour scale, from 0 to their maximum.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 1 + max(len(maps) for _, maps in pictures)
    figure = Figure(figsize=(2.2 * columns, 2.3 * len(pictures) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(pictures), columns, squeeze=False)
    for row, (source, maps) in zip(axes, pictures, strict=True):
        image = open_picture(source)
        most = max((float(m.max()) for m in maps), default=0.0)
        for axis in row:
            axis.axis("off")
        for number, axis in enumerate(row[: len(maps) + 1]):
            axis.imshow(image)
            if number:
                heat, extent = maps[number - 1], (-0.5, image.width - 0.5, image.height - 0.5, -0.5)
                axis.imshow(heat.numpy(), extent=extent, cmap="inferno", alpha=0.65, vmin=0, vmax=most or 1.0)
                axis.set_title(f"turn {number}: {float(heat.sum()):.3f}", fontsize=8)
    figure.suptitle("attention of each turn's answer on the picture", fontsize=9)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with nothing_empty_left(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def _title(record: Record) -> str:
    return str(record.target.get("expression") or record.target.get("label") or record.id)
