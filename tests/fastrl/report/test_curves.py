"""Curves of a run: values of different scales have separate axes, and no legend covers a curve."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrl.report.curves import MOST, SPAN, chart, families

ROWS = [
    {
        "step": step,
        "loss": -1e-9,
        "reward/mean": 0.5,
        "reward/length": -200.0,
        "reward/std": 0.1,
        "kl": 0.001,
        "entropy": 2.0,
        "clip/low": 0.0,
        "update/skipped": 0.0,
        "update/tokens": 9000.0,
        "update/micro_batches": 2.0,
        "groups/kept": 8.0,
        "groups/resample_rounds": 0.0,
        "completion/truncated": 0.25,
        "completion/length_mean": 30.0,
        "data/consumed": 8 * step,
        "data/epoch": 0,
        "speed/tokens_per_s": 1000.0,
        "speed/images_per_s": 1.0,
        "mine/on": step % 2,
        "mine/count": step,
        "mine/share": 0.5,
    }
    for step in (1, 2)
]


def test_units_are_apart() -> None:
    charts = families(ROWS)
    of = {key: name for name, keys in charts.items() for key in keys}
    assert sorted(of) == sorted(set(ROWS[0]) - {"step"})
    apart = [
        *(("kl", "entropy"), ("clip/low", "kl"), ("update/skipped", "update/micro_batches")),
        *(("update/tokens", "update/micro_batches"), ("completion/truncated", "completion/length_mean")),
        *(("data/consumed", "data/epoch"), ("speed/tokens_per_s", "speed/images_per_s")),
        *(("mine/on", "mine/share"), ("mine/count", "mine/share"), ("reward/mean", "reward/length")),
    ]
    assert [pair for pair in apart if of[pair[0]] == of[pair[1]]] == []


@given(st.dictionaries(st.text("ab/", min_size=1, max_size=4), st.floats(-1e9, 1e9), max_size=30))
def test_every_metric_is_drawn_once_beside_those_of_its_size(row: dict[str, float]) -> None:
    charts = families([{"step": 1, **row}])
    assert sorted(key for keys in charts.values() for key in keys) == sorted(row)
    for keys in charts.values():
        assert len(keys) <= MOST
        sizes = sorted(abs(row[key]) for key in keys if row[key])
        assert all(large <= SPAN * small for small, large in pairwise(sizes[:1] + sizes[-1:]))


@pytest.mark.parametrize(
    "values", [(-1e308, 1e308), (1e308, 1e-308), (5e-324, 5e-324), (1.0, 1.0 + 2**-52), (-1e308, 0.0)]
)
@pytest.mark.parametrize("step", [2, 10**400, -(10**400)])
@pytest.mark.filterwarnings("error")
def test_values_of_any_size_are_drawn(values: tuple[float, float], step: int) -> None:
    rows = [{"step": 1, "loss": values[0]}, {"step": step, "loss": values[1]}]
    figure = chart("loss", ["loss"], rows, mark=step)
    figure.canvas.draw()
    assert len(figure.axes[0].lines[0].get_xdata()) == 2


@pytest.mark.parametrize("count", [2, MOST])
def test_the_legend_is_beside_the_axes(count: int) -> None:
    keys = [f"time/phase_{place}" for place in range(count)]
    rows = [{"step": step, **dict.fromkeys(keys, float(step))} for step in range(20)]
    figure = chart("seconds", keys, rows)
    figure.canvas.draw()
    (axis,), (legend,) = figure.axes, figure.legends
    assert axis.get_legend() is None
    assert legend.get_window_extent().x0 >= axis.get_window_extent().x1
    assert legend.get_window_extent().x1 <= figure.bbox.x1
    assert legend.get_window_extent().y0 >= figure.bbox.y0
