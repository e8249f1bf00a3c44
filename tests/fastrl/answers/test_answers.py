"""Parsing and writing boxes, points and tracks: every format, every coordinate frame, and hostile text."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrl.answers import (
    STYLE_FRAME,
    Track,
    View,
    format_answer,
    format_tracks,
    from_original,
    matches_format,
    matches_grounding_format,
    matches_json_boxes,
    parse_boxes,
    parse_points,
    parse_tracks,
    plain_answer,
    resolve_frame,
    round_coords,
    strip_special_tokens,
    to_original,
)

QWEN2 = "<|object_ref_start|>The woman<|object_ref_end|><|box_start|>(157,459),(208,622)<|box_end|>"
BOX = (157.0, 459.0, 208.0, 622.0)
sides = st.integers(min_value=28, max_value=4000)
views = st.builds(View, sides, sides, sides, sides)


# ---- frames


@given(view=views, frame=st.sampled_from(["resized", "thousand", "original"]), data=st.data())
def test_frame_to_text_to_frame_is_exact_to_rounding(view: View, frame: str, data: st.DataObject) -> None:
    width, height = view.size(frame)
    box = tuple(data.draw(st.integers(0, int(side))) for side in (width, height, width, height))
    back = from_original(to_original(box, frame, view), frame, view)
    assert tuple(math.floor(v + 0.5) for v in back) == box


@given(view=views, style=st.sampled_from(["qwen2_5", "qwen2"]), data=st.data())
def test_truth_to_text_to_truth_is_within_half_a_unit(view: View, style: str, data: st.DataObject) -> None:
    box = [data.draw(st.floats(0, side)) for side in (view.width, view.height, view.width, view.height)]
    text = format_answer("grounding", {"box": box, "expression": "the cat"}, style, view)
    parsed = parse_boxes(text)
    frame = resolve_frame(parsed, "auto")
    assert frame == STYLE_FRAME[style]
    width, height = view.size(frame)
    half = [0.5 * view.width / width, 0.5 * view.height / height] * 2
    for got, want, slack in zip(to_original(parsed[0].box, frame, view), box, half, strict=True):
        assert abs(got - want) <= slack * (1 + 1e-9) + 1e-9


def test_whole_image_is_the_whole_image_in_every_frame() -> None:
    view = View(333, 77, 336, 84)
    whole = (0, 0, 333, 77)
    assert from_original(whole, "resized", view) == (0, 0, 336, 84)
    assert from_original(whole, "thousand", view) == (0, 0, 1000, 1000)
    assert from_original(whole, "unit", view) == (0, 0, 1, 1)
    assert from_original(whole, "original", view) == whole


def test_a_padded_pictures_frames_hold_its_offset() -> None:
    """The frame of LLaVA-1.5: a 640 x 480 picture is padded to a square of 640."""
    view = View.padded(640, 480, 336)
    assert view.canvas == (0, -80, 640, 560)
    box = (64.0, 48.0, 320.0, 240.0)
    assert from_original(box, "padded_unit", view) == (0.1, 0.2, 0.5, 0.5)
    assert to_original((0.1, 0.2, 0.5, 0.5), "padded_unit", view) == pytest.approx(box)
    assert from_original(box, "resized", view) == pytest.approx((33.6, 67.2, 168, 168))
    assert from_original(box, "unit", view) == (0.1, 0.1, 0.5, 0.5)  # the picture without its padding
    assert from_original((0, 0, 640, 480), "thousand", view) == (0, 0, 1000, 1000)
    assert View.padded(3, 8, 14).canvas == (-2, 0, 6, 8)
    assert from_original(box, "padded_unit", View.unresized(640, 480)) == from_original(box, "unit", view)
    crop = View(640, 480, 336, 336, (80, 0, 560, 480))  # the centre; padding is outside the picture
    assert from_original((0, 0, 640, 480), "padded_unit", crop) == pytest.approx((-1 / 6, 0, 7 / 6, 1))
    with pytest.raises(ValueError, match="canvas"):
        View(640, 480, 336, 336, (5, 0, 5, 480))


def test_view_uses_the_processors_own_resize() -> None:
    pytest.importorskip("transformers")
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    for width, height, low, high in [(640, 427, 3136, 1_000_000), (35, 19, 3136, 1_000_000), (3000, 90, 3136, 50_000)]:
        view = View.qwen(width, height, min_pixels=low, max_pixels=high)
        processor = Qwen2VLImageProcessorPil(size={"shortest_edge": low, "longest_edge": high})
        grid = processor(images=[Image.new("RGB", (width, height))], return_tensors="np")["image_grid_thw"][0]
        assert (view.resized_height, view.resized_width) == (grid[1] * 14, grid[2] * 14)


def test_frame_errors_name_the_allowed_frames() -> None:
    view = View.unresized(10, 10)
    with pytest.raises(ValueError, match="allowed: auto, resized"):
        to_original((1, 2), "pixels", view)
    with pytest.raises(ValueError, match="resolve_frame"):
        to_original((1, 2), "auto", view)
    with pytest.raises(ValueError, match="alternate x, y"):
        to_original((1, 2, 3), "unit", view)
    with pytest.raises(ValueError, match=r"View\.height"):
        View(3, 0, 1, 1)


@pytest.mark.parametrize(
    ("text", "frame"),
    [
        (QWEN2, "thousand"),
        ("[0.1, 0.25, 0.5, 1.0]", "unit"),
        ("[0, 0, 1, 1]", "resized"),  # without a decimal point it is a box of one pixel
        ("[0.5, 10.0, 20.0, 30.0]", "resized"),
        ('[{"bbox_2d": [1, 2, 3, 4]}]', "resized"),
        ("Track1: dog<Id1>Frame1:[1,2,3,4];</Id1>", "thousand"),
        ("nothing", "resized"),
    ],
)
def test_auto_frame_goes_by_the_answers_format(text: str, frame: str) -> None:
    parsed = parse_tracks(text) if "Track" in text else parse_boxes(text)
    assert resolve_frame(parsed, "auto") == frame  # type: ignore[arg-type]
    assert resolve_frame(parsed, "unit") == "unit"  # type: ignore[arg-type]


# ---- boxes


@pytest.mark.parametrize(
    ("text", "format", "boxes"),
    [
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]', "json", [(1, 2, 3, 4)]),
        ('```json\n[\n\t{"bbox_2d": [1, 2, 3, 4], "label": "a"}\n]\n```', "json", [(1, 2, 3, 4)]),
        ('{"bbox_2d": [1, 2, 3, 4]}', "json", [(1, 2, 3, 4)]),
        ("It's here: [{'bbox_2d': [1, 2, 3, 4], 'label': 'x'}]<|im_end|>", "json", [(1, 2, 3, 4)]),
        ('{"objects": [{"bbox_2d": [1, 2, 3, 4]}, {"bbox": [5, 6, 7, 8]}]}', "json", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        (QWEN2, "qwen2", [BOX]),
        (QWEN2 + QWEN2, "qwen2", [BOX, BOX]),
        ("<|box_start|>(1,2),(3,4)", "qwen2", [(1, 2, 3, 4)]),
        ("<|box_start|> here: [1,2,3,4]<|box_end|>", "qwen2", [(1, 2, 3, 4)]),
        ("<|box_end|><|box_start|><|box_end|> [1,2,3,4]", "qwen2", [(1, 2, 3, 4)]),
        ("The box is [1, 2.5, -3, 4e1].", "brackets", [(1, 2.5, -3, 40)]),
        ("[[1,2,3,4],[5,6,7,8]]", "brackets", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ("( 1 ,2, 3,4 )", "parens", [(1, 2, 3, 4)]),
        ("(1,2),(3,4)", "pairs", [(1, 2, 3, 4)]),
        ("(1, 2) , (3, 4)", "pairs", [(1, 2, 3, 4)]),
        # the order of formats of Perception-R1's parser, whatever comes first in the text
        ("(1,2),(3,4) then (5,6,7,8) then [9,10,11,12]", "brackets", [(9, 10, 11, 12)]),
        ("(1,2),(3,4) then (5,6,7,8)", "parens", [(5, 6, 7, 8)]),
        ("<think>[9,9,9,9]</think><answer>[1,2,3,4]</answer> [5,6,7,8]", "brackets", [(1, 2, 3, 4)]),
        ("<answer>[1,2,3,4]", "brackets", [(1, 2, 3, 4)]),
        ("[4,3,2,1]", "brackets", [(4, 3, 2, 1)]),  # inverted: returned as written; the reward decides
        ("", None, []),
        ("[1,2,3]", None, []),
        ("no box", None, []),
    ],
)
def test_every_spelling_of_a_box(text: str, format: str | None, boxes: list[tuple]) -> None:
    parsed = parse_boxes(text)
    assert parsed.format == format
    assert [item.box for item in parsed] == boxes
    assert parsed.parsable == bool(boxes)


@pytest.mark.parametrize(
    "bad",
    ["[NaN,1,2,3]", "[Infinity,1,2,3]", "[1e400,1,2,3]", '["1","2","3","4"]', "[true,1,2,3]", "[null,1,2,3]", "[1,2,3]",
     "[1,2,3,4,5]", "[[1,2],[3]]", '"1,2,3,4"', "{}", "[" + "9" * 400 + ",1,2,3]", "17", ""],
)  # fmt: skip
def test_a_malformed_item_is_dropped_and_its_neighbours_stay(bad: str) -> None:
    good = '{"bbox_2d": [1, 2, 3, 4], "label": "a"}'
    parsed = parse_boxes(f'[{good}, {{"bbox_2d": {bad}, "label": "b"}}, {good}]')
    assert [item.box for item in parsed] == [(1, 2, 3, 4)] * 2
    assert parsed.dropped == 1


@pytest.mark.parametrize("cut", range(0, 87, 3))
def test_truncated_json_keeps_the_items_before_the_break(cut: int) -> None:
    text = '[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [5, 6, 7, 8], "label": "b"}]'
    parsed = parse_boxes(text[:cut])
    numbers = text[:cut].count("4") + text[:cut].count("8")  # items that have a fourth number
    assert [item.box for item in parsed] == [(1, 2, 3, 4), (5, 6, 7, 8)][:numbers]
    for item, label in zip(parsed, "ab", strict=False):
        assert item.label == (label if f'"label": "{label}"' in text[:cut] else None)


def test_labels_scores_and_escapes() -> None:
    text = r'[{"label": "a } \"b\" é ☕", "bbox_2d": [1,2,3,4], "score": 0.25}, {"bbox_2d":[1,2,3,4],"score":true}]'
    first, second = parse_boxes(text)
    assert (first.label, first.score) == ('a } "b" é ☕', 0.25)
    assert (second.label, second.score) == (None, None)
    assert parse_boxes(QWEN2)[0].label == "The woman"
    lone = parse_boxes(r'{"bbox_2d":[1,2,3,4],"label":"\ud800"}')[0].label
    assert lone == "?"  # must be encodable for logs
    assert parse_boxes(r'{"bbox_2d":[1,2,3,4],"label":"\q"}')[0].label == r"\q"
    assert len(parse_boxes('{"bbox_2d":[1,2,3,4],"label":"%s"}' % ("x" * 10**6))[0].label or "") == 1000


def test_an_empty_list_is_an_answer_and_prose_is_not() -> None:
    for text in ("[]", "```json\n[ ]\n```", "<answer>[]</answer>", "[]<|im_end|>"):
        assert parse_boxes(text).parsable
        assert len(parse_boxes(text)) == 0
    for text in ("", "none", "[", "[{}]", "[] or so"):
        assert not parse_boxes(text).parsable


def test_items_are_bounded() -> None:
    for text in ('{"bbox_2d":[1,2,3,4]}' * 50, QWEN2 * 50, "[1,2,3,4]" * 50, "(1,2),(3,4) " * 50):
        parsed = parse_boxes(text, max_items=7)
        assert len(parsed) == 7
        assert parsed.truncated
        assert not parse_boxes(text, max_items=50).truncated
    tracks = parse_tracks("a<Id1>Frame1:[1,2,3,4];Frame2:[1,2,3,4];</Id1>" * 9, max_tracks=3, max_frames=1)
    assert (len(tracks), len(tracks[0].boxes), tracks.truncated) == (3, 1, True)


def test_objects_without_coordinates_are_read_only_so_far() -> None:
    """The JSON scan stops at its limit; the plain format, which is cheap to parse, still finds the box."""
    assert parse_boxes('{"a":1}' * 1000 + '{"bbox_2d": [1,2,3,4]}').format == "json"
    assert parse_boxes('{"a":1}' * 40000 + '{"bbox_2d": [1,2,3,4]}').format == "brackets"


# ---- points


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ('[{"point_2d": [1, 2], "label": "a"}, {"point_2d": [3, 4.5]}]', [(1, 2), (3, 4.5)]),
        ('[{"bbox_2d": [0, 0, 4, 2]}, {"point_2d": [3, 4]}]', [(2, 1), (3, 4)]),
        ("<|box_start|>(0,0),(4,2)<|box_end|><|box_start|>(7,8)<|box_end|>", [(2, 1), (7, 8)]),
        ("[1, 2] and [3, 4]", [(1, 2), (3, 4)]),
        ("(1, 2)", [(1, 2)]),
        ("(0,0),(4,2)", [(2, 1)]),  # parsed as a box: counting answers are often written so
        ("[]", []),
        ('[{"point_2d": [1, "2"]}]', []),
    ],
)
def test_every_spelling_of_a_point(text: str, points: list[tuple]) -> None:
    assert [item.point for item in parse_points(text)] == points


# ---- tracks

names = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="<>;:"), min_size=1, max_size=40)
boxes = st.tuples(*[st.integers(0, 1000).map(float)] * 4)
track = st.builds(
    Track,
    st.integers(0, 999),
    names.map(str.strip).filter(bool),
    st.dictionaries(st.integers(1, 500), boxes, min_size=1),
)


@given(st.lists(track, max_size=5))
def test_tracks_round_trip_without_loss(tracks: list[Track]) -> None:
    text = format_tracks(tracks)
    parsed = parse_tracks(text)
    assert [(t.identity, t.name, dict(t.boxes)) for t in parsed] == [
        (t.identity, t.name, dict(t.boxes)) for t in tracks
    ]
    assert format_tracks(parsed) == text


@given(st.lists(st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 4), min_size=1, max_size=3))
def test_track_coordinates_of_any_size_round_trip(values: list[tuple]) -> None:
    tracks = [Track(1, "x", dict(enumerate(values, start=1)))]
    assert [dict(t.boxes) for t in parse_tracks(format_tracks(tracks))] == [dict(t.boxes) for t in tracks]


def test_tracks_inside_prose_and_other_spellings() -> None:
    text = "Sure. Track1: big dog<Id1>Frame1:[1,2,3,4];Frame 2: [5, 6, 7, 8]</Id1>. It runs.\ncat<id2>frame3:[1,2,3,4]"
    parsed = parse_tracks(text)
    assert [(t.identity, t.name, dict(t.boxes)) for t in parsed] == [
        (1, "big dog", {1: (1, 2, 3, 4), 2: (5, 6, 7, 8)}),
        (2, "cat", {3: (1, 2, 3, 4)}),
    ]
    assert len(parse_tracks("dog<Id1></Id1> Frame1:[1,2,3,4]")) == 0  # a box outside the tags belongs to no track
    again = parse_tracks("a<Id1>Frame1:[1,2,3,4];Frame1:[9,9,9,9];Frame2:[1e999,0,0,0];</Id1>")
    assert dict(again[0].boxes) == {1: (1, 2, 3, 4)}
    assert again.dropped == 2


@pytest.mark.parametrize("name", ["", " x", "a<b", "a;b", "a:b", "a\nb", "x" * 101])
def test_a_name_that_would_not_survive_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        format_tracks([Track(1, name, {1: (0, 0, 1, 1)})])


# ---- untrusted text

HOSTILE = {
    "brackets": "[" * 10**6,
    "braces": "{" * 10**6,
    "spaced braces": "{ " * 10**6,
    "empty objects": "{}" * 10**6,
    "nested objects": "{'a':" * 10**6,
    "escaped quotes": '{"' + '\\"' * 10**6,
    "open strings": '{"' * 10**6,
    "digits": "[" + "1" * 10**7,
    "fraction": "[0." + "1" * 10**7 + ",1,2,3]",
    "number list": "[" + "1," * 10**6,
    "spaces": "[" + " " * 10**6,
    "key and spaces": '{"a"' + " " * 10**6,
    "parens": "(" * 10**6,
    "pairs": "(1,1)," * 3 * 10**5,
    "box tokens": "<|box_start|>" * 2 * 10**5,
    "half boxes": "<|box_start|>(1,2),(3," * 10**5,
    "id tags": "<Id1>" * 10**6,
    "frames": "<Id1>" + "Frame1:[1,2,3,4" * 10**5,
    "headings": "Track1:" * 10**6 + "<Id1>Frame1:[1,2,3,4]",
    "fences": "```" * 10**6,
    "think tags": "<think></think><answer>" * 10**5,
    "half tokens": "<|a" * 10**6,
    "boxes": '{"bbox_2d":[1,2,3,4]},' * 10**5,
}


@pytest.mark.gate
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_read_in_linear_time(name: str) -> None:
    """A quadratic parser would take minutes to days for each of these; a new process limits the wait."""
    code = (
        "import sys\n"
        "from fastrl.answers import *\n"
        "text = sys.stdin.read()\n"
        "for f in (parse_boxes, parse_points, parse_tracks, plain_answer, matches_grounding_format,\n"
        "          matches_json_boxes, matches_qwen2_boxes):\n"
        "    f(text)\n"
    )
    subprocess.run([sys.executable, "-c", code], input=HOSTILE[name], text=True, check=True, timeout=300)


FRAGMENTS = [
    *(
        '{"bbox_2d":',
        "[1,2,3,4]",
        "}",
        "{",
        "[",
        "]",
        ",",
        '"label":',
        '"a"',
        "'",
        '"',
        "\\",
        "NaN",
        "-Infinity",
        "1e400",
        "true",
    ),
    *("<|box_start|>", "<|box_end|>", "<|object_ref_start|>", "(1,2)", "(", ")"),
    *("<answer>", "</answer>", "```", "<Id1>", "</Id1>", "Frame1:", "Track1:", "é", "0.5"),
]
fragments = st.sampled_from([*FRAGMENTS, " ", "\n", "\ud800", "```json\n", "9" * 30])


@given(st.one_of(st.text(), st.lists(fragments, max_size=30).map("".join)))
def test_no_text_makes_a_parser_raise(text: str) -> None:
    for parse in (parse_boxes, parse_points):
        for item in parse(text):
            assert len(item.coords) in (2, 4)
            assert all(math.isfinite(v) for v in item.coords)
            (item.label or "").encode("utf-8")
    for one in parse_tracks(text):
        assert one.boxes
        assert all(math.isfinite(v) for box in one.boxes.values() for v in box)
    plain_answer(text)
    for style in ("qwen2", "qwen2_5"):
        for task in ("grounding", "counting", "detection", "ocr"):
            matches_format(task, text, style)


@given(st.lists(st.tuples(st.lists(st.integers(-9, 9999), min_size=4, max_size=4), st.text(max_size=20)), max_size=6))
def test_the_scanner_agrees_with_the_json_module(items: list) -> None:
    text = json.dumps([{"bbox_2d": box, "label": label} for box, label in items])
    parsed = parse_boxes(text)
    assert [list(item.box) for item in parsed] == [box for box, _ in items]
    clean = [label.encode("utf-8", "replace").decode().strip() or None for _, label in items]
    assert [item.label for item in parsed] == clean


# ---- writing, and the format checks

VIEW = View(200, 100, 400, 200)
TRUTHS = [
    ("grounding", {"box": (10, 20, 30, 40), "expression": "the cat"}),
    ("counting", {"label": "cat", "count": 2, "points": [(1, 2), (3, 4)], "boxes": None}),
    ("counting", {"label": "cat", "count": 1, "points": None, "boxes": [(1, 2, 3, 4)]}),
    ("detection", {"boxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "labels": ["cat", "dog"], "crowd": [False, False]}),
]


def test_answers_as_the_real_models_write_them() -> None:
    truth = {"box": (10, 20, 30, 40), "expression": "the cat"}
    assert format_answer("grounding", truth, "qwen2_5", VIEW) == '[{"bbox_2d": [20, 40, 60, 80]}]'
    assert (
        format_answer("grounding", truth, "qwen2_5", VIEW, labels=True)
        == '[{"bbox_2d": [20, 40, 60, 80], "label": "the cat"}]'
    )
    assert (
        format_answer("grounding", truth, "qwen2", VIEW)
        == "<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(50,200),(150,400)<|box_end|>"
    )
    crowd = {"boxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "labels": ["é", "dog"], "crowd": [False, True]}
    assert format_answer("detection", crowd, "qwen2_5", VIEW) == '[{"bbox_2d": [2, 4, 6, 8], "label": "é"}]'
    assert format_answer("counting", {"label": "x", "count": 0, "points": []}, "qwen2_5", VIEW) == "[]"
    assert format_answer("ocr", {"text": "a\nb"}) == "a\nb"
    assert format_answer("qa", {"choices": ["x", "y"], "answer": 1}) == "B"
    assert format_answer("qa", {"answer": "yes"}) == "yes"
    assert format_answer("caption", {"references": ["a cat"]}) == "a cat"
    tracks = {"tracks": [{"id": 3, "name": "dog", "boxes": {2: (20, 10, 40, 30)}}]}
    assert format_answer("trajectory", tracks, "qwen2_5", VIEW) == "Track1: dog<Id3>Frame2:[100,100,200,300];</Id3>"


@pytest.mark.parametrize(("task", "target"), TRUTHS)
@pytest.mark.parametrize("style", ["qwen2_5", "qwen2"])
def test_a_written_answer_has_its_own_format_and_only_that(task: str, target: dict, style: str) -> None:
    text = format_answer(task, target, style, VIEW)
    assert matches_format(task, text, style)
    assert matches_format(task, text + "<|im_end|>", style)
    assert not matches_format(task, "Sure: " + text, style)
    assert not matches_format(task, text[:-1], style)
    assert not matches_format(task, text, "qwen2" if style == "qwen2_5" else "qwen2_5")
    parsed = parse_points(text)
    truth = target.get("boxes") or target.get("points") or [target["box"]]
    assert [round_coords(t, style, VIEW)[0] for t in truth] == [item.coords[0] for item in parsed]


def test_format_answer_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="allowed: qwen2_5, qwen2"):
        format_answer("ocr", {"text": ""}, "llava")
    with pytest.raises(ValueError, match="no answer format"):
        format_answer("segmentation", {})
    with pytest.raises(ValueError, match="view is needed"):
        format_answer("grounding", {"box": (0, 0, 1, 1)})
    with pytest.raises(ValueError, match="without boxes and points"):
        format_answer("counting", {"label": "x", "count": 3, "points": None}, "qwen2_5", VIEW)


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        (QWEN2, True),
        (QWEN2 + "<|im_end|>", True),
        (QWEN2 + " ", False),
        (QWEN2 + QWEN2, False),
        ("<think>hm</think>" + QWEN2, False),
        ("<|box_start|>(1,2),(3,4)<|box_end|>", False),
        ("<", False),
    ],
)
def test_strict_qwen2_grounding_format(text: str, ok: bool) -> None:
    assert matches_grounding_format(text, "qwen2") == ok


@given(st.one_of(st.text(max_size=30), st.lists(fragments, max_size=6).map("".join)))
def test_loose_format_is_the_released_unescaped_pattern(text: str) -> None:
    released = "<|object_ref_start|>.*?<|object_ref_end|><|box_start|>.*?<|box_end|><|im_end|>"
    assert matches_grounding_format(text, "qwen2", loose=True) == (re.match(released, text) is not None)


def test_json_format_refuses_what_is_not_a_list_of_boxes() -> None:
    assert matches_json_boxes('```json\n[{"bbox_2d": [1, 2, 3, 4]}]\n```')
    coords = ("1, 2, 3, NaN", "1, 2, 3, true", "1, 2, 3", "1, 2, 3, " + "9" * 5000, "1, 2, 3, 1e999", '1, 2, 3, "4"')
    others = ("[]", "{}", "[1, 2, 3, 4]", "[" * 10**5, '```json\n[{"bbox_2d": [1, 2, 3, 4]}]')
    for text in (*('[{"bbox_2d": [' + inner + "]}]" for inner in coords), *others):
        assert not matches_json_boxes(text), text[:40]
    assert matches_json_boxes("[]", empty=True)
    assert not matches_json_boxes('[{"bbox_2d": [1, 2, 3, 4], "label": " "}]', label=True)


def test_text_helpers() -> None:
    assert strip_special_tokens("<|box_start|>(1,2)<|box_end|> <|im_end|> <|x") == "(1,2)  <|x"
    assert plain_answer("<think>a</think>```\nsome text\n```<|im_end|>") == "some text"
    assert plain_answer("text with ``` inside") == "text with ``` inside"


@pytest.mark.parametrize("blank", ["\x1c", "\x1d", "\x1e", "\x1f", "\x85", "\u2003", "\n", "\x0b"])
@pytest.mark.parametrize(
    "form", ['[{{"bbox_2d": [1, 2,{0}3{0}, 81{0}]}}]', "[1, 2,{0}3{0}, 81{0}]", "({0}1{0}, 2, 3, 81)"]
)
def test_any_blank_may_stand_around_a_number(form: str, blank: str) -> None:
    """Models write separator control characters after coordinates, which ``float`` does not strip."""
    parsed = parse_boxes(form.format(blank))
    assert [item.coords for item in parsed] == [(1.0, 2.0, 3.0, 81.0)]
