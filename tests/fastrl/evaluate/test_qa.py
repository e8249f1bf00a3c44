"""Question answering: manual examples, real files with predictions, and a model with pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastrl.data import load_data
from fastrl.data.records import Record
from fastrl.evaluate import evaluate
from fastrl.evaluate.run import run_evaluation


def ask(answer: Any, **target: Any) -> Record:
    return Record(str(answer), "qa", (), (), {"answer": answer, **target})


def test_yes_and_no_by_hand() -> None:
    rows = [ask("yes"), ask("yes"), ask("yes"), ask("no"), ask("no"), ask("no")]
    # hit, miss, unparsable (a miss), false alarm, correct, unparsable (wrong, but not a yes)
    metrics = evaluate("qa", rows, ["Yes.", "no", "a dog", "yes", "No, there is none.", ""])
    assert metrics == pytest.approx(
        {
            "accuracy": 2 / 6,
            "precision": 1 / 2,
            "recall": 1 / 3,
            "f1": 2 / 5,
            "yes_rate": 2 / 6,
            "n": 6,
            "unparsable": 2,
        }
    )


def test_always_yes_is_half_right_on_a_balanced_set_and_its_rate_shows_it() -> None:
    metrics = evaluate("qa", [ask("yes"), ask("no")], ["yes", "yes"])
    assert (metrics["accuracy"], metrics["recall"], metrics["precision"], metrics["yes_rate"]) == (0.5, 1.0, 0.5, 1.0)
    nothing = evaluate("qa", [ask("no")], ["no"])
    assert (nothing["accuracy"], nothing["f1"]) == (1.0, 0.0)


def test_choices_by_type() -> None:
    options = ["red", "green", "blue"]
    rows = [ask(n % 3, choices=options, type=kind) for n, kind in enumerate(["CW", "CW", "CH", "TN", "TN"])]
    metrics = evaluate("qa", rows, ["A", "the green one", "green", "(A)", "none of them"])
    assert metrics == pytest.approx(
        {
            "accuracy": 3 / 5,
            "accuracy_C": 2 / 3,
            "accuracy_CH": 0.0,
            "accuracy_CW": 1.0,
            "accuracy_TN": 0.5,
            "n": 5,
            "unparsable": 1,
        }
    )


def predictions(folder: Path, rows: Any, message: Callable[[Record], str]) -> Path:
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps({"id": r.id, "answer": message(r)}) + "\n" for r in rows))
    return path


def test_next_qa_from_a_file_of_answers(data_dir: Path, tmp_path: Path) -> None:
    spec = f"nextqa:{data_dir}/video/nextqa/val_sample.csv"
    rows = load_data(spec)
    right = predictions(tmp_path, rows, lambda r: f"{'ABCDE'[r.target['answer']]}.")
    metrics = run_evaluation("qa", spec, predictions=right)
    assert metrics["accuracy"] == metrics["accuracy_C"] == metrics["accuracy_T"] == metrics["accuracy_D"] == 1.0
    assert (metrics["n"], metrics["unparsable"]) == (186, 0)
    # option texts are accepted, except where a question has the same option twice
    words = predictions(tmp_path, rows, lambda r: f"It is {r.target['choices'][r.target['answer']]}.")
    assert run_evaluation("qa", spec, predictions=words)["accuracy"] > 0.97
    first = predictions(tmp_path, rows, lambda r: "A")
    share = sum(r.target["answer"] == 0 for r in rows) / len(rows)
    assert run_evaluation("qa", spec, predictions=first)["accuracy"] == pytest.approx(share)


def test_pope_from_a_file_of_answers(data_dir: Path, tmp_path: Path) -> None:
    spec = f"pope:{data_dir}/text/pope_coco_adversarial.jsonl"
    rows = load_data(spec)
    right = predictions(tmp_path, rows, lambda r: r.target["answer"].capitalize() + ".")
    metrics = run_evaluation("qa", spec, predictions=right)
    assert [metrics[k] for k in ("accuracy", "precision", "recall", "f1", "yes_rate")] == [1.0, 1.0, 1.0, 1.0, 0.5]
    always = predictions(tmp_path, rows, lambda r: "Yes, it is there.")
    assert run_evaluation("qa", spec, predictions=always)["f1"] == pytest.approx(2 / 3)


def test_a_model_needs_the_pictures(data_dir: Path, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = str(tiny_folder("qwen2_5"))
    with pytest.raises(ValueError, match="questions come without pictures: give images= or videos="):
        run_evaluation("qa", f"pope:{data_dir}/text/pope_coco_random.jsonl", model=model)
    Image.new("RGB", (56, 56)).save(tmp_path / "a.jpg")
    file = tmp_path / "p.jsonl"
    file.write_text('{"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "no"}\n')
    metrics = run_evaluation("qa", f"pope:{file}?images={tmp_path}", model=model, max_new_tokens=4)
    assert metrics["n"] == 1


@pytest.mark.parametrize("target", [{}, {"answer": "a dog"}, {"answer": 3, "choices": ["a", "b"]}])
def test_truth_of_another_kind_is_refused(target: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="choices with the place of the right one"):
        evaluate("qa", [Record("a", "qa", (), (), target)], ["yes"])
