"""TRL's mixins beside plain TRL: every number of every side, and their ratios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import trl_mixins
from benchmarks.versus import work
from benchmarks.versus.model import build_folder

pytest.importorskip("trl")


@pytest.mark.gate
def test_every_side_is_measured(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    folder = build_folder("small", tmp_path / "model", cpu)
    found = trl_mixins.measure(folder, work.TINY, tmp_path / "pictures", cpu, rounds=1)
    assert set(found) == {"trl", "fused", "shared prefix"}
    assert all(min(row[key]) > 0 for row in found.values() for key in trl_mixins.COMPARED)
    flops = {name: row["flops"][0] for name, row in found.items()}
    assert flops["shared prefix"] < flops["fused"] <= flops["trl"]


def rounds(*values: float) -> dict[str, list[float]]:
    return {key: list(values) for key in trl_mixins.COMPARED}


def test_ratios_are_those_of_the_rounds() -> None:
    found = trl_mixins.ratios({"trl": rounds(2.0, 8.0, 30.0), "fused": rounds(1.0, 2.0, 10.0)})
    expected = {"q1": 2.5, "median": 3.0, "q3": 3.5}  # of 2, 4 and 3: the median of the times gives 4
    assert found == {"fused": dict.fromkeys(trl_mixins.COMPARED, expected)}
    row = trl_mixins.line("fused", found["fused"])
    assert row.startswith("plain TRL over fused: seconds 3.00 [2.50, 3.50]!, cpu_seconds")


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(trl_mixins, "build_folder", lambda *_: tmp_path)
    monkeypatch.setattr(trl_mixins, "measure", lambda *_: {"trl": rounds(6.0, 6.0), "fused": rounds(2.0, 3.0)})
    monkeypatch.setattr(trl_mixins, "busy_before", lambda: 1.5)
    monkeypatch.setattr(trl_mixins, "RESULTS", tmp_path / "results")
    assert trl_mixins.main(["--device", "cpu", "--rounds", "2"]) == 0
    assert not (tmp_path / "results").exists()  # too few rounds to be shown
    assert "BUSY: others take 1.50" in capsys.readouterr().out
    assert trl_mixins.main(["--device", "cpu"]) == 0
    (target,) = (tmp_path / "results").iterdir()
    report = json.loads(target.read_text())
    assert (report["busy"], report["rounds"], report["threads"]) == (1.5, 7, torch.get_num_threads())
    assert report["sides"]["fused"]["seconds"] == {"q1": 2.25, "median": 2.5, "q3": 2.75}
    assert report["ratio"]["fused"]["flops"]["median"] == 2.5
    with pytest.raises(SystemExit):
        trl_mixins.main(["--rounds", "0"])
