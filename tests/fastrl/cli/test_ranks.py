"""With several processes, only the first one says where the results are."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastrl.trainer
from fastrl.cli.main import train
from fastrl.trainer import Summary


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_rank_prints_the_last_lines(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    ended = Summary(tmp_path, 4, 1.0, interrupted=False, checkpoint=tmp_path / "step-4")
    monkeypatch.setattr(fastrl.trainer, "train", lambda *_, **__: ended)
    settings = ["engine.kind=fsdp2", "optim.states=fp32"]
    train("perception-r1-grounding-tiny", data="refcoco:x", out=tmp_path, overrides=settings)
    found = capsys.readouterr()
    lines = [line for line in (found.out + found.err).splitlines() if line.startswith(("step 4", "model: "))]
    assert len(lines) == (2 if rank == "0" else 0)
