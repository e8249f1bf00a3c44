"""A command that fails leaves no empty file and no empty folder behind; all commands are tested."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastrl.cli.main import main

TINY = ("--model", "tiny:perception")
GONE = ("--model", "no-such-folder")
GROUNDING = "scenes:grounding?n=2"
BROKEN = """
def score(completions, **_):
    if len(completions) > 2:  # more than it is tried with before the run begins
        raise KeyError('mine')
    return [0.0, 1.0]
"""
FAILURES = {
    "demo, unknown task": ("demo", "--task", "juggling", "--out", "deep/out"),
    "train, no model": ("train", "perception-r1-grounding-tiny", *GONE, "--out", "deep/out"),
    "train, another task": ("train", "perception-r1-counting-tiny", "--data", GROUNDING, "--out", "deep/out"),
    "train, bad rows": ("train", "perception-r1-grounding-tiny", "--data", "refexp:bad.jsonl", "--out", "deep/out"),
    "train, first step": (
        *("train", "perception-r1-grounding-tiny", "--data", f"{GROUNDING}&size=56", "--out", "deep/out"),
        *("--set", "reward.function=broken.py:score", "--set", "rollout.max_new_tokens=2"),
        *("--set", "data.prompts_per_step=1"),
    ),
    "eval, no model": ("eval", "grounding", *GONE, "--data", GROUNDING, "--out", "deep/out.jsonl"),
    "eval, bad answers": (
        *("eval", "grounding", "--predictions", "bad.jsonl", "--data", GROUNDING),
        *("--out", "deep/out.jsonl"),
    ),
    "eval, reflection": (
        *("eval", "caption", *GONE, "--data", "scenes:caption?n=1", "--reflect", "2"),
        *("--out", "deep/out.jsonl", "--attention", "deep/looks"),
    ),
    "reflect": ("reflect", *GONE, "--critic", "rule", "--image", "no.png", "--attention", "deep/looks"),
    "build perpo": ("build", "perpo", "--task", "ocr", *GONE, "--data", "scenes:ocr?n=1", "--out", "deep/out.jsonl"),
    "build reper": (
        *("build", "reper", "--model", "tiny:language", "--critic", "http:http://127.0.0.1:9/v1?retries=0&timeout=0.5"),
        *("--data", "scenes:caption?n=1", "--temperatures", "0,1", "--max-new-tokens", "48", "--out", "deep/out.jsonl"),
    ),
    "build utr": ("build", "utr", "--data", GROUNDING, "--frames", "2", "--out", "deep/out.jsonl"),
    "tpl": ("tpl", *GONE, "--data", "scenes:shown?n=1", "--plot", "deep/plot.png"),
    "report": ("report", "no-run", "--out", "deep/page.html"),
    "study": (
        *("study", "blind", "--recipe", "perception-r1-grounding-tiny", *GONE, "--held-out", GROUNDING),
        *("--out", "deep/out", "--data", GROUNDING),
    ),
    "tiny build": ("tiny", "build", "juggling", "--out", "deep/out"),
    "tiny teach": ("tiny", "teach", "juggling", "--out", "deep/out"),
    "tiny teach, width": ("tiny", "teach", "video", "--from", "tiny:video", "--width", "64", "--out", "deep/out"),
    "data": ("data", "refexp:no.jsonl", "--draw", "deep/truth.png"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n')
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("what", FAILURES)
def test_a_failed_command_leaves_nothing(
    what: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["fastrl", *FAILURES[what]])
    with pytest.raises(SystemExit) as ended:
        main()
    message = capsys.readouterr().err
    assert ended.value.code == 2, message
    assert sorted(folder.rglob("*")) == before, message


def test_what_was_there_before_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "mine.txt").write_text("")
    monkeypatch.setattr(sys, "argv", ["fastrl", *FAILURES["train, no model"]])
    with pytest.raises(SystemExit):
        main()
    assert [path.name for path in (folder / "deep").iterdir()] == ["mine.txt"]
