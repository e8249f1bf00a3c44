"""COCO average precision: the truth scores 1, equality with pycocotools, order, frames, labels."""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastrl.answers import View, format_answer
from fastrl.data import load_data
from fastrl.data.records import Record
from fastrl.evaluate import evaluate, load_predictions
from fastrl.evaluate.coco import COCO_2017

NAMES = ["cat", "dog", "hot dog"]
CLEAN = dict.fromkeys(("unparsable", "dropped", "unlabelled", "unknown_label"), 0)


def record(name: str, boxes: Sequence[Sequence[float]], labels: Sequence[str], **fields: Any) -> Record:
    target = {"boxes": boxes, "labels": labels, "crowd": [False] * len(boxes), "categories": NAMES}
    return Record(name, "detection", (), (), target, **{"frame": "original", **fields})


def answer(boxes: Sequence[Sequence[float]], labels: Sequence[str]) -> str:
    return json.dumps([{"bbox_2d": list(b), "label": name} for b, name in zip(boxes, labels, strict=True)])


@pytest.fixture(scope="module")
def real(data_dir: Path) -> list[Record]:
    return list(load_data(f"coco:{data_dir}/coco/instances.json?images={data_dir}/coco/images"))


def test_truth_as_prediction_scores_one_on_real_coco_with_crowds(real: list[Record]) -> None:
    assert sum(any(r.target["crowd"]) for r in real) > 0
    records = [replace(r, frame="original") for r in real]
    without_crowd = [
        answer([b for b, c in zip(r.target["boxes"], r.target["crowd"], strict=True) if not c], names)
        for r in records
        for names in [[n for n, c in zip(r.target["labels"], r.target["crowd"], strict=True) if not c]]
    ]
    perfect = {"AP": 1.0, "AP50": 1.0, "AP75": 1.0, "n": len(real), **CLEAN}
    assert evaluate("detection", records, without_crowd) == pytest.approx(perfect)
    with_crowd = [answer(r.target["boxes"], r.target["labels"]) for r in records]
    assert evaluate("detection", records, with_crowd) == pytest.approx(perfect)  # boxes in a crowd are ignored


def noisy_results(data_dir: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """COCO results: jittered truths with distinct scores; some removed, some with another label, some added."""
    truth = json.loads((data_dir / "coco" / "instances.json").read_text())
    rng = random.Random(0)
    ids = [c["id"] for c in truth["categories"]]
    results = []
    for a in truth["annotations"]:
        if rng.random() < 0.2:
            continue
        box = [v + rng.uniform(-0.1, 0.1) * a["bbox"][2 + i % 2] for i, v in enumerate(a["bbox"])]
        category = a["category_id"] if rng.random() < 0.9 else rng.choice(ids)
        results.append({"image_id": a["image_id"], "category_id": category, "bbox": box, "score": rng.random()})
    return results, truth


def test_average_precision_equals_pycocotools_on_the_same_files(
    data_dir: Path, real: list[Record], tmp_path: Path
) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results, truth = noisy_results(data_dir)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(data_dir / "coco" / "instances.json"))
        scored = COCOeval(gt, gt.loadRes(str(path)), "bbox")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    got = evaluate("detection", *load_predictions(path, real))
    assert 0.1 < got["AP"] < 0.9
    assert [got["AP"], got["AP50"], got["AP75"]] == pytest.approx(np.array(scored.stats[:3]).tolist(), abs=1e-9)
    assert len(truth["images"]) == got["n"]


def test_order_of_records_and_of_the_file_changes_nothing(data_dir: Path, real: list[Record], tmp_path: Path) -> None:
    results, _ = noisy_results(data_dir)
    path, shuffled_path = tmp_path / "a.json", tmp_path / "b.json"
    path.write_text(json.dumps(results))
    shuffled_path.write_text(json.dumps(random.Random(1).sample(results, len(results))))
    want = evaluate("detection", *load_predictions(path, real))
    assert evaluate("detection", *load_predictions(shuffled_path, real)) == pytest.approx(want, abs=1e-12)

    untied = [json.loads(a) for a in load_predictions(path, real).answers]
    tied = [json.dumps([{k: v for k, v in item.items() if k != "score"} for item in items]) for items in untied]
    order = random.Random(2).sample(range(len(real)), len(real))
    plain = [replace(r, frame="original") for r in real]
    for records in (plain, [replace(r, id=f"image {r.id}") for r in plain]):
        straight = evaluate("detection", records, tied)
        assert evaluate("detection", [records[i] for i in order], [tied[i] for i in order]) == straight
        assert 0.0 < straight["AP"] < 1.0


@pytest.mark.parametrize("style", ["qwen2_5", "qwen2"])
def test_boxes_are_brought_back_to_original_pixels(style: str) -> None:
    view = View(1000, 500, 504, 252)
    row = record("1", [[100.0, 50.0, 500.0, 250.0], [0.0, 0.0, 1000.0, 500.0]], ["cat", "hot dog"], views=(view,))
    row = replace(row, frame="resized" if style == "qwen2_5" else "thousand")
    got = evaluate("detection", [row], [format_answer("detection", row.target, style, view)])
    assert got["AP"] == pytest.approx(1.0)
    assert (
        evaluate("detection", [replace(row, frame="original")], [answer([[50, 25, 252, 126]] * 2, NAMES[:2])])["AP"]
        == 0.0
    )


def test_labels_outside_the_set_are_dropped_not_counted_against() -> None:
    row = record("1", [[0, 0, 10, 10]], ["cat"])
    extra = answer([[0, 0, 10, 10], [50, 50, 60, 60]], ["unicorn", "Cat "])
    only = answer([[50, 50, 60, 60]], ["cat"])
    got = evaluate("detection", [row], [extra])
    assert {**got, "unknown_label": 0} == evaluate("detection", [row], [only])
    assert got["unknown_label"] == 1
    assert evaluate("detection", [row], [answer([[0, 0, 10, 10]] * 2, ["unicorn", "CAT"])])["AP"] == pytest.approx(1.0)


def test_scores_rank_and_default_to_one() -> None:
    row = record("1", [[0, 0, 10, 10]], ["cat"])
    wrong, right = {"bbox_2d": [50, 50, 60, 60], "label": "cat"}, {"bbox_2d": [0, 0, 10, 10], "label": "cat"}
    first = evaluate("detection", [row], [json.dumps([{**wrong, "score": 0.1}, {**right, "score": 0.9}])])
    assert first["AP"] == pytest.approx(1.0)
    unscored = evaluate("detection", [row], [json.dumps([wrong, {**right, "score": 0.9}])])
    assert unscored["AP"] == pytest.approx(0.5)


def test_unparsable_and_inverted_answers_find_nothing() -> None:
    rows = [record(str(i), [[0, 0, 10, 10]], ["cat"]) for i in range(4)]
    answers = ["no idea", "[]", answer([[10, 10, 0, 0]], ["cat"]), answer([[0, 0, 10, 10]], ["cat"])]
    got = evaluate("detection", rows, answers)
    assert (got["n"], got["unparsable"]) == (4, 1)
    assert 0.0 < got["AP"] < 0.3
    nothing = evaluate("detection", rows[:1], ["x"])
    assert nothing == {"AP": 0.0, "AP50": 0.0, "AP75": 0.0, "n": 1, **CLEAN, "unparsable": 1}


def test_an_ap_of_nothing_explains_itself() -> None:
    row = record("1", [[0, 0, 10, 10]], ["cat"])
    items = [{"bbox_2d": [0, 0, 10, 10], "class_id": 3}, {"bbox_2d": [0, 0, 10, 10], "class": "unicorn"}]
    got = evaluate("detection", [row], [json.dumps([*items, {"bbox_2d": [1, 2]}])])
    assert got == {"AP": 0.0, "AP50": 0.0, "AP75": 0.0, "n": 1, "unparsable": 0, "dropped": 1, "unlabelled": 1,
                   "unknown_label": 1}  # fmt: skip
    read = json.dumps([{"BBox": [0, 0, 10, 10], "Class_Name": "Cat", "Confidence": 0.5}])
    assert evaluate("detection", [row], [read])["AP"] == pytest.approx(1.0)


def test_ap_is_not_defined_without_objects() -> None:
    got = evaluate("detection", [record("1", [], [])], ["[]"])
    assert (got["AP"], got["AP50"], got["AP75"]) == (None, None, None)
    assert json.loads(json.dumps(got))["AP"] is None


def test_canonically_equal_labels_are_equal() -> None:
    row = replace(record("1", [[0, 0, 10, 10]], ["caf\u00e9"]), target={"boxes": [[0, 0, 10, 10]],
                  "labels": ["caf\u00e9"], "crowd": [False], "categories": ["caf\u00e9"]})  # fmt: skip
    assert evaluate("detection", [row], [answer([[0, 0, 10, 10]], ["cafe\u0301"])])["AP"] == pytest.approx(1.0)


def test_duplicate_records_are_refused() -> None:
    with pytest.raises(ValueError, match="two records have the id '1'"):
        evaluate("detection", [record("1", [], [])] * 2, ["[]"] * 2)


def test_the_table_of_coco_ids_equals_the_real_file(data_dir: Path) -> None:
    truth = json.loads((data_dir / "coco" / "instances.json").read_text())
    assert {c["id"]: c["name"] for c in truth["categories"]} == COCO_2017
