"""Trajectory evaluation: small clips by hand, against py-motmetrics called directly, and on real data."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from fastrl.answers import Track, View, format_answer, format_tracks
from fastrl.data import load_data
from fastrl.data.records import Record
from fastrl.evaluate import evaluate, load_predictions
from fastrl.evaluate.run import run_evaluation
from fastrl.evaluate.trajectory import trajectory_ious

Box = tuple[float, float, float, float]
LEFT: dict[int, Box] = {t: (10.0 * t, 0.0, 10.0 * t + 20, 20.0) for t in range(1, 5)}
RIGHT: dict[int, Box] = {t: (200.0 - 10 * t, 100.0, 220.0 - 10 * t, 120.0) for t in range(1, 5)}


def record(*tracks: tuple[str, dict[int, Box]], name: str = "a", **more: Any) -> Record:
    listed = [{"id": 7 * n, "name": who, "boxes": boxes} for n, (who, boxes) in enumerate(tracks, start=1)]
    target = {"tracks": listed, "frames": 4, "size": [500, 250]}
    return Record(name, "trajectory", (), (), target, **{"frame": "original", **more})


def answer(*tracks: tuple[str, dict[int, Box]], view: View | None = None) -> str:
    return format_tracks([Track(n, who, boxes) for n, (who, boxes) in enumerate(tracks, start=1)], view)


TWO = record(("cat", LEFT), ("dog", RIGHT))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (answer(("cat", LEFT), ("dog", RIGHT)), {"mean_iou": 1, "recall@0.5": 1, "identity_accuracy": 1, "mota": 1}),
        (answer(("dog", RIGHT), ("cat", LEFT)), {"mean_iou": 1, "identity_accuracy": 1, "idf1": 1, "mota": 1}),
        (answer(("cat", LEFT)), {"mean_iou": 0.5, "recall@0.5": 0.5, "identity_accuracy": 1, "mota": 0.5}),
        (answer(("bird", LEFT), ("dog", RIGHT)), {"mean_iou": 1, "identity_accuracy": 0.5, "idf1": 1}),
        (answer(("cat", {1: LEFT[1]})), {"mean_iou": 0.125, "recall@0.5": 0.125, "identity_accuracy": 1}),
        # identities exchanged half-way: every box matches, half of them with the wrong track, one switch each
        (
            answer(("cat", {**LEFT, 3: RIGHT[3], 4: RIGHT[4]}), ("dog", {**RIGHT, 3: LEFT[3], 4: LEFT[4]})),
            {"mean_iou": 0.5, "recall@0.5": 0.5, "identity_accuracy": 0.5, "idf1": 0.5, "mota": 0.75},
        ),
        (
            answer(("cat", LEFT), ("dog", RIGHT), ("cow", {2: (300.0, 0.0, 310.0, 10.0), 9: (0.0, 0.0, 9.0, 9.0)})),
            {"mean_iou": 1, "recall@0.5": 1, "mota": 0.75},
        ),
        ("I see nothing.", {"mean_iou": 0, "recall@0.5": 0, "identity_accuracy": 0, "mota": 0, "unparsable": 1}),
    ],
)
def test_metrics_by_hand(message: str, expected: dict[str, float]) -> None:
    metrics = evaluate("trajectory", [TWO], [message])
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert trajectory_ious([TWO], [message]) == pytest.approx([metrics["mean_iou"]])
    assert metrics["n"] == 1


def test_iou_counts_every_frame_of_the_truth_and_averages_over_tracks() -> None:
    long = record(("cat", dict.fromkeys(range(1, 5), LEFT[1])), name="b")
    half = answer(("cat", dict.fromkeys((1, 2), (10.0, 0.0, 20.0, 20.0))))  # IoU 1/2 in two frames of four
    answers = [answer(("cat", LEFT), ("dog", RIGHT)), half]
    metrics = evaluate("trajectory", [TWO, long], answers)
    assert metrics["mean_iou"] == pytest.approx((1 + 1 + 0.25) / 3)
    assert trajectory_ious([TWO, long], answers) == pytest.approx([1, 0.25])  # of each record
    assert metrics["recall@0.5"] == pytest.approx((8 + 2) / 12)


def distance(a: Box, b: Box) -> float:
    """1 − IoU, NaN from 0.5 on: the matrix that py-motmetrics' own helper makes under NumPy 1."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0.0) * max(h, 0.0)
    iou = inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)
    return 1 - iou if iou >= 0.5 else math.nan


def test_mota_and_idf1_are_those_of_motmetrics_fed_by_hand() -> None:
    motmetrics = pytest.importorskip("motmetrics")
    found = [{**LEFT, 3: (34.0, 2.0, 54.0, 22.0)}, {t: b for t, b in RIGHT.items() if t != 2} | {4: LEFT[4]}]
    clip = motmetrics.MOTAccumulator()
    for t in range(1, 5):
        rows = [[(n, boxes[t]) for n, boxes in enumerate(side) if t in boxes] for side in ([LEFT, RIGHT], found)]
        costs = [[distance(a, b) for _, b in rows[1]] for _, a in rows[0]]
        clip.update([n for n, _ in rows[0]], [n for n, _ in rows[1]], costs, frameid=t)
    wanted = motmetrics.metrics.create().compute(clip, metrics=["mota", "idf1"])
    metrics = evaluate("trajectory", [TWO], [answer(*zip(("cat", "dog"), found, strict=True))])
    assert metrics["mota"] == pytest.approx(float(wanted["mota"].iloc[0]))
    assert metrics["idf1"] == pytest.approx(float(wanted["idf1"].iloc[0]))


def test_without_motmetrics_its_metrics_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "motmetrics", None)
    assert set(evaluate("trajectory", [TWO], [""])) == {
        "mean_iou",
        "recall@0.5",
        "identity_accuracy",
        "n",
        "unparsable",
    }


@pytest.mark.parametrize("frame", ["auto", "thousand", "original", "resized"])
def test_frames_of_prediction_files(tmp_path: Path, frame: str) -> None:
    row = record(("cat", LEFT), frame="auto", views=(View(500, 250, 250, 125),))
    shrunk = {t: tuple(v / 2 for v in box) for t, box in LEFT.items()}
    message = {
        "original": answer(("cat", LEFT)),
        "resized": answer(("cat", shrunk)),  # type: ignore[arg-type]
    }.get(frame, answer(("cat", LEFT), view=row.views[0]))
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": "a", "answer": message}))
    assert evaluate("trajectory", *load_predictions(path, [row], frame=frame))["mean_iou"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "spec",
    ["mot:{}/video/pets09_s2l1_a?window=10", "sav:{}/video/sav_000001/sav_000001_manual.json"],
    ids=["pedestrians", "mask tracks"],
)
def test_the_truth_written_as_an_answer_scores_one_on_real_clips(spec: str, data_dir: Path, tmp_path: Path) -> None:
    rows = load_data(spec.format(data_dir))
    path = tmp_path / "p.jsonl"
    with path.open("w") as file:
        for row in rows:
            message = format_answer("trajectory", row.target, view=View.unresized(*row.target["size"]))
            file.write(json.dumps({"id": row.id, "answer": message}) + "\n")
    metrics = run_evaluation("trajectory", spec.format(data_dir), predictions=path)
    assert metrics["mean_iou"] > 0.97
    assert metrics["recall@0.5"] == metrics["identity_accuracy"] == 1.0
    if "mota" in metrics:
        assert metrics["mota"] == metrics["idf1"] == 1.0


def test_a_model_is_evaluated_and_answers_in_0_to_1000_whatever_its_family(tiny_folder: Any) -> None:
    metrics = run_evaluation(
        "trajectory", "scenes:trajectory?n=2&size=56&frames=2", model=str(tiny_folder("qwen2_5")), max_new_tokens=8
    )
    assert metrics["n"] == 2
    assert metrics["unparsable"] == 2


def test_an_encoded_trajectory_record_expects_0_to_1000(tiny_folder: Any) -> None:
    from fastrl.models.load import load_policy

    row = load_data("scenes:trajectory?n=1&frames=2")[0]
    _, seen = load_policy(tiny_folder("qwen2_5")).encode(row)
    assert seen.frame == "thousand"
    assert (
        evaluate("trajectory", [seen], [format_answer("trajectory", row.target, view=seen.views[0])])["mean_iou"] > 0.97
    )
