"""The studies of ``make verify``: a line for each; what cannot be run fails, what is not seen does not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import studies, verify
from benchmarks.studies import line, run_all, run_quick, told_of
from fastrl.studies import STUDIES


def result(name: str, *found: tuple[str, str, bool | None], stopped: str = "") -> dict[str, Any]:
    claims = {claim: {"expected": "rises", "found": how, "seen": seen} for claim, how, seen in found}
    return {"study": name, "question": f"does {name} help?", "claims": claims, "stopped": stopped}


def test_a_line_says_what_was_asked_what_was_seen_and_how_long_it_took() -> None:
    found = result("temporal", ("top − random", "level", False), ("top − bottom", "rises", True))
    shown = line({**found, "wall_seconds": 203.4})
    assert shown == "temporal        203 s  does temporal help? 1 of 2 seen; not: top − random (level)"
    assert told_of(result("gaze", ("a", "rises", True))) == "1 of 1 seen"
    open_too = result("thinking", ("a", "level", None), ("b", "rises", False), ("c", "level", True))
    assert told_of(open_too) == "1 of 3 seen; not: b (rises); not decided: a (level)"
    assert (
        told_of(result("reflection", stopped="the base uses no reasons"))
        == "nothing was trained: the base uses no reasons"
    )


def test_a_study_that_fails_is_named_and_the_others_are_run(tmp_path: Path) -> None:
    def fake(name: str, out: Path) -> Mapping[str, Any]:
        assert out == tmp_path / name
        if name == "gaze":
            raise RuntimeError("exit status 2, no result")
        return result(name)

    results, failed = run_all(["blind", "gaze", "rewards"], tmp_path, fake)
    assert list(results) == ["blind", "rewards"]
    assert failed == ["study gaze: exit status 2, no result"]
    assert all(each["wall_seconds"] >= 0 for each in results.values())


@pytest.mark.parametrize("fails", [False, True])
def test_verify_fails_where_a_study_does_and_not_where_a_claim_is_not_seen(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "fastrl.cli", "study"]
        assert command[5:8] == ["--quick", "--out", str(tmp_path / "studies" / command[4])]
        failing = fails and command[4] == "blind"
        text = "a table\n" + json.dumps(result(command[4], ("a − b", "level", False)))
        return subprocess.CompletedProcess(command, int(failing), "" if failing else text)

    monkeypatch.setattr(studies.subprocess, "run", run)
    assert verify.main(["--studies", "--out", str(tmp_path)]) == int(fails)
    shown = capsys.readouterr().out
    assert ("study blind: exit status 1, no result" in shown) is fails
    assert shown.count("0 of 1 seen; not: a − b (level)") == len(STUDIES) - int(fails)
    assert (
        list(json.loads((tmp_path / "studies" / "studies.json").read_text())["results"]) == list(STUDIES)[int(fails) :]
    )
    with pytest.raises(SystemExit):
        verify.main(["--studies", "--only", "juggling", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("given", "ran"),
    [
        ((), ["perpo", "blind", "gaze"]),
        (("--demos",), ["perpo"]),
        (("--studies",), ["blind", "gaze"]),
        (("--family", "llava"), ["perpo"]),
        (("--only", "gaze"), ["gaze"]),
    ],
)
@pytest.mark.parametrize("failing", ["", "perpo", "gaze"])
def test_verify_runs_demos_and_then_studies_or_one_of_the_two(
    given: tuple[str, ...], ran: list[str], failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def run(name: str) -> dict[str, Any]:
        seen.append(name)
        if name == failing:
            raise RuntimeError("exit status 2, no result")
        return result(name)

    demo = {"before": 0.1, "after": 0.2, "greedy_before": 0.1, "greedy_after": 0.2, "seconds": 1.0, "metric": "iou"}
    shown = demo | {"method": "perpo", "task": None, "seed": 0, "unseen": {"n": 4, "changes": {}}}
    monkeypatch.setattr(verify, "jobs", lambda family: [("perpo", None)])
    monkeypatch.setattr(verify, "run_demo", lambda method, *rest: run(method) and shown)
    monkeypatch.setattr(verify, "broken_claims", lambda results: [])
    monkeypatch.setattr("fastrl.studies.STUDIES", ("blind", "gaze"))
    monkeypatch.setattr(studies, "run_quick", lambda name, out, processes: run(name))
    monkeypatch.setattr(verify, "RESULTS", tmp_path / "verify.json")
    assert verify.main([*given, "--out", str(tmp_path), "--seeds", "0"]) == int(failing in ran)
    assert seen == ran


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--demos", "--studies"), "not allowed with argument"),
        (("--studies", "--family", "llava"), "--family is for demos"),
        (("--studies", "--json", "x.json"), "--json is for demos"),
        (("--only", "gaze", "--json", "x.json"), "--json is for demos"),  # no demo has this in its name
    ],
)
def test_what_is_for_the_other_part_is_refused(
    given: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        verify.main([*given, "--out", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_output_without_a_result_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        studies.subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, 0, "a table\n")
    )
    with pytest.raises(RuntimeError, match="exit status 0, no result"):
        run_quick("blind", tmp_path)
