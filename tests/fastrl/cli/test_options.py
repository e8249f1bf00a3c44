"""Options of commands have the effect that their help states."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import fastrl
from fastrl.cli.main import main
from tests.helpers.chat_server import good, serving

REPO = Path(__file__).resolve().parents[3]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command's exit status."""
    monkeypatch.setattr(sys, "argv", ["fastrl", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_version_is_the_distributions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert capsys.readouterr().out == f"fastrl {project['version']}\n"
    assert fastrl.__version__ == project["version"]


def test_a_demo_takes_its_number_of_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr("fastrl.toy.demos.perception_r1.run", lambda **options: told.update(options) or {})
    assert run(monkeypatch, "demo", "--steps", "3", "--out", str(tmp_path / "run")) == 0
    assert told["steps"] == 3
    assert run(monkeypatch, "demo", "--steps", "0", "--out", str(tmp_path / "run")) == 2


def test_a_model_is_evaluated_on_pictures_of_the_size_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    common = ("eval", "grounding", "--data", "scenes:grounding?n=2&size=112", "--model", "tiny:perception")
    sides = []
    for name, limits in (
        ("whole", ()),
        ("small", ("--max-pixels", "3136")),
        ("large", ("--min-pixels", "50176", "--max-pixels", "50176")),
    ):
        out = tmp_path / f"{name}.jsonl"
        assert run(monkeypatch, *common, *limits, "--max-new-tokens", "4", "--out", str(out)) == 0
        sides.append([json.loads(line)["resized"] for line in out.read_text().splitlines()])
    assert sides == [[[112, 112]] * 2, [[56, 56]] * 2, [[224, 224]] * 2]


def test_a_judge_is_named_on_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    small = (
        "optim.steps=1",
        "data.prompts_per_step=1",
        "rollout.group_size=2",
        "rollout.max_new_tokens=4",
        "log.to=[]",
    )
    with serving() as server:
        server.script = [good]
        judged = (f"reward.judge.url={server.url}", "reward.judge.rubric=Is the box drawn tightly?")
        sets = [part for key in (*small, *judged) for part in ("--set", key)]
        assert run(monkeypatch, "train", "perception-r1-grounding-tiny", "--out", "run", *sets) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["reward/judge"] == 0.8
    assert "drawn tightly" in server.seen[0]["messages"][0]["content"][-1]["text"]
    assert list((tmp_path / "judge-cache").rglob("*.json"))
