"""Any two formats of the same answer earn the same reward, in every task with coordinates."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.answers import View
from fastrl.answers.choice import parse_choice, parse_yes_no
from fastrl.captions import parse_caption
from fastrl.data.records import Record
from fastrl.rewards import reward_for

Items = Sequence[tuple[tuple[int, ...], str]]
NAMES = ["cat", "hot dog", "café", "狗，大", "a 'b'"]
VIEW = View(640, 480, 644, 476)
WRAPS = ("{}", "```json\n{}\n```", "<answer>{}</answer>", "<Think>[1, 2, 3, 4]</Think>\n{}", "Here: {}", "{}<|im_end|>")


def _objects(
    box_key: str = "bbox_2d",
    label_key: str = "label",
    last: bool = False,
    of: Callable[[tuple[int, ...]], object] = list,
) -> Callable[[Items], str]:
    def write(items: Items) -> str:
        rows = [{box_key: of(box), label_key: name} for box, name in items]
        return json.dumps([dict(reversed(row.items())) if last else row for row in rows], ensure_ascii=False)

    return write


def _cornered(items: Items) -> str:
    return json.dumps([{**dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)), "Name": name} for box, name in items])


LABELLED: tuple[Callable[[Items], str], ...] = (
    _objects(),
    _objects("BBox_2D", "Class"),
    _objects("bbox", "category_name", last=True),
    _objects("box", "class_name", of=lambda box: [[*box[:2]], [*box[2:]]]),
    _objects("bounding_box", "name", of=lambda box: dict(zip(("x1", "y1", "x2", "y2"), box, strict=True))),
    _cornered,
    lambda items: repr([{"bbox_2d": list(box), "label": name} for box, name in items]),
    lambda items: "\n".join(
        f'{{"bbox_2d"：[{"，".join(map(str, box))}]，"label"：{json.dumps(name)}}}' for box, name in items
    ),
    lambda items: json.dumps({"objects": json.loads(_objects()(items))}, indent=2),
    lambda items: "".join(
        f"<|object_ref_start|>{name}<|object_ref_end|><|box_start|>({b[0]},{b[1]}),({b[2]},{b[3]})<|box_end|>"
        for b, name in items
    ),
    lambda items: "".join(f"<ref>{name}</ref><box>[[{', '.join(map(str, box))}]]</box>" for box, name in items),
)
BARE: tuple[Callable[[Items], str], ...] = (
    lambda items: ", ".join(str(list(box)) for box, _ in items),
    lambda items: "; ".join(f"[{', '.join(map(str, box))},]" for box, _ in items),
    lambda items: " ".join(f"({', '.join(map(str, box))})" for box, _ in items),
    lambda items: "\n".join(f"[[{b[0]}, {b[1]}], [{b[2]}, {b[3]}]]" for b, _ in items),
    lambda items: ", ".join(f"({b[0]}, {b[1]}), ({b[2]}, {b[3]})" for b, _ in items),
)
boxes = st.tuples(st.integers(0, 300), st.integers(0, 200), st.integers(1, 340), st.integers(1, 280)).map(
    lambda v: (v[0], v[1], v[0] + v[2], v[1] + v[3])
)
places = st.tuples(st.integers(0, 639), st.integers(0, 479))
found = st.lists(st.tuples(boxes, st.sampled_from(NAMES)), min_size=1, max_size=5)


def scores(task: str, target: dict, answers: list[str]) -> list[tuple[float, ...]]:
    row = Record("a", task, (), (), target, views=(VIEW,), frame="original")
    columns = reward_for(task, format="none")(answers, row)
    return list(zip(*columns.values(), strict=True))


@settings(max_examples=60)
@given(items=found, truth=found, wrap=st.sampled_from(WRAPS))
def test_detection(items: Items, truth: Items, wrap: str) -> None:
    target = {
        "boxes": [list(box) for box, _ in truth],
        "labels": [name for _, name in truth],
        "crowd": [False] * len(truth),
        "categories": NAMES,
    }
    answers = [LABELLED[0](items), *(wrap.format(write(items)) for write in LABELLED)]
    assert len(set(scores("detection", target, answers))) == 1
    without = scores("detection", target, [write(items) for write in BARE])
    assert {(s[0], *s[2:]) for s in without} == {(s[0], *s[2:]) for s in scores("detection", target, answers[:1])}


@settings(max_examples=60)
@given(items=found, box=boxes, wrap=st.sampled_from(WRAPS))
def test_grounding(items: Items, box: tuple[int, ...], wrap: str) -> None:
    answers = [LABELLED[0](items), *(wrap.format(write(items)) for write in (*LABELLED, *BARE))]
    if wrap == "Here: {}":
        answers.append(f"Sure: {LABELLED[0](items)}")
    assert len(set(scores("grounding", {"box": box, "expression": "x"}, answers))) == 1


@settings(max_examples=60)
@given(
    points=st.lists(st.tuples(st.integers(0, 639), st.integers(0, 479)), min_size=1, max_size=5).filter(
        lambda p: len(p) % 2
    )
)
def test_counting_points(points: list[tuple[int, int]]) -> None:
    answers = [
        json.dumps([{"point_2d": list(p), "label": "x"} for p in points]),
        json.dumps([{"Point": list(p)} for p in points]),
        json.dumps([{"x": p[0], "y": p[1]} for p in points]),
        json.dumps({"points": [list(p) for p in points]}),
        str([list(p) for p in points]),
        ", ".join(map(str, points)),
        "\n".join(map(str, points)),
        "；".join(f"（{x}，{y}）" for x, y in points),
    ]
    target = {"label": "x", "count": 3, "points": [(5.0, 5.0), (300.0, 200.0), (600.0, 400.0)], "boxes": None}
    assert len(set(scores("counting", target, answers))) == 1


@pytest.mark.parametrize("write", [*LABELLED, *BARE])
def test_a_right_answer_is_exactly_right_in_every_spelling(write: Callable[[Items], str]) -> None:
    text = write([((10, 20, 300, 400), "cat")])
    assert scores("grounding", {"box": (10, 20, 300, 400), "expression": "x"}, [text]) == [(1.0,)]


# ---- thoughts

RIGHT: dict[str, tuple[dict, str]] = {
    "grounding": ({"box": (10, 20, 300, 400), "expression": "x"}, '[{"bbox_2d": [10, 20, 300, 400]}]'),
    "counting": (
        {"label": "x", "count": 1, "points": [(5.0, 5.0)], "boxes": None},
        '[{"point_2d": [5, 5], "label": "x"}]',
    ),
    "detection": (
        {"boxes": [[10, 20, 300, 400]], "labels": ["x"], "crowd": [False], "categories": ["x"]},
        '[{"bbox_2d": [10, 20, 300, 400], "label": "x"}]',
    ),
    "ocr": ({"text": "hello world"}, "hello world"),
    "trajectory": (
        {"tracks": [{"id": 1, "name": "dog", "boxes": {1: [0, 0, 64, 48], 2: [64, 48, 128, 96]}}], "frames": 2},
        "Track1: dog<Id1>Frame1:[0,0,100,100];Frame2:[100,100,200,200];</Id1>",
    ),
}
THOUGHTS = (
    "<think>{}",
    "<THINK>\n{}</Think>",
    "{}</think>",
    "<think>a</think><Thinking>{}",
    "<answer><think>{}</think></answer>",
    "<think>so <answer>{}</answer>",
    "<thoughts>{}</thoughts>",
    '<think budget="9">{}',
    "<think {}",
    "[THINK]{}[/THINK]",
    "<seed:think>{}",
    "◁think▷{}",
    "<|think|>{}",
    "<|begin_of_thought|>{}<|end_of_thought|>",
    "<Analysis>{}",
    "<|channel>thought\n{}<channel|>",
    "<|channel|>analysis<|message|>{}<|end|>",
    "<unused94>thought\n{}",
)


def earned(task: str, text: str) -> float:
    """The sum of an answer's positive components; penalties are left out."""
    row = Record(
        "a", task, (), (), RIGHT[task][0], views=(VIEW,), frame="thousand" if task == "trajectory" else "original"
    )
    return sum(max(0.0, values[0]) for values in reward_for(task)([text], row).values())


@pytest.mark.parametrize("task", RIGHT)
def test_nothing_inside_a_thought_is_paid_in_any_task(task: str) -> None:
    right = RIGHT[task][1]
    whole = earned(task, right)
    assert whole >= 1.0 - 1e-9
    for thought in THOUGHTS:
        assert earned(task, thought.format(right)) == 0.0, thought
        assert earned(task, f"{thought.format('hm')}</think>{right}") >= 1.0 - 1e-9, thought
    assert earned(task, f"{right} <think>or {right}{right}") >= 1.0 - 1e-9


def test_no_choice_and_no_fact_comes_from_a_thought() -> None:
    for thought in THOUGHTS:
        assert parse_choice(thought.format("B"), ["x", "y"]) is None
        assert parse_yes_no(thought.format("yes")) is None
        assert not parse_caption(thought.format("A dog is on a mat.")).objects
