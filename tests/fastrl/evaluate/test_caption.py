"""Caption metrics against manual counts, and on real captions of COCO and of five models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrl.data import DataError, load_data
from fastrl.data.records import Record, question
from fastrl.evaluate import evaluate


def scene(text: str, objects: list[str], attributes: list[list[str]], relations: list[list[str]], name: str) -> Record:
    target = {"references": [text], "objects": objects, "attributes": attributes, "relations": relations}
    return Record(name, "caption", (), question("caption"), target)


def test_metrics_against_a_hand_count() -> None:
    two = scene(
        "A large red circle. A small blue square below the red circle.",
        ["circle", "square"],
        [["circle", "large"], ["circle", "red"], ["square", "small"], ["square", "blue"]],
        [["square", "below", "circle"]],
        "two",
    )
    one = scene("A small red star.", ["star"], [["star", "small"], ["star", "red"]], [], "one")
    answers = ["A large red circle. A small green square below the red circle.", "A small red star."]
    metrics = evaluate("caption", [two, one], answers)
    assert metrics["object_f1"] == 1.0
    assert metrics["attribute_precision"] == pytest.approx((3 / 4 + 1) / 2)
    assert metrics["relation_f1"] == 1.0  # of the only record with relations
    assert metrics["score"] == pytest.approx(((5 + 2 * 3 / 4 + 2) / 9 + 1) / 2)
    assert metrics["false_facts"] == pytest.approx(1 / (2 + 4 + 1 + 1 + 2))
    assert metrics["false_captions"] == 0.5
    assert metrics["chair_i"] == metrics["chair_s"] == 0.0
    wrong = evaluate("caption", [two, one], ["A large red circle. A blue star.", "no idea, "])
    assert wrong["chair_i"] == pytest.approx(1 / 2)  # a star of a circle and a star; "no" negates a mention
    assert wrong["unparsable"] == 1


def test_true_captions_of_scenes_are_perfect() -> None:
    records = load_data("scenes:caption?n=40&seed=2")
    metrics = evaluate("caption", records, [r.target["references"][0] for r in records])
    assert metrics["score"] == metrics["fact_f1"] == 1.0
    assert metrics["false_facts"] == metrics["chair_i"] == metrics["unparsable"] == 0


def test_captions_of_coco_load_and_score(data_dir: Path) -> None:
    coco = data_dir / "coco"
    data = load_data(f"captions:{coco / 'captions.json'}?instances={coco / 'instances.json'}&images={coco / 'images'}")
    assert len(data) == 47
    assert sum("objects" in record.target for record in data) > 40
    own = evaluate("caption", data, [r.target["references"][0] for r in data])
    shifted = [data[(i + 7) % len(data)].target["references"][0] for i in range(len(data))]
    other = evaluate("caption", data, shifted)
    assert own["score"] > other["score"] + 0.2
    assert own["chair_s"] == 0.0 < other["chair_s"]


def test_model_captions_score_below_a_held_out_human_one(data_dir: Path) -> None:
    data = load_data(f"captions:{data_dir / 'text' / 'pope_model_captions.jsonl'}?images=none")
    rows = [json.loads(line) for line in (data_dir / "text" / "pope_model_captions.jsonl").open()]
    rows = [row for row in rows if row["human_captions"]]
    assert len(data) == len(rows)
    assert data.skipped == 41 - len(rows)
    message = [next(c["caption"] for c in row["model_captions"] if c["model"] == "minigpt-4") for row in rows]
    human = evaluate("caption", data, [row["human_captions"][0] for row in rows])
    model = evaluate("caption", data, message)
    assert human["chair_i"] < model["chair_i"]
    assert human["object_precision"] > model["object_precision"]


def test_bad_caption_rows_are_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    rows = [
        {"id": "a", "references": ["A dog."]},
        {"id": "b", "references": []},
        {"id": "c"},
        {"id": "d", "references": [3]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as error:
        load_data(f"captions:{file}?images=none")
    assert len(error.value.problems) == 2
    assert ":3:" in str(error.value)
    assert load_data(f"captions:{file}?images=none", skip_bad=True).reasons == {
        "missing field": 1, "wrong type": 1, "no references": 1,
    }  # fmt: skip
