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
    assert all(row[key] > 0 for row in found.values() for key in trl_mixins.COMPARED)
    assert found["shared prefix"]["flops"] < found["fused"]["flops"] <= found["trl"]["flops"]


def test_ratios_and_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    plain, other = dict.fromkeys(trl_mixins.COMPARED, 6.0), dict.fromkeys(trl_mixins.COMPARED, 2.0)
    assert trl_mixins.ratios({"trl": plain, "fused": other}) == {"fused": dict.fromkeys(trl_mixins.COMPARED, 3.0)}
    monkeypatch.setattr(trl_mixins, "build_folder", lambda *_: tmp_path)
    monkeypatch.setattr(trl_mixins, "measure", lambda *_: {"trl": plain, "fused": other})
    target = tmp_path / "out.json"
    assert trl_mixins.main(["--device", "cpu", "--json", str(target)]) == 0
    assert json.loads(target.read_text())["ratio"]["fused"]["flops"] == 3.0
    assert "plain TRL over fused: seconds 3.00" in capsys.readouterr().out
