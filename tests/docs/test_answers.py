"""Every row of the tables in ``docs/answers.md`` is true: each has examples here, parsed as the row says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fastrl.answers import FAMILIES, STYLES, parse_boxes, parse_points, parse_tracks, style_of
from fastrl.data.records import Record
from fastrl.rewards import reward_for
from fastrl.rewards.ocr import text_similarity

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "answers.md").read_text(encoding="utf-8")
BOX = (12.0, 34.0, 56.0, 78.0)


def rows(heading: str) -> dict[str, list[list[str]]]:
    """Rows of the tables under a heading, by their first cell; several tables may have the same one."""
    part = next(part for part in PAGE.split("\n## ") if part.startswith(heading))
    lines = [line for line in part.splitlines() if line.startswith("|") and not line.startswith("|---")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    heads = {line for line, after in zip(part.splitlines(), part.splitlines()[1:], strict=False) if after[:4] == "|---"}
    found: dict[str, list[list[str]]] = {}
    for line, row in zip(lines, cells, strict=True):
        if line not in heads:
            found.setdefault(row[0], []).append(row[1:])
    return found


def codes(text: str) -> list[str]:
    """The texts in backticks."""
    return [code.replace("\\|", "|") for code in re.findall(r"`+([^`]+)`+", text)]


def boxes(text: str) -> list[tuple[float, ...]]:
    return [item.coords for item in parse_boxes(text)]


def points(text: str) -> list[tuple[float, float]]:
    return [item.point for item in parse_points(text)]


def scores(text: str) -> list[float | None]:
    return [item.score for item in parse_boxes(text)]


def labels(text: str) -> list[str | None]:
    return [item.label for item in parse_boxes(text)]


# ---- the format of the answer


OTHER_ENDS = {"<|begin_of": "<|end_of_thought|>", "<|channel": "<channel|>", "<unused": "<unused95>"}


def thoughts(cell: str) -> None:
    for tag in codes(cell):
        if tag in ("&gt;", ">"):
            continue
        other = next((end for start, end in OTHER_ENDS.items() if tag.startswith(start)), "")
        changed = (
            () if "thought" in tag and ">" not in tag[-1:] else (tag.replace(">", ' a="1">'), tag.replace(">", ""))
        )
        for form in (tag, tag.upper(), *changed):
            end = form.replace("<|", "<|/").replace("[", "[/").replace("◁", "◁/")
            end = other or (end if "|" in end else end.replace("<", "</"))
            assert not parse_boxes(f"{form}\n[1, 2, 3, 4]").parsable, form
            assert boxes(f"{form}\n[1, 2, 3, 4]{end} [12, 34, 56, 78]") == [BOX], form


def answer_tags(cell: str) -> None:
    assert boxes("[1, 2, 3, 4] <Answer>[12, 34, 56, 78]</ANSWER> [1, 2, 3, 4]") == [BOX]
    assert boxes("[1, 2, 3, 4] <answer>[12, 34, 56, 78]") == [BOX]
    assert boxes('[1, 2, 3, 4] <answer type="json">[12, 34, 56, 78]</answer><answer>[1, 2, 3, 4]</answer>') == [BOX]
    assert boxes("[1, 2, 3, 4] <answer [12, 34, 56, 78]</answer [1, 2, 3, 4]") == [BOX]


def wrappings(cell: str) -> None:
    for text in ("```json\n{}\n```", "<|im_start|>{}<|im_end|>", "It is at {}, I think."):
        assert boxes(text.format("[12, 34, 56, 78]")) == [BOX]


def fenced_text(cell: str) -> None:
    fences = ("```\npage\n```", "````md\npage\n````", "```\npage")
    for text in (
        *fences,
        "<|im_start|>page<|im_end|>",
        "<answer>page</answer>",
        "page</s>",
        "```\npage\n```<end_of_turn>",
    ):
        assert text_similarity(text, "page") == 1.0
    for page in ("```\npage\n```", "a <answer> b", "x <|name|> y"):
        assert text_similarity(page, page) == 1.0


REPLIES: Mapping[str, Callable[[str], None]] = {
    "thoughts": thoughts,
    "`<answer>…</answer>`": answer_tags,
    "Markdown fences": wrappings,
    "text tasks": fenced_text,
}

# ---- coordinates: an example of each row and how it is parsed

WRITTEN: Mapping[str, list[tuple[Callable[[str], Any], str, Any]]] = {
    "an entry `bbox_2d`": [
        (boxes, json.dumps({name: [12, 34, 56, 78]}), [BOX])
        for name in ("bbox_2d", "BBox2D", "bbox", "box", "bboxes", "Boxes", "boundingBox", "coordinates")
    ],
    "`box_2d`": [(boxes, '{"box_2d": [34, 12, 78, 56]}', [BOX])],
    "`point_2d`": [
        *((points, json.dumps({name: [12, 34]}), [(12, 34)]) for name in ("point_2d", "point", "points", "center")),
        (points, '{"x": 12, "y": 34}', [(12, 34)]),
        (boxes, '{"point_2d": [12, 34]}', []),
    ],
    "`[[12, 34], [56, 78]]` under": [(boxes, '{"bbox": [[12, 34], [56, 78]]}', [BOX])],
    '`"[12, 34, 56, 78]"`': [(boxes, '{"bbox_2d": "[12, 34, 56, 78]"}', [BOX])],
    "`[[1, 2, 3, 4], [5, 6, 7, 8]]`": [
        (boxes, '{"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]], "label": "a"}', [(1, 2, 3, 4), (5, 6, 7, 8)]),
        (labels, '{"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]], "label": "a"}', ["a", "a"]),
        (labels, '{"bboxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "labels": ["a", "b"]}', ["a", "b"]),
        (labels, '{"bboxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "labels": ["a", "b", "c"]}', [None, None]),
        (labels, '{"bboxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "labels": ["a", 3]}', ["a", None]),
        (labels, '{"bboxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "labels": ["a", "b", ]}', ["a", "b"]),
        (scores, '{"scores": [0.5, 0.25], "bboxes": [[1, 2, 3, 4], [5, 6, 7, 8]]}', [0.5, 0.25]),
    ],
    "`[{…}, {…}]`": [
        (boxes, '{"boxes": [{"bbox": [1, 2, 3, 4]}, {"bbox": [5, 6, 7, 8]}]}', [(1, 2, 3, 4), (5, 6, 7, 8)]),
        (labels, '{"label": "a", "boxes": [{"bbox": [1, 2, 3, 4]}, {"bbox": [5, 6, 7, 8], "name": "b"}]}', ["a", "b"]),
        (labels, '{"boxes": [{"bbox": [1, 2, 3, 4]}, {"bbox": [5, 6, 7, 8]}], "label": "a"}', ["a", "a"]),
        (points, '{"points": [{"x": 1, "y": 2}, {"x": 3, "y": 4}]}', [(1, 2), (3, 4)]),
        (labels, '{"bbox": {"bbox": [1, 2, 3, 4]}, "label": "a"}', ["a"]),
        (lambda text: parse_boxes(text).dropped, '{"bbox": {"bbox": [1, 2, 3, 4]}, "label": "a"}', 0),
        (lambda text: parse_points(text).dropped, '{"points": [{"x": 1, "y": 2}, {"x": 3, "y": 4}]}', 0),
    ],
    "entries `x1 y1 x2 y2`": [
        (boxes, text.format(**{k: json.dumps(dict(zip(k.split("_"), map(int, BOX), strict=True)))}), [BOX])
        for k in ("x1_y1_x2_y2", "x0_y0_x1_y1", "xmin_ymin_xmax_ymax", "left_top_right_bottom")
        for text in (f"{{{k}}}", f'{{{{"bbox": {{{k}}}}}}}')
    ],
    "`<|box_start|>": [
        (boxes, "<|object_ref_start|>a<|object_ref_end|><|box_start|>(12,34),(56,78)<|box_end|>", [BOX]),
        (labels, "<|object_ref_start|>a<|object_ref_end|><|box_start|>(12,34),(56,78)<|box_end|>", ["a"]),
    ],
    "`<ref>label</ref>": [
        (boxes, "<ref>a</ref><box>[[12, 34, 56, 78]]</box>", [BOX]),
        (labels, "<ref>a</ref><box>[[12, 34, 56, 78]]</box>", ["a"]),
    ],
    "`<point x=": [
        (points, '<point x="63.5" y="44.5" alt="a">a</point>', [(0.635, 0.445)]),
        (points, '<points x1="1" y1="2" x2="3" y2="4" alt="a">a</points>', [(0.01, 0.02), (0.03, 0.04)]),
    ],
    "`<|begin_of_box|>": [
        (boxes, "<|begin_of_box|>[[12,34,56,78]]<|end_of_box|>", [BOX]),
        (lambda text: text_similarity(text, "page"), "so: <|begin_of_box|>page<|end_of_box|>", 1.0),
    ],
    "`<loc0010>": [
        (boxes, "<loc0256><loc0128><loc0512><loc0768> a", [(0.125, 0.25, 0.75, 0.5)]),
        (labels, "<loc0256><loc0128><loc0512><loc0768> a", ["a"]),
    ],
    "`[12, 34, 56, 78]`, `(": [
        (boxes, "[12, 34, 56, 78]", [BOX]),
        (boxes, "(12, 34, 56, 78)", [BOX]),
        (points, "[0, 0, 4, 2], [90, 12], [5, 5, 7, 7]", [(2, 1), (90, 12), (6, 6)]),
        (boxes, "[12, 34, 56, 78], [90, 12]", [BOX]),
    ],
    "`[[12, 34], [56, 78]]` alone": [
        (boxes, "[[12, 34], [56, 78]]", [BOX]),
        (points, "[[12, 34], [56, 78]]", [(12, 34), (56, 78)]),
    ],
    "`(1, 2), (3, 4)`": [
        (boxes, "(1, 2), (3, 4)", [(1, 2, 3, 4)]),
        (boxes, "(1, 2), (3, 4), (5, 6), (7, 8)", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        (points, "(1, 2), (3, 4), (5, 6)", [(1, 2), (3, 4), (5, 6)]),
        (boxes, "(1, 2), (3, 4), (5, 6)", []),
    ],
    "`[]` and": [(lambda text: (parse_boxes(text).parsable, len(parse_boxes(text))), "[]", (True, 0))],
    "`Track1:": [
        (
            lambda text: [(t.name, dict(t.boxes)) for t in parse_tracks(text)],
            "Track1: dog<Id1>Frame1:[1,2,3,4];Frame3:[5,6,7,8];</Id1>",
            [("dog", {1: (1, 2, 3, 4), 3: (5, 6, 7, 8)})],
        ),
        *(
            (
                lambda text: [(t.name, dict(t.boxes), parse_tracks(text).dropped) for t in parse_tracks(text)],
                f"dog<Id1>{frame};Frame3:[5,6,7,8];</Id1>",
                [("dog", {1: (1, 2, 3, 4), 3: (5, 6, 7, 8)}, 0)],
            )
            for frame in (
                *(
                    "Frame1:(1,2,3,4)",
                    "frame 1 : [1 2 3 4]",
                    "Frame1:1,2,3,4",
                    "Frame1[1,2,3,4]",
                    "FRAME_1=[[1,2,3,4]]",
                ),
                *("Frame1:[1,2,3,4", "Frame１：［1，2，3，4］"),
            )
        ),
    ],
}


def counted(text: str) -> tuple[int, int]:
    parsed = parse_boxes(text)
    return len(parsed), parsed.dropped


def scored(task: str, target: dict[str, Any], text: str, **options: Any) -> dict[str, float]:
    record = Record("a", task, (), (), target, frame="original")
    return {name: values[0] for name, values in reward_for(task, format="none", **options)([text], record).items()}


COUNT = {"label": "a", "count": 2, "points": [(5.0, 5.0), (9.0, 9.0)], "boxes": None}
NOT_READ: Mapping[str, list[tuple[Callable[[str], Any], str, Any]]] = {
    "numbers that are not finite": [
        (counted, json.dumps([{"bbox_2d": value}, {"bbox_2d": [1, 2, 3, 4]}]), (1, 1))
        for value in (
            [1, 2, 3, float("inf")],
            [1, 2, 3, int("9" * 25)],
            ["1", "2", "3", "4"],
            [True, 2, 3, 4],
            [None, 2, 3, 4],
            [1, 2, 3],
            "1, 2, 3, 4",
        )
    ]
    + [
        (counted, f'[{{"bbox_2d": {value}}}, {{"bbox_2d": [1, 2, 3, 4]}}]', (1, 1))
        for value in (
            "[12px, 34px, 56px, 78px]",
            "[10%, 20%, 30%, 40%]",
            "[1, 2, NaN, 4]",
            "[0x1, 2, 3, 4]",
            "{1, 2, 3, 4}",
        )
    ],
    "an entry whose name": [(counted, '[{"xbxbx": [1, 2, 3, 4]}, {"bbox_2d": [1, 2, 3, 4]}]', (1, 0))],
    "a second format": [(counted, '{"bbox_2d": [1, 2, 3, 4]} [5, 6, 7, 8]', (1, 0))],
    "items after the first": [
        (lambda text: len(parse_boxes(text, 2)), "[1, 2, 3, 4]" * 3, 2),
        (
            lambda text: scored("counting", COUNT, text, score_by="count", max_items=2)["points"],
            "[1, 1, 9, 9]" * 3,
            0.0,
        ),
    ],
    "a box whose corners": [
        (counted, "[4, 3, 2, 1]", (1, 0)),
        (lambda text: scored("grounding", {"box": [1, 2, 4, 3], "expression": ""}, text)["iou"], "[4, 3, 1, 2]", 0.0),
        (
            lambda text: reward_for("counting").diagnose([text], [Record("a", "counting", (), (), COUNT)])["dropped"],
            "[4, 3, 2, 1]",
            [1],
        ),
    ],
    "in a track": [
        (
            lambda text: (len(parse_tracks(text)), parse_tracks(text).dropped),
            f"a<Id1>Frame1:[1,2,3,4];{damaged};</Id1> b<Id2></Id2>",
            (1, 1),
        )
        for damaged in (
            *("Frame1:[1,2,3,4]", "Frame2:[1,2,x,4]", "Frame2:[1,2,3]", "Frame2:[1,2,3,4,5]", "Frame2:(1,2,NaN,4)"),
            *('Frame2:["1","2","3","4"]', "Frame2[1,2"),
        )
    ],
}


def label_names(cell: str) -> None:
    for name in codes(cell):
        for written in (name, name.upper(), name.replace("_", "")):
            assert labels(json.dumps({"bbox_2d": [1, 2, 3, 4], written: "dog"})) == ["dog"], written
    assert labels('{"bbox_2d": [1, 2, 3, 4], "name": 7, "class": "dog"}') == ["dog"]


def score_names(cell: str) -> None:
    for name in codes(cell):
        for value in (0.25, "0.25", "25%"):
            (item,) = parse_boxes(json.dumps({"bbox_2d": [1, 2, 3, 4], name.upper(): value}))
            assert item.score == 0.25, name


def no_label(cell: str) -> None:
    for entry in ({"class_id": 3}, {"label": 3}, {"colour": "red"}):
        assert parse_boxes(json.dumps({"bbox_2d": [1, 2, 3, 4], **entry})).unlabelled == 1


LABELS: Mapping[str, Callable[[str], None]] = {
    "`label`": label_names,
    "`score`": score_names,
    "`class_id`": no_label,
}


def test_every_row_has_its_examples() -> None:
    for heading, checks in (
        ("What the answer is", [*REPLIES]),
        ("Coordinates", [*WRITTEN, *NOT_READ]),
        ("Labels and scores", [*LABELS]),
    ):
        cells = [cell for cell, found in rows(heading).items() for _ in found]
        assert len(cells) == len(checks), heading
        for cell, start in zip(cells, checks, strict=True):
            assert cell.replace("\\|", "|").startswith(start), cell


@pytest.mark.parametrize(("heading", "checks"), [("What the answer is", REPLIES), ("Labels and scores", LABELS)])
def test_rows_with_names(heading: str, checks: Mapping[str, Callable[[str], None]]) -> None:
    for cell, check in zip(rows(heading), checks.values(), strict=True):
        check(cell)


@pytest.mark.parametrize(
    ("read", "text", "want"), [example for examples in (*WRITTEN.values(), *NOT_READ.values()) for example in examples]
)
def test_an_example_is_read_as_its_row_says(read: Callable[[str], Any], text: str, want: Any) -> None:
    assert read(text) == want


def test_every_family_has_its_row() -> None:
    listed = {
        name: row for cell, (row,) in rows("Families and frames").items() for name in codes(cell) if "(" not in name
    }
    assert set(listed) == set(FAMILIES)
    for name, (_, frame) in listed.items():
        style = style_of(name)
        assert style in STYLES.values()
        if frame.startswith("`"):
            assert style.frame == codes(frame)[0], name
        else:  # per cent, 1024 steps: the parser makes them parts of the sides
            assert style.frame == "unit", name
