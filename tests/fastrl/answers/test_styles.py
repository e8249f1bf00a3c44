"""Each family's answer format: written, parsed with labels, recognised; a correct answer scores exactly 1."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.answers import (
    FAMILIES,
    STYLE_FRAME,
    STYLES,
    View,
    format_answer,
    matches_format,
    parse_boxes,
    parse_points,
    resolve_frame,
    style_named,
    style_of,
    to_original,
)
from fastrl.data.records import Record
from fastrl.evaluate import evaluate
from fastrl.rewards import reward_for

SIZES = [(640, 480), (641, 479), (333, 77), (77, 1001), (3000, 2001)]
BOXES = [(11.0, 7.0, 60.0, 50.0), (3.0, 21.0, 70.5, 70.0), (40.0, 30.0, 76.0, 76.0)]
LABELS = ["cat", "hot dog", "cat"]
TASKS = ("grounding", "counting", "detection", "ocr")


def view_of(style: str, width: int, height: int) -> View:
    """The view of a picture that a model of this style has."""
    if STYLE_FRAME[style] == "padded_unit":
        return View.padded(width, height, 336)
    return View(width, height, max(28, width // 28 * 28), max(28, height // 28 * 28))


def representable(coords: tuple[float, ...], style: str, view: View) -> tuple[float, ...]:
    """The truth closest to ``coords`` that the style can write exactly."""
    return to_original(style_named(style).numbers(coords, view), STYLE_FRAME[style], view)


def target_of(task: str, style: str, view: View, points: bool = False) -> dict[str, Any]:
    boxes = [representable(box, style, view) for box in BOXES]
    if task == "grounding":
        return {"box": boxes[0], "expression": "the cat"}
    if task == "detection":
        return {"boxes": boxes, "labels": LABELS, "crowd": [False] * 3, "categories": ["cat", "hot dog"]}
    if task == "ocr":
        return {"text": "A page.\nTwo lines, café."}
    if points or not style_named(style).boxes:
        places = [representable(box[:2], style, view) for box in BOXES]
        return {"label": "cat", "count": 3, "points": places, "boxes": None}
    return {"label": "cat", "count": 3, "points": None, "boxes": boxes}


CASES = [(s, t) for s in STYLES for t in TASKS if style_named(s).boxes or t in ("counting", "ocr")]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("style", "task"), CASES)
def test_a_right_answer_in_the_familys_own_form_earns_exactly_one(style: str, task: str, size: tuple[int, int]) -> None:
    view = view_of(style, *size)
    for points in (False, True) if task == "counting" else (False,):
        target = target_of(task, style, view, points)
        row = Record("1", task, (), (), target, views=(view,), frame=STYLE_FRAME[style], style=style)
        text = format_answer(task, target, style, view)
        components = reward_for(task)([text], row)
        want = {name: [0.0 if name == "missing" else 1.0] for name in components}
        assert components == want, text
        metrics = evaluate(task, [row], [text])
        right = {
            "grounding": ["mean_iou", "acc@0.95"],
            "counting": ["accuracy"],
            "detection": ["AP", "AP75"],
            "ocr": ["f1"],
        }
        assert [metrics[name] for name in right[task]] == [1.0] * len(right[task])
        assert metrics["unparsable"] == 0


@pytest.mark.parametrize("style", [name for name in STYLES if style_named(name).boxes])
def test_labels_and_boxes_come_back(style: str) -> None:
    view = view_of(style, 641, 479)
    target = target_of("detection", style, view)
    parsed = parse_boxes(format_answer("detection", target, style, view))
    assert [item.label for item in parsed] == LABELS
    frame = resolve_frame(parsed, STYLE_FRAME[style])
    assert [to_original(item.box, frame, view) for item in parsed] == target["boxes"]


@pytest.mark.parametrize(("style", "task"), [case for case in CASES if case[1] != "ocr"])
def test_a_written_answer_has_its_own_form_and_little_else_has_it(style: str, task: str) -> None:
    view = view_of(style, 640, 480)
    text = format_answer(task, target_of(task, style, view), style, view)
    assert matches_format(task, text, style)
    assert not matches_format(task, f"Sure: {text}", style)
    assert not matches_format(task, text[1:] if style == "paligemma" else text[:-1], style)
    assert not matches_format(task, "", style)
    assert matches_format(task, "[]", style) == (task != "grounding" and style != "glm")
    if task == "grounding" and style in ("qwen2", "internvl", "llava1_5", "paligemma", "glm"):
        assert not matches_format(task, text + text, style)


@pytest.mark.parametrize(
    ("style", "task", "text"),
    [
        ("qwen3", "detection", '[{"bbox_2d": [100, 100, 500, 500], "label": "cat"}]'),
        ("qwen3", "points", '[{"point_2d": [100, 100], "label": "cat"}]'),
        ("llava1_5", "grounding", "[0.10, 0.20, 0.50, 0.50]"),
        ("llava_next", "points", "[0.10, 0.10]"),
        ("internvl", "detection", "<ref>cat</ref><box>[[100, 100, 500, 500]]</box>"),
        ("glm", "grounding", "<|begin_of_box|>[[100,100,500,500]]<|end_of_box|>"),
        ("gemma", "detection", '[{"box_2d": [100, 100, 500, 500], "label": "cat"}]'),
        ("molmo", "points", '<point x="10.0" y="10.0" alt="cat">cat</point>'),
        ("paligemma", "detection", "<loc0102><loc0102><loc0512><loc0512> cat"),
    ],
)
def test_what_is_written(style: str, task: str, text: str) -> None:
    view = View.padded(1000, 800, 336) if style == "llava1_5" else View.unresized(1000, 800)
    box = (100.0, 100.0, 500.0, 400.0) if style == "llava1_5" else (100.0, 80.0, 500.0, 400.0)
    targets = {
        "grounding": {"box": box, "expression": "cat"},
        "detection": {"boxes": [box], "labels": ["cat"]},
        "points": {"label": "cat", "count": 1, "points": [(100.0, 80.0)]},
    }
    assert format_answer("counting" if task == "points" else task, targets[task], style, view) == text


def test_gemma_has_y_first_and_no_other_reading_of_box_2d_exists() -> None:
    view = View.unresized(1000, 500)
    box = (100.0, 50.0, 200.0, 400.0)
    text = format_answer("grounding", {"box": box, "expression": "x"}, "gemma", view)
    assert json.loads(text) == [{"box_2d": [100, 100, 800, 200]}]
    for answer in (
        text,
        "box_2d: [100, 100, 800, 200]",
        "{'Box_2D': [100, 100, 800, 200]}",
        '"box_2d" [100,100,800,200]',
    ):
        (item,) = parse_boxes(answer)
        assert item.box == (100, 100, 200, 800)
        assert resolve_frame(parse_boxes(answer), "auto") == "thousand"


def test_padded_unit_is_not_unit() -> None:
    """The case of issue reports: a correct box of a 640 x 480 picture, in fractions of its sides."""
    view = View.padded(640, 480, 336)
    text = "[0.10, 0.20, 0.50, 0.80]"
    truth = to_original((0.1, 0.2, 0.5, 0.8), "padded_unit", view)
    row = Record("a", "grounding", (), (), {"box": truth, "expression": "x"}, views=(view,), frame="padded_unit")
    assert reward_for("grounding")([text], row)["iou"] == [1.0]
    assert reward_for("grounding", frame="unit")([text], row)["iou"][0] == pytest.approx(0.75)


def test_molmos_and_paligemmas_numbers_are_parts_whatever_the_frame() -> None:
    for answer in (
        '<points x1="10" y1="20.5" x2="30" y2="40" alt="cat">cat</points>',
        "<loc0000><loc0256><loc0512><loc0768> a",
    ):
        assert {resolve_frame(parse_points(answer), frame) for frame in ("auto", "resized", "original")} == {"unit"}
    points = parse_points('<points x1="10" y1="20.5" x2="30" y2="40" alt="cat">cat</points>')
    assert [(item.point, item.label) for item in points] == [((0.1, 0.205), "cat"), ((0.3, 0.4), "cat")]
    assert not parse_boxes('<point x="10" y="20" alt="cat">cat</point>').items
    (found,) = parse_boxes("<loc0000><loc0256><loc0512><loc0768> <seg001><seg002> wall ;")
    assert (found.box, found.label) == ((0.25, 0.0, 0.75, 0.5), "wall")


def test_every_family_has_a_style() -> None:
    assert {style_of(family).name for family in FAMILIES} == set(STYLES)
    assert (style_of("llava").frame, style_of("llava_onevision").frame) == ("padded_unit", "unit")
    assert style_of("qwen3_vl").frame_of("trajectory") == "thousand"
    with pytest.raises(ValueError, match="unknown model family 'bert'; known: qwen2_vl"):
        style_of("bert")
    with pytest.raises(ValueError, match="molmo only writes points"):
        format_answer("grounding", {"box": (0, 0, 1, 1)}, "molmo", View.unresized(10, 10))


boxes = st.tuples(*[st.floats(0, 1)] * 4).map(
    lambda v: (min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]), max(v[1], v[3]))
)


@settings(max_examples=150)
@given(
    style=st.sampled_from([name for name in STYLES if style_named(name).boxes]),
    parts=st.lists(boxes, min_size=1, max_size=4),
    size=st.tuples(st.integers(28, 3000), st.integers(28, 3000)),
)
def test_truth_to_text_to_truth_is_within_half_a_step(style: str, parts: list, size: tuple[int, int]) -> None:
    view = view_of(style, *size)
    truth = [(p[0] * size[0], p[1] * size[1], p[2] * size[0], p[3] * size[1]) for p in parts]
    target = {"boxes": truth, "labels": ["cat"] * len(truth)}
    parsed = parse_boxes(format_answer("detection", target, style, view))
    frame = resolve_frame(parsed, STYLE_FRAME[style])
    width, height = view.size(frame)
    steps = style_named(style).steps
    canvas = view.canvas or (0, 0, *size)
    step = [(canvas[2] - canvas[0]) / width / steps, (canvas[3] - canvas[1]) / height / steps] * 2
    assert len(parsed) == len(truth)
    for item, box in zip(parsed, truth, strict=True):
        for got, want, one in zip(to_original(item.box, frame, view), box, step, strict=True):
            assert abs(got - want) <= one * (1 if style == "paligemma" else 0.5) + 1e-6
