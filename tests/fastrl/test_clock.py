"""Times of phases add up, and a profiled run writes a trace."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastrl.clock import PHASES, Clock
from fastrl.trainer import train
from tests.helpers.training import make_recipe, make_records


def test_a_phase_inside_another_is_taken_out_of_it() -> None:
    clock = Clock()
    with clock.phase("whole"):
        with clock.phase("outer"):
            time.sleep(0.01)
            with clock.phase("inner"):
                time.sleep(0.02)
        first = clock.read()
        assert first.keys() == {"outer", "inner"}  # an open phase is not counted yet
    assert first["inner"] >= 0.02
    assert first["outer"] >= 0.01
    assert clock.read().keys() == {"whole"}
    assert clock.read() == {}


def test_phases_of_one_name_add_up_and_an_error_ends_one() -> None:
    clock = Clock()
    for _ in range(2):
        with contextlib.suppress(KeyError), clock.phase("a"):
            time.sleep(0.01)
            raise KeyError
    assert clock.read()["a"] >= 0.02


@pytest.mark.parametrize("steps", [1, 4])
def test_profile_writes_a_trace_with_the_phases(tiny_folder: Callable[[str], Path], tmp_path: Path, steps: int) -> None:
    recipe = make_recipe(tiny_folder("qwen2_5"), tmp_path, optim__steps=steps)
    train(recipe, records=make_records(), show=False, profile=True)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert set(PHASES) <= {event.get("name") for event in events}
    assert sum(event.get("name") == "optimizer" for event in events) == min(steps, 2)
