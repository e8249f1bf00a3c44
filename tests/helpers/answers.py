"""Answers to test with: lists in every form that holds several items, and texts made to be slow."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Box = Sequence[float]


@dataclass(frozen=True)
class Form:
    """One way of writing a list of boxes."""

    name: str
    item: Callable[[Box, str], str]
    join: Callable[[list[str]], str]
    labels: bool = True
    damage: str = "\"'{}[]():,\\ x7\n.-<>|/“”"  # characters that may be put in anywhere


def _numbers(box: Box) -> list[int]:
    return [int(v) for v in box]


def _json(box: Box, name: str) -> str:
    return json.dumps({"bbox_2d": _numbers(box), "label": name}, ensure_ascii=False)


FORMS = (
    Form("json", _json, lambda items: f"[{', '.join(items)}]"),
    Form("fenced", _json, lambda items: "```json\n[\n\t" + ",\n\t".join(items) + "\n]\n```"),
    Form(
        "label first",
        lambda box, name: json.dumps({"label": name, "bbox_2d": _numbers(box)}, ensure_ascii=False),
        lambda items: f"[{','.join(items)}]",
    ),
    Form("lines", _json, "\n".join),
    Form("wrapped", _json, lambda items: f'{{"objects": [{", ".join(items)}]}}'),
    Form(
        "qwen2",
        lambda box, name: (
            f"<|object_ref_start|>{name}<|object_ref_end|><|box_start|>({{}},{{}}),({{}},{{}})<|box_end|>".format(
                *_numbers(box)
            )
        ),
        "".join,
    ),
    Form("internvl", lambda box, name: f"<ref>{name}</ref><box>[{_numbers(box)}]</box>", "".join),
    Form("brackets", lambda box, name: str(_numbers(box)), ", ".join, labels=False),
    Form("scored", lambda box, name: _json(box, name)[:-1] + ', "score": 0.5}', lambda items: f"[{', '.join(items)}]"),
)


def list_of_boxes(n: int) -> str:
    """A JSON list of about ``n`` characters."""
    return "[" + ", ".join(['{"bbox_2d": [1, 2, 300, 400], "label": "dog"}'] * (n // 48)) + "]"


def hostile_texts() -> dict[str, Callable[[int], str]]:
    """Texts of about ``n`` characters, each of which a careless parser reads again and again."""
    units = {
        "brackets": "[",
        "braces": "{",
        "spaced braces": "{ ",
        "objects": "{}",
        "nested": "{'a':",
        "keys": '{"a":1,',
        "open strings": '{"a":"x, ',
        "two quotes": '{"a":\'x, "b":"y\', ',
        "escaped": '{"a":"' + '\\"',
        "curly": '{"a":“x, ',
        "half objects": '{"bbox_2d": [1, 2, 3, 4], "label": "b" 27"',
        "half keys": '"bbox_2d" ',
        "half numbers": '"bbox_2d": [1, 2, ',
        "blanks": '{"a" ' + " " * 50,
        "pairs": "(1,1),",
        "half pairs": "(1,",
        "falling pairs": "(9,9),(1,1),(5,5) ",
        "box tokens": "<|box_start|>",
        "boxes": "<box>[[1,2,3,4]]</box>",
        "references": "<|object_ref_start|>a",
        "points": '<point x="1" y="2',
        "locations": "<loc0001>",
        "tags": "<points x1=1 y1=2 alt='",
        "words": "word ",
        "digits": "9",
    }
    return {name: lambda n, unit=unit: unit * (n // len(unit)) for name, unit in units.items()}
