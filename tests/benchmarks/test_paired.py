"""Paired runs of two checkouts; here both are this checkout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.measure import quartiles
from benchmarks.paired import HERE, Side, compare, line, main
from benchmarks.versus.model import build_folder
from benchmarks.versus.work import TINY


@pytest.mark.gate
def test_a_checkout_takes_the_same_steps_as_itself(tmp_path: Path) -> None:
    folder = build_folder("small", tmp_path / "small", torch.device("cpu"))
    row = compare(HERE, TINY, folder, tmp_path, 2)
    assert [a["grad_norm"] for a in row["other"]] == [b["grad_norm"] for b in row["here"]]
    ratios = sorted(a["cpu_seconds"] / b["cpu_seconds"] for a, b in zip(row["other"], row["here"], strict=True))
    found = row["cpu_seconds_ratio"]
    assert ratios[0] <= found["q1"] <= found["median"] <= found["q3"] <= ratios[1]
    assert f"cpu seconds {found['median']:.3f}" in line(row)


def test_each_side_imports_the_checkout_it_is_given(tmp_path: Path) -> None:
    package = tmp_path / "benchmarks" / "versus"
    package.mkdir(parents=True)
    (package / "ours.py").write_text("raise SystemExit(7)\n")
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    with Side(tmp_path, TINY, tmp_path, tmp_path, 1) as side, pytest.raises(RuntimeError, match="exit status 7"):
        side.step()


def test_quartiles() -> None:
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([".", "--only", "nothing"], "--only: no case matches 'nothing'; there are goal"),
        ([".", "--rounds", "1"], "--rounds: at least 2, got 1"),
        (["/nowhere"], "/nowhere: no checkout of fastrl"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
