"""Damaged, truncated and oddly formatted answers: damage to one item leaves the others, in linear time."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.answers import Parsed, Track, format_tracks, parse_boxes, parse_points, parse_tracks
from fastrl.answers.parse import parse_scanned
from fastrl.answers.scan import Scanner
from fastrl.answers.text import unescaped
from tests.helpers.answers import FORMS, POINT_FORMS, hostile_texts, list_of_boxes

LABELS = ["b 27", "a dog's", 'a "big" cat', "x: [1, 2]", "狗，大", "b"]


def labelled(parsed: Parsed) -> list[tuple[tuple[float, ...], str | None]]:
    return [(item.box, item.label) for item in parsed]


# ---- one damaged item


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    "damage",
    [
        ('"label": "b"', '"label": "b" 27"'),
        ('"label": "b"', '"label": "b'),
        ('"label": "b"', '"label": b"'),
        ('"label": "b"}', '"label": "b"'),
        ('{"bbox_2d"', '"bbox_2d"'),
        ("[5, 6, 7, 8]", "[5, 6, 7, 8"),
        ("[5, 6, 7, 8]", "[5, 6, x, 8]"),
        ("[5, 6, 7, 8]", '[5, 6, "7, 8]'),
        ("[5, 6, 7, 8]", "[5, 6, {7, 8]"),
        ('"bbox_2d":', '"bbox_2d'),
        (", ", ' "" , '),
    ],
    ids=lambda pair: pair[1],
)
def test_one_damaged_item_leaves_its_neighbours_alone(damage: tuple[str, str], place: int) -> None:
    items = ['{"bbox_2d": [1, 2, 3, 4], "label": "a"}', '{"bbox_2d": [9, 10, 11, 12], "label": "c"}']
    items.insert(place, '{"bbox_2d": [5, 6, 7, 8], "label": "b"}'.replace(*damage))
    parsed = parse_boxes(f"[{', '.join(items)}]")
    left = [found for found in labelled(parsed) if found[0] != (5, 6, 7, 8)]
    assert left == [((1, 2, 3, 4), "a"), ((9, 10, 11, 12), "c")]
    assert len(parsed) - 2 + parsed.dropped == 1  # the damaged one is returned, or counted as dropped


@settings(max_examples=500)
@given(data=st.data(), form=st.sampled_from(FORMS), n=st.integers(2, 5))
def test_n_minus_one_items_survive_any_damage_to_one(data: st.DataObject, form: Any, n: int) -> None:
    """Characters of one list item are deleted, replaced or inserted; the other items keep their boxes and labels."""
    boxes = [(10.0 + i, 20.0 + i, 300.0 + i, 400.0 + i) for i in range(n)]
    names = [f"{data.draw(st.sampled_from(LABELS))} {i}" for i in range(n)]
    items = [form.item(box, name) for box, name in zip(boxes, names, strict=True)]
    hit = data.draw(st.integers(0, n - 1))
    items[hit] = damaged(data, items[hit], form.damage)
    found = iter(labelled(parse_boxes(form.join(items))))
    want = [
        (tuple(form.read(box)), name if form.labels else None)
        for i, (box, name) in enumerate(zip(boxes, names, strict=True))
        if i != hit
    ]
    missing = [pair for pair in want if pair not in found]
    assert not missing, form.join(items)


@settings(max_examples=150)
@given(data=st.data(), form=st.sampled_from(POINT_FORMS), n=st.integers(2, 5))
def test_n_minus_one_points_survive_any_damage_to_one(data: st.DataObject, form: Any, n: int) -> None:
    points = [(500 - 10 * i, 700 - 10 * i) for i in range(n)]
    names = [f"{data.draw(st.sampled_from(['b 27', 'cat', '狗，大']))} {i}" for i in range(n)]
    items = [form.item(i, *pair) for i, pair in enumerate(zip(points, names, strict=True), 1)]
    hit = data.draw(st.integers(0, n - 1))
    items[hit] = damaged(data, items[hit], form.damage)
    found = [(item.point, item.label) for item in parse_points(form.join(items))]
    for i, (point, name) in enumerate(zip(points, names, strict=True)):
        near = [label for got, label in found if got == pytest.approx([v * form.scale for v in point])]
        assert i == hit or (near and (not form.labels or name in near)), form.join(items)


@settings(max_examples=150)
@given(data=st.data(), n=st.integers(2, 4))
def test_n_minus_one_tracks_survive_any_damage_to_one(data: st.DataObject, n: int) -> None:
    tracks = [Track(i + 1, f"dog {i}", {t: (10.0 + i, 20.0 + t, 300, 400) for t in (1, 2, 5)}) for i in range(n)]
    lines = format_tracks(tracks).split("\n")
    hit = data.draw(st.integers(0, n - 1))
    lines[hit] = damaged(data, lines[hit], FORMS[0].damage)
    found = list(parse_tracks("\n".join(lines)))
    assert all(track in found for i, track in enumerate(tracks) if i != hit), "\n".join(lines)


def damaged(data: st.DataObject, text: str, characters: str) -> str:
    """A text with some characters removed and others inserted at one position."""
    at, cut = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 3))
    return text[:at] + data.draw(st.text(characters, max_size=2)) + text[at + cut :]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_cut_reply_keeps_each_item_whose_numbers_are_complete(form: Any) -> None:
    boxes = [(11, 21, 31, 41), (12, 22, 32, 42), (13, 23, 33, 43)]
    text = form.join([form.item(box, f"cat {i}") for i, box in enumerate(boxes)])
    ends = [text.index(form.last(box)) + len(form.last(box)) for box in boxes]
    for cut in range(len(text) + 1):
        found = [item.box for item in parse_boxes(text[:cut])]
        complete = sum(end <= cut for end in ends)
        assert found[:complete] == [tuple(map(float, form.read(box))) for box in boxes[:complete]]
        assert len(found) <= complete + 1  # at most the item that is incomplete


@pytest.mark.parametrize(
    ("text", "items"),
    [
        # a quote inside a label belongs to the label
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "b" 27"}]', [((1, 2, 3, 4), 'b" 27')]),
        ('[{"label": "the "big" one", "bbox_2d": [1, 2, 3, 4]}]', [((1, 2, 3, 4), 'the "big" one')]),
        ("[{'bbox_2d': [1, 2, 3, 4], 'label': 'men's shoe'}]", [((1, 2, 3, 4), "men's shoe")]),
        # an unterminated label ends at the next entry or object
        (
            '[{"bbox_2d": [1, 2, 3, 4], "label": "b}, {"label": "c", "bbox_2d": [5, 6, 7, 8]}]',
            [((1, 2, 3, 4), "b"), ((5, 6, 7, 8), "c")],
        ),
        ('[{"label": "b, "bbox_2d": [1, 2, 3, 4]}]', [((1, 2, 3, 4), "b")]),
        # every list under a coordinate key is one item, even without braces between them
        (
            '{"bbox_2d": [1, 2, 3, 4], "label": "a", "bbox_2d": [5, 6, 7, 8], "label": "b"}',
            [((1, 2, 3, 4), "a"), ((5, 6, 7, 8), "b")],
        ),
        (
            '{"label": "a", "bbox_2d": [1, 2, 3, 4], "label": "b", "bbox_2d": [5, 6, 7, 8]}',
            [((1, 2, 3, 4), "a"), ((5, 6, 7, 8), "b")],
        ),
        ('"bbox_2d": [1, 2, 3, 4]\n"bbox_2d": [5, 6, 7, 8]', [((1, 2, 3, 4), None), ((5, 6, 7, 8), None)]),
        # a nested object's keys are not its parent's
        ('{"bbox_2d": [1, 2, 3, 4], "parts": {"name": "ear"}, "label": "cat"}', [((1, 2, 3, 4), "cat")]),
        ('{"bbox_2d": [1, 2, 3, 4], "parts": {"name": "ear"}}', [((1, 2, 3, 4), None)]),
    ],
)
def test_what_becomes_of_a_damaged_item(text: str, items: list[tuple]) -> None:
    assert labelled(parse_boxes(text)) == items


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        # brackets lost between two pairs: still a box, and its neighbours stay
        ("(1,2),(3,4)\n(5,6,7,8)\n(9,10),(11,12)", [(1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12)]),
        ("(1,2,3,4)\n(5,6),(7,8)", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ("(1, 2), (3, 4), (5, 6, 7, 8), (9, 10), (11, 12)", [(1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12)]),
        # one damaged group where the others come out even stands for a box
        ("(1, 2), (3, 4), (5, 6 0 7, 8), (9, 10), (11, 12)", [(1, 2, 3, 4), (9, 10, 11, 12)]),
        # blanks between boxes and none inside say which pairs belong together
        ("(1,2),(3,4), (5,6),7,8), (9,10),(11,12)", [(1, 2, 3, 4), (9, 10, 11, 12)]),
        ("(1,2),(3,4), (5,6), (9,10),(11,12)", [(1, 2, 3, 4), (9, 10, 11, 12)]),
        ("(1,2),(3,4), (5,6),(7,x), (9,10),(11,12)", [(1, 2, 3, 4), (9, 10, 11, 12)]),
        ("(1,2),(3,4), (5,6),(7,8, (9,10),(11,12)", [(1, 2, 3, 4), (9, 10, 11, 12)]),
        # words between two notations: the four numbers are the answer
        ("From (1,2),(3,4) follows (5,6,7,8)", [(5, 6, 7, 8)]),
        # points
        ("(1, 2), (3, 4), (5, 6)", []),
    ],
)
def test_what_becomes_of_damaged_pairs(text: str, boxes: list[tuple[float, ...]]) -> None:
    assert [item.box for item in parse_boxes(text)] == boxes


def test_points_stay_points_whatever_the_blanks() -> None:
    assert len(parse_points("(1, 2), (3, 4), (5, 6)")) == 3
    assert len(parse_points("(1,2),(3,4), (5,6)")) == 3
    assert [item.point for item in parse_points("(1,2),(3,4), (5,6),(7,8), (9,1),(2,3), (20,20),(40,40)")] == [
        (2, 3),
        (6, 7),
        (5.5, 2),
        (30, 30),
    ]


# ---- keys, labels and punctuation


@pytest.mark.parametrize("key", ["bbox_2d", "BBox_2D", "bbox", "Box", "bounding_box", "bbox2d", "BBOX"])
@pytest.mark.parametrize("name", ["label", "Label", "class", "class_name", "category_name", "Name", "categoryName"])
def test_keys_count_in_any_case_and_labels_under_their_usual_names(key: str, name: str) -> None:
    (item,) = parse_boxes(json.dumps([{key: [1, 2, 3, 4], name: "dog", "Confidence": 0.5}]))
    assert (item.box, item.label, item.score) == ((1, 2, 3, 4), "dog", 0.5)


@pytest.mark.parametrize(
    "text",
    [
        "[12, 34, 56, 78,]",
        "[[12,34],[56,78]]",
        '{"x1": 12, "y1": 34, "x2": 56, "y2": 78}',
        '{"X1": 12, "Y1": 34, "X2": 56, "Y2": 78}',
        '{"xmin": 12, "ymin": 34, "xmax": 56, "ymax": 78}',
        '{"x0": 12, "y0": 34, "x1": 56, "y1": 78}',
        '{"bbox_2d"：[12，34，56，78]}',
        "［12，34，56，78］",
        "（12，34，56，78）",
        '{"bbox_2d": [[12, 34], [56, 78]]}',
        '{"bbox_2d": [[12, 34, 56, 78]]}',
        '{"bbox": {"x1": 12, "y1": 34, "x2": 56, "y2": 78}}',
        "{'bbox_2d': [12, 34, 56, 78],}",
        "{bbox_2d: [12, 34, 56, 78]}",
        "bbox_2d: [12, 34, 56, 78]",
        "“bbox_2d”: [12, 34, 56, 78]",
        "<ANSWER>[12, 34, 56, 78]</Answer>",
        '{"bbox_2d": [12 34 56 78]}',
        '{"bbox_2d": [12; 34; 56; 78]}',
        '{"bbox_2d": [12، 34، 56، 78]}',
        '{"bbox_2d": [١٢, ٣٤, ٥٦, ٧٨]}',
        '{"Bounding-Box": [12, 34, 56, 78]}',
        '{""bbox_2d"": [12, 34, 56, 78]}',
        "{`bbox_2d`: [12, 34, 56, 78]}",
        "{«bbox_2d»: [12, 34, 56, 78]}",
        '{"bbox_2d”: [12, 34, 56, 78]}',
        r'"[{\"bbox_2d\": [12,\n34,\n56,\n78]}]"',
        "- bbox: [12, 34, 56, 78]",
        "<box>12,34,56,78</box>",
        "<box>[12, 34), 56 78</box>",
        "<|box_start|>(12,34)(56,78)<|box_end|>",
        '[{"bbox_2d": [12, 34, 56, 78], // [1, 2, 3, 4] is another\n"label": "a"}]',
        '[{"bbox_2d": /* x first */ [12, 34, 56, 78]}]',
    ],
)
def test_every_spelling_of_one_box(text: str) -> None:
    assert [item.box for item in parse_boxes(text)] == [(12, 34, 56, 78)]


def test_a_label_is_counted_where_it_cannot_be_read() -> None:
    parsed = parse_boxes('[{"bbox_2d": [1, 2, 3, 4], "class_id": 3}, {"bbox_2d": [1, 2, 3, 4], "label": "dog"}]')
    assert parsed.unlabelled == 1


def test_several_boxes_of_one_entry_share_its_label() -> None:
    parsed = parse_boxes('{"bboxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "label": "dog"}')
    assert labelled(parsed) == [((1, 2, 3, 4), "dog"), ((5, 6, 7, 8), "dog")]


@pytest.mark.parametrize(
    "label",
    [
        '"a b"',
        "'a b'",
        "`a b`",
        "“a b”",
        "„a b“",
        "‚a b‘",
        "«a b»",
        "‹a b›",
        '""a b""',
        "'a b\"",
        '“a b"',
        r"\"a b\"",
        '["a b"]',
    ],
)
def test_a_label_in_quotes_of_any_kind(label: str) -> None:
    """Brackets need not match; neighbouring items must not change."""
    other = '{"bbox_2d": [5, 6, 7, 8], "label": "c"}'
    parsed = parse_boxes(f'[{other}, {{"bbox_2d": [1, 2, 3, 4], "label": {label}}}, {other}]')
    assert [item.label for item in parsed] == ["c", "a b", "c"]
    first = parse_boxes(f'[{{"label": {label}, "bbox_2d": [1, 2, 3, 4]}}, {other}]')
    assert [item.label for item in first] == ["a b", "c"]


def test_a_label_may_speak_of_coordinates() -> None:
    text = json.dumps([{"label": 'the {"bbox_2d": [5, 6, 7, 8]} sign', "bbox_2d": [1, 2, 3, 4]}])
    assert labelled(parse_boxes(text)) == [((1, 2, 3, 4), 'the {"bbox_2d": [5, 6, 7, 8]} sign')]


# ---- points as pairs


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("(1, 2), (3, 4), (5, 6)", [(1, 2), (3, 4), (5, 6)]),
        ("(9, 2), (3, 4), (5, 6), (7, 8)", [(9, 2), (3, 4), (5, 6), (7, 8)]),
        ("(4, 3), (2, 1)", [(4, 3), (2, 1)]),
        ("(0, 0), (4, 2), (10, 10), (14, 12)", [(2, 1), (12, 11)]),  # all are boxes
        ("(1, 2), (3, 4)\n(5, 6), (7, 8), (9, 9)", [(1, 2), (3, 4), (5, 6), (7, 8), (9, 9)]),
    ],
)
def test_a_run_of_pairs_that_are_not_all_boxes_is_points(text: str, points: list[tuple]) -> None:
    assert [item.point for item in parse_points(text)] == points


def test_three_points_are_no_box() -> None:
    assert not parse_boxes("(1, 2), (3, 4), (5, 6)").items


# ---- thoughts


@pytest.mark.parametrize("tag", ["think", "THINK", "Thinking", "thought", "reasoning"])
def test_nothing_inside_a_thought_is_read(tag: str) -> None:
    for text in (f"<{tag}>Looking at [1, 2, 30, 40] it seems", f"<{tag}>[1, 2, 30, 40]</{tag}> none"):
        assert not parse_boxes(text).parsable
        assert not parse_points(text).parsable
    assert parse_boxes(f"<{tag}>[9, 9, 9, 9]</{tag}>[1, 2, 30, 40]")[0].box == (1, 2, 30, 40)
    assert parse_boxes(f"[1, 2, 30, 40] <{tag}> or [9, 9, 9, 9]")[0].box == (1, 2, 30, 40)
    assert not parse_boxes(f"<{tag}> so <answer>[1, 2, 30, 40]</answer>").parsable


def test_an_empty_thought_hides_nothing() -> None:
    for text in ("<think/>[1, 2, 30, 40]", "<think />[1, 2, 30, 40]", "<think></think>[1, 2, 30, 40]"):
        assert parse_boxes(text)[0].box == (1, 2, 30, 40)
    harmony = (
        "<|channel|>analysis<|message|>[9, 9, 9, 9]<|end|><|start|>assistant<|channel|>final<|message|>[1, 2, 3, 4]"
    )
    assert [item.box for item in parse_boxes(harmony)] == [(1, 2, 3, 4)]


# ---- number of operations


@pytest.mark.parametrize("points", [False, True])
def test_work_grows_with_the_text(points: bool) -> None:
    """Characters visited per character of text, for texts of n, 4n and 16n characters: constant."""
    for name, make in {**hostile_texts(), "boxes": list_of_boxes}.items():
        looked = []
        for n in (500, 2000, 8000):
            scan = Scanner(unescaped(make(n)))
            parse_scanned(scan, 10**6, points=points)
            looked.append(scan.visited / len(scan.text))
        assert max(looked) < 16, name
        assert looked[2] <= 1.1 * looked[0] + 0.1, (name, looked)
