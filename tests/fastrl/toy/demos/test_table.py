"""The tables that demos print fit a terminal of 80 columns, including titles."""

from __future__ import annotations

import re

import pytest

from fastrl.toy.demos import perception_r1, perpo, reper, utr
from fastrl.toy.demos.table import WIDTH

COUNTED = perception_r1.compared("counting")
CHANGE = {"before": 0.768, "after": 0.848, "change": 0.08, "low": -0.012, "high": 0.123}
UNSEEN = {"n": 256, "changes": {c.name: CHANGE for c in (*perpo.COMPARED, *reper.COMPARED, *utr.COMPARED, *COUNTED)}}
COMMON = {
    "unseen": UNSEEN,
    "held_out": 512,
    "steps": 60,
    "seconds": 4321.0,
    "out": "runs/demo",
    "lists": 1024,
    "dialogues": 1024,
}
BEFORE_AFTER = {f"{how}{when}": 0.6179 for how in ("", "greedy_") for when in ("before", "after")}
BESIDE = {
    f"{how}{name}_{when}": value
    for how in ("", "greedy_")
    for when in ("before", "after")
    for name, value in (("distance", 0.1234), ("points", 0.6179), ("unmatched", 1024))
}
TURN = {"score": 0.768, "false_captions": 0.738, "chair_i": 0.123}
LISTS = {f"{how}_{key}": 0.295 for how in ("sampled", "greedy") for key in ("mean_iou", "acc@0.5")}
CLIPS = {"mean_iou": 0.299, "greedy_mean_iou": 0.299, "greedy_recall@0.5": 0.5, "tpl": 0.277}
SHOWN = {
    "counting": (
        perception_r1.print_table,
        {"method": "perception-r1", "task": "counting", "metric": "exact", **BEFORE_AFTER, **BESIDE},
    ),
    "grounding": (
        perception_r1.print_table,
        {"method": "perception-r1", "task": "grounding", "metric": "iou", **BEFORE_AFTER},
    ),
    "perpo": (perpo.print_table, {"models": dict.fromkeys(("start", "sft", "dpo", "perpo"), LISTS)}),
    "reper": (reper.print_table, {"turns_before": [TURN] * 3, "turns_after": [TURN] * 3}),
    "utr": (utr.print_table, {"models": dict.fromkeys(("start", "hack", "utr"), CLIPS)}),
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_table_fits(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    show, values = SHOWN[name]
    show({**COMMON, **values})
    lines = capsys.readouterr().out.splitlines()
    assert "held-out" in lines[0]  # the title is one line
    assert max(map(len, lines)) <= WIDTH
    numbers = [re.findall(r"[+-]?\d\.\d{3}\b", line) for line in lines[1:]]
    assert sum(map(len, numbers)) >= 6
    assert [line for line in lines if "…" in line] == []


def test_a_score_that_no_answer_has_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    show, values = SHOWN["counting"]
    show({**COMMON, **values, "distance_before": None})
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "(temperature 1), distance" in line)
    assert line.split()[-3:] == ["–", "0.123", "–"]
