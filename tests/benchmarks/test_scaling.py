"""The growth of a step: its points, exponents, named operators, figure and command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling
from benchmarks.versus.model import load_processor


def point(axis: str, value: int, seconds: float, **operators: int) -> dict[str, Any]:
    spread = {"q1": seconds, "median": seconds, "q3": seconds}
    flops = sum(operators.values())
    row = {"axis": axis, "value": value, "seconds": spread, "step_bytes": value << 20, "flops": flops}
    return row | {"flops_by_operator": operators}


def test_growth_names_what_grows_faster() -> None:
    rows = [point("prompt", 1, 9.0, mm=10), point("prompt", 10, 1.0, mm=100, attention=10, tiny=1)]
    rows.append(point("prompt", 20, 4.0, mm=200, attention=40, tiny=4, new=50))
    found = scaling.growth(rows)
    assert found["time"] == pytest.approx(2)
    assert found["memory"] == pytest.approx(1)
    assert found["faster"]["attention"] == pytest.approx({"exponent": 2.0, "share": 40 / 294})
    assert set(found["faster"]) == {"attention", "tiny"}  # a new operator has no exponent
    assert "attention (2.00, 13.6 % of the FLOPs)" in scaling.summary("prompt", rows)
    steady = [point("group", 2, 1.0, mm=10), point("group", 4, 2.0, mm=20)]
    assert scaling.summary("group", steady).endswith("faster: nothing")


@pytest.mark.parametrize("axis", scaling.AXES)
def test_every_point_is_a_step_that_can_be_made(axis: str, tmp_path: Path) -> None:
    from fastrl.models.open import resolve_model

    tokenizer = load_processor(resolve_model("tiny:perception")).tokenizer
    for value in scaling.AXES[axis]:
        work, vocabulary = scaling.work_of(axis, value)
        (record,) = scaling.make_records(work, 1, tmp_path / f"{value}", tokenizer)
        assert len(record.images) == work.pictures
        assert vocabulary >= len(tokenizer) or axis != "vocabulary"
        assert value in {work.group, work.prompt, work.answer, work.pictures, vocabulary}


@pytest.mark.gate
def test_command_measures_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.json"
    arguments = ["--only", "group", "--largest", "4", "--rounds", "1", "--json", str(target)]
    assert scaling.main(arguments) == 0
    written = json.loads(target.read_text())
    assert [row["value"] for row in written["points"]] == [2, 4]
    two, four = written["points"]
    assert two["flops"] < four["flops"] == sum(four["flops_by_operator"].values())
    assert four["step_bytes"] > 0
    assert four["seconds"]["median"] > 0
    assert 0 < written["growth"]["group"]["flops"] < 1  # the prompt's part does not grow
    assert target.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "exponents: time" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--threads", "0"], ["--only", "colour"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scaling.main(arguments)
    assert arguments[0] in capsys.readouterr().err
