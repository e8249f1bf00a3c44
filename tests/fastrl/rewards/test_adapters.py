"""Rewards under TRL's and verl's calling conventions, and records made of loose columns."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastrl.rewards
from fastrl.rewards import detection_reward, grounding_reward, ocr_reward, reward_for
from fastrl.rewards.adapters import answer_text, compute_score, record_from

GOOD = '[{"bbox_2d": [0, 0, 10, 10]}]'
HALF = '[{"bbox_2d": [0, 0, 10, 5]}]'


def test_trl_convention_with_plain_and_conversational_completions() -> None:
    columns: dict[str, Any] = {
        "prompts": ["p", "p", "q"],
        "box": [[0, 0, 10, 10]] * 3,
        "completion_ids": [[1], [2], [3]],
    }
    assert grounding_reward(completions=[GOOD, HALF, "x"], **columns) == pytest.approx([2.0, 1.5, 0.0])
    chats = [[{"role": "assistant", "content": text}] for text in (GOOD, HALF)]
    chats.append([{"role": "assistant", "content": [{"type": "text", "text": GOOD}]}])
    assert grounding_reward(completions=chats, **columns) == pytest.approx([2.0, 1.5, 2.0])


def test_trl_rows_have_their_own_truth_sizes_and_frames() -> None:
    got = reward_for("grounding", format="none")(
        prompts=["a"] * 3,
        completions=["(0,0),(500,500)"] * 3,
        box=[[0, 0, 320, 240], [0, 0, 500, 500], [0, 0, 320, 240]],
        width=[640, None, 640],
        height=[480, None, 480],
        frame=["thousand", None, "original"],
    )
    assert got == pytest.approx([1.0, 1.0, 320 * 240 / 500**2])


def test_trl_logs_each_component() -> None:
    logged: dict[str, float] = {}
    grounding_reward(
        completions=[GOOD, "x"], box=[[0, 0, 10, 10]] * 2, log_metric=logged.__setitem__, trainer_state=None
    )
    assert logged == {"grounding/iou": 0.5, "grounding/format": 0.5}


def test_verl_convention_gives_score_and_components() -> None:
    call: dict[str, Any] = {"data_source": "refcoco", "solution_str": HALF, "extra_info": {"index": 3}}
    want = {"score": 1.5, "iou": 0.5, "format": 1.0}
    for truth in (
        {"box": [0, 0, 10, 10]},
        json.dumps({"box": [0, 0, 10, 10]}),
        "[0, 0, 10, 10]",
        np.array([0, 0, 10, 10]),
    ):
        assert grounding_reward(ground_truth=truth, **call) == pytest.approx(want)
    squared = grounding_reward(ground_truth=[0, 0, 10, 10], metric="iou_squared", reward_router_address=None, **call)
    assert squared["iou"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="unknown option 'metrc'; did you mean 'metric'"):
        grounding_reward(ground_truth=[0, 0, 10, 10], metrc="iou", **call)


def test_verl_truth_from_parquet_arrays() -> None:
    truth = {"boxes": np.array([np.array([0.0, 0, 10, 10]), np.array([20.0, 20, 30, 30])], dtype=object)}
    truth["labels"] = np.array(["cat", "dog"], dtype=object)
    text = '[{"bbox_2d": [20, 20, 30, 30], "label": "dog"}, {"bbox_2d": [0, 0, 10, 10], "label": "cat"}]'
    got = detection_reward(data_source="coco", solution_str=text, ground_truth=truth, extra_info=None)
    assert got == {"score": 4.0, "location": 1.0, "class": 1.0, "f1": 1.0, "missing": 0.0, "format": 1.0}
    assert ocr_reward(data_source="x", solution_str="[1]", ground_truth="[1]")["score"] == 1.0


def test_compute_score_picks_the_task_and_loads_by_path_as_verl_does() -> None:
    path = Path(fastrl.rewards.__file__).with_name("adapters.py")
    spec = importlib.util.spec_from_file_location("custom_module", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for score in (compute_score, module.compute_score):
        assert score("grounding/refcoco", HALF, {"box": [0, 0, 10, 10]}) == pytest.approx(1.5)
        assert score("anything", "7 dogs", "7 cats", {"task": "ocr"}) == pytest.approx(0.5)
        assert score("counting/pixmo", "[]", 0, score_by="count", format="none") == 1.0
        assert score("grounding/x", HALF, {"box": [0, 0, 10, 10]}, reward_router_address="x") == pytest.approx(1.5)
        with pytest.raises(ValueError, match="unknown task for a reward 'gsm8k'"):
            score("gsm8k", "1", "1")


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            "grounding",
            {"label": "x"},
            "row 3: the grounding reward needs the truth in 'box' or 'bbox' or 'bbox_2d' or 'solution'",
        ),
        ("grounding", {"box": [1, 2, 3]}, "row 3: 'box' must be four numbers .x1, y1, x2, y2., got .1, 2, 3."),
        ("grounding", {"box": [1, 2, 3, float("inf")]}, "'box' must be four finite numbers"),
        ("grounding", {"ground_truth": "{not json"}, "row 3: ground truth is not JSON"),
        ("detection", {"boxes": [[1, 2, 3, 4]], "labels": []}, "1 boxes, 0 labels and 1 crowd flags"),
        ("detection", {"boxes": [[1, 2, 3, 4]], "labels": [5]}, "'labels' must be a list of names"),
        ("counting", {"label": "x"}, "needs 'points', 'boxes' or 'count'"),
        ("counting", {"count": 2.5}, "'count' must be a whole number"),
        ("ocr", {"text": 5}, "'text' must be a string"),
        ("grounding", {"box": [1, 2, 3, 4], "frame": "pixels"}, "row 3: unknown frame 'pixels'"),
        ("grounding", {"box": [1, 2, 3, 4], "width": "wide", "height": 5}, "row 3: 'width' must be a whole number"),
        ("grounding", {"box": [1, 2, 3, 4], "width": 0, "height": 5}, "row 3: the sides of a picture must be 1 pixel"),
        ("trajectory", {"tracks": [{"boxes": {"1": [1, 2]}}]}, "row 3: track 1: frame 1 must be four numbers"),
        ("counting", {"points": [[1, 2], [3]]}, "row 3: 'points' must be"),
    ],
)
def test_a_bad_truth_names_row_and_column(task: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record_from(task, row, "row 3")


def test_columns_of_known_layouts_are_understood() -> None:
    assert record_from("grounding", {"solution": [1, 2, 3, 4], "id": 7}).target["box"] == (1.0, 2.0, 3.0, 4.0)
    pixmo = record_from("counting", {"points": {"x": [1.0, 2.0], "y": [3.0, 4.0]}, "label": "dog"})
    assert pixmo.target == {"label": "dog", "count": 2, "points": [(1.0, 3.0), (2.0, 4.0)], "boxes": None}
    sized = record_from("grounding", {"box": [1, 2, 3, 4], "width": 64, "height": 48, "resized_width": 56})
    assert sized.views[0].resized_width == 56
    assert sized.views[0].resized_height == 48


@pytest.mark.parametrize("wrap", ["{}", " {} ", "<answer>{}</answer>", "<ANSWER>\n{}\n</ANSWER>"])
@pytest.mark.parametrize(
    ("task", "row", "plain"),
    [
        ("grounding", {"solution": "[1, 2, 30, 40]"}, {"solution": [1, 2, 30, 40]}),
        ("grounding", {"bbox": "[1, 2, 30, 40]"}, {"bbox": [1, 2, 30, 40]}),
        ("grounding", {"ground_truth": '{"box": [1, 2, 30, 40]}'}, {"box": [1, 2, 30, 40]}),
        ("counting", {"count": "3"}, {"count": 3}),
        ("counting", {"points": "[[1, 2], [3, 4]]"}, {"points": [[1, 2], [3, 4]]}),
        ("counting", {"points": '{"x": [1, 3], "y": [2, 4]}'}, {"points": [[1, 2], [3, 4]]}),
        ("detection", {"boxes": "[[1, 2, 3, 4]]", "labels": '["a"]'}, {"boxes": [[1, 2, 3, 4]], "labels": ["a"]}),
        ("trajectory", {"tracks": '[{"boxes": {"1": [1, 2, 3, 4]}}]'}, {"tracks": [{"boxes": {1: [1, 2, 3, 4]}}]}),
    ],
)
def test_json_text_means_the_same_in_every_truth_column(
    task: str, row: dict[str, Any], plain: dict[str, Any], wrap: str
) -> None:
    written = {name: wrap.format(value) for name, value in row.items()}
    assert record_from(task, written).target == record_from(task, plain).target


def test_text_that_looks_like_json_stays_text_where_text_is_meant() -> None:
    assert record_from("ocr", {"text": "[1]"}).target == {"text": "[1]"}
    assert record_from("grounding", {"box": [1, 2, 3, 4], "expression": "[7]"}).target["expression"] == "[7]"


def test_a_count_written_as_a_float_is_a_count() -> None:
    assert record_from("counting", {"count": 2.0}).target["count"] == 2
    assert record_from("counting", {"count": "2.0"}).target["count"] == 2


def test_rows_of_another_task_give_none_under_trl() -> None:
    logged: dict[str, float] = {}
    columns: dict[str, Any] = {
        "box": [[0, 0, 10, 10], None, None, None],
        "count": [None, 2, None, None],
        "text": [None, None, "page", None],
        "labels": [None, None, None, ["dog"]],
        "boxes": [None, None, None, [[0, 0, 10, 10]]],
    }
    answers = [GOOD, "[]", "page", '[{"bbox_2d": [0, 0, 10, 10], "label": "dog"}]']
    got = {
        task: reward_for(task, **({} if task == "ocr" else {"format": "none"}))(completions=answers, **columns)
        for task in ("grounding", "ocr", "detection")
    }
    assert got == {
        "grounding": [1.0, None, None, None],
        "ocr": [None, None, 1.0, None],
        "detection": [None, None, None, 4.0 - 1.0],
    }
    counting = reward_for("counting", score_by="count", format="none")
    assert counting(completions=answers, log_metric=logged.__setitem__, **columns) == [None, 0.0, None, None]
    assert logged == {"counting/points": 0.0}
    named = grounding_reward(completions=[GOOD] * 2, box=[[0, 0, 10, 10]] * 2, task=["counting", "grounding"])
    assert named == [None, 2.0]


@pytest.mark.parametrize(
    ("task", "columns", "message"),
    [
        ("grounding", {"box": [[1, 2, 3]], "count": [None]}, "row 0: 'box' must be four numbers"),
        ("grounding", {"label": ["x"]}, "row 0: the grounding reward needs the truth"),
        ("detection", {"boxes": [[[1, 2, 3, 4]]], "labels": [5]}, "'labels' must be a list of names"),
        ("counting", {"count": ["two"]}, "'count' must be a whole number"),
        ("grounding", {"task": ["grounding"], "text": ["x"]}, "needs the truth in 'box'"),
    ],
)
def test_malformed_truth_of_this_task_still_raises_under_trl(task: str, columns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward_for(task)(completions=["x"], **columns)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("qwen3_vl", '[{"bbox_2d": [100, 100, 500, 500]}]'),
        ("internvl", "<ref>x</ref><box>[[100, 100, 500, 500]]</box>"),
        ("llava", "[0.10, 0.20, 0.50, 0.50]"),
        ("llava_next", "[0.10, 0.10, 0.50, 0.50]"),
        ("gemma3", '[{"box_2d": [100, 100, 500, 500]}]'),
    ],
)
def test_a_family_gives_frame_and_form(family: str, text: str) -> None:
    columns: dict[str, Any] = {"box": [[64, 48, 320, 240]], "width": [640], "height": [480]}
    assert reward_for("grounding", family=family)(completions=[text], **columns) == pytest.approx([2.0])
    assert grounding_reward(completions=[text], **columns, family=[family]) == pytest.approx([2.0])
    extra = {"width": 640, "height": 480}
    call: dict[str, Any] = {"data_source": "refcoco", "solution_str": text, "ground_truth": [64, 48, 320, 240]}
    assert grounding_reward(**call, extra_info=extra, family=family)["score"] == pytest.approx(2.0)
    with pytest.raises(ValueError, match="unknown family 'qwen3'; did you mean 'qwen3_"):
        reward_for("grounding", family="qwen3")


def test_trl_is_told_of_labels_that_were_not_read() -> None:
    logged: dict[str, float] = {}
    text = '[{"bbox_2d": [0, 0, 10, 10], "class_id": 1}, {"bbox_2d": [0, 0, 10, 10], "class": "cow"}]'
    detection_reward(completions=[text], boxes=[[[0, 0, 10, 10]]], labels=[["dog"]], log_metric=logged.__setitem__)
    assert (logged["detection/unlabelled"], logged["detection/unknown_label"]) == (1.0, 1.0)


def test_answer_text_of_odd_completions() -> None:
    assert answer_text([]) == ""
    assert answer_text([{"role": "assistant", "content": None}]) == ""
    assert answer_text([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) == "b"
    with pytest.raises(TypeError, match="expected a string or a list of chat messages, got int"):
        answer_text(5)
