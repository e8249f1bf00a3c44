"""Accuracies over groups of questions, by hand and against the published definitions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastrl.data import Dataset, load_data
from fastrl.data.records import Record
from fastrl.evaluate import evaluate
from fastrl.evaluate.best import direction
from fastrl.evaluate.groups import MME


def ask(answer: Any, **target: Any) -> Record:
    return Record(str(answer), "qa", (), (), {"answer": answer, **target})


def hallusion(folder: Path, *asked: tuple[str, int, int, str]) -> Dataset:
    """(category, figure, question, truth) as HallusionBench's rows."""
    rows = [
        {
            "category": category,
            "subcategory": "chart",
            "visual_input": str(int(not (category == "VS" and figure == 0))),
            "set_id": "0",
            "figure_id": str(figure),
            "question_id": str(number),
            "question": "Is it?",
            "gt_answer": truth,
        }
        for category, figure, number, truth in asked
    ]
    (folder / "h.json").write_text(json.dumps(rows))
    return load_data(f"hallusion:{folder}/h.json", skip_bad=True)


def test_hallusion_bench_s_three_accuracies(tmp_path: Path) -> None:
    asked = [("VD", 0, 0, "1"), ("VD", 0, 1, "1"), ("VD", 1, 0, "0"), ("VD", 1, 1, "0")]
    asked += [("VS", 0, 0, "1"), ("VS", 1, 0, "1")]
    answers = ["yes", "no", "no", "no", "I am not sure.", "yes"]
    metrics = evaluate("qa", hallusion(tmp_path, *asked), answers)
    assert metrics["accuracy"] == 5 / 6  # not to know is right where there is no figure
    assert metrics["figure_accuracy"] == 2 / 3  # of VD 0 (wrong), VD 1, VS 1; VS 0 is none
    assert metrics["pair_accuracy"] == 2 / 3  # of VD 0, VD 1 (wrong), VS 0
    assert metrics["accuracy_VD"] == 3 / 4
    assert metrics["accuracy_VS"] == 1.0
    assert "accuracy_V" not in metrics  # only NExT-QA's types share letters
    worse = evaluate("qa", hallusion(tmp_path, *asked), [*answers[:5], "I am not sure."])
    assert (worse["figure_accuracy"], worse["pair_accuracy"]) == (1 / 3, 1 / 3)  # where there is one, it is wrong


def test_mme_by_hand() -> None:
    def pair(category: str, name: str) -> list[Record]:
        return [ask(t, type=category, groups={"mme": f"{category}/{name}"}) for t in ("yes", "no")]

    rows = [*pair("color", "1"), *pair("color", "2"), *pair("count", "1"), *pair("code_reasoning", "1")]
    answers = ["yes", "no", "yes", "yes", "yes", "", "no", "yes"]  # color: 3 of 4 and 1 of 2 pictures; count: 1 of 2
    metrics = evaluate("qa", rows, answers)
    assert metrics["accuracy"] == 4 / 8
    assert metrics["accuracy_plus"] == 1 / 4
    assert (metrics["accuracy_color"], metrics["accuracy_plus_color"], metrics["score_color"]) == (0.75, 0.5, 125.0)
    assert (metrics["score_count"], metrics["score_code_reasoning"]) == (50.0, 0.0)
    assert metrics["score_perception"] == 175.0
    assert metrics["score_cognition"] == 0.0
    assert "accuracy_c" not in metrics
    assert {direction(name) for name in metrics if name not in ("n", "yes_rate", "unparsable")} == {"max"}


def test_the_best_scores_are_the_published_ones() -> None:
    rows = [
        ask(truth, type=name, groups={"mme": f"{name}/1"})
        for names in MME.values()
        for name in names
        for truth in ("yes", "no")
    ]
    metrics = evaluate("qa", rows, [row.target["answer"] for row in rows])
    assert (metrics["score_perception"], metrics["score_cognition"]) == (2000.0, 800.0)
    always = evaluate("qa", rows, ["yes"] * len(rows))
    assert (always["accuracy"], always["accuracy_plus"], always["score_perception"]) == (0.5, 0.0, 500.0)


def test_circular_questions_count_once() -> None:
    rows = [ask(n, choices=["a", "b"], groups={"circular": q}) for q in ("x", "y") for n in (0, 1)]
    metrics = evaluate("qa", rows, ["A", "B", "A", "A"])
    assert metrics["accuracy"] == 0.75
    assert metrics["circular_accuracy"] == 0.5
    assert "circular_accuracy" not in evaluate("qa", [ask("yes")], ["yes"])


def hallusion_metrics(folder: Path, options: str = "", *, gone: int | None = None) -> dict[str, Any]:
    """Two figures, two questions about each; all answers are right. ``gone``: a row that cannot be read."""
    hallusion(folder, ("VD", 0, 0, "1"), ("VD", 0, 1, "1"), ("VD", 1, 0, "1"), ("VD", 1, 1, "1"))
    rows = json.loads((folder / "h.json").read_text())
    if gone is not None:
        rows[gone]["gt_answer"] = "maybe"
    (folder / "h.json").write_text(json.dumps(rows))
    data = load_data(f"hallusion:{folder}/h.json{options}", skip_bad=True)
    assert data.skipped == (gone is not None)
    return dict(evaluate("qa", data, ["yes"] * len(data)))


def test_a_group_with_a_missing_question_is_not_right(tmp_path: Path) -> None:
    whole = hallusion_metrics(tmp_path)
    assert (whole["figure_accuracy"], whole["pair_accuracy"], whole["n"]) == (1.0, 1.0, 4)
    assert not [name for name in whole if name.startswith("incomplete")]
    skipped = hallusion_metrics(tmp_path, gone=1)
    assert (skipped["figure_accuracy"], skipped["incomplete_figure"], skipped["n"]) == (1.0, 1, 3)
    limited = hallusion_metrics(tmp_path, "?limit=2")  # all of a figure, of either question a half
    assert (limited["figure_accuracy"], limited["pair_accuracy"]) == (1.0, None)
    assert (limited["incomplete_pair"], limited.get("incomplete_figure")) == (2, None)
    alone = hallusion_metrics(tmp_path, "?limit=1")
    assert (alone["figure_accuracy"], alone["pair_accuracy"], alone["accuracy"]) == (None, None, 1.0)
    shuffled = hallusion_metrics(tmp_path, "?limit=3&seed=1")
    assert (shuffled["incomplete_figure"], shuffled["incomplete_pair"]) == (1, 1)


def test_the_same_bad_question_twice_is_one(tmp_path: Path) -> None:
    data = hallusion(tmp_path, ("VD", 0, 0, "1"), ("VD", 0, 0, "1"), ("VD", 0, 1, "1"))
    metrics = evaluate("qa", data, ["yes", "yes"])
    assert data.reasons == {"duplicate id": 1}
    assert metrics["figure_accuracy"] == 1.0


def test_what_a_limit_parts_is_left_out_of_mme_and_circular_eval(tmp_path: Path) -> None:
    row = {"image": "7.png", "category": "color", "question": "Is it?", "answer": "Yes"}
    rows = [{**row, "question_id": name} for name in ("7", "7", "8", "8")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_data(f"mme:{tmp_path}/m.jsonl?images=none")
    metrics = evaluate("qa", data[:3], ["yes", "no", "yes"])
    assert (metrics["accuracy_plus"], metrics["accuracy_plus_color"], metrics["incomplete_mme"]) == (0.0, 0.0, 1)
    assert metrics["score_color"] == pytest.approx(200 / 3)
    metrics = evaluate("qa", data[:1], ["yes"])
    assert (metrics["accuracy"], metrics["accuracy_plus"]) == (1.0, None)
    assert not [name for name in metrics if name.startswith("score")]
    (tmp_path / "c.json").write_text(json.dumps([{"question": "What?", "options": ["a", "b"], "answer": 0}] * 2))
    data = load_data(f"choice:{tmp_path}/c.json?circular=yes")
    metrics = evaluate("qa", data[:3], ["A", "A", "A"])
    assert (metrics["circular_accuracy"], metrics["incomplete_circular"]) == (0.0, 1)
    assert evaluate("qa", data[1:2], ["B"])["circular_accuracy"] is None
    assert direction("incomplete_circular") is None
