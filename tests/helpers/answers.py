"""Answers for tests: lists in every format that holds several items, and texts that are slow to parse naively."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Box = Sequence[float]


def _same(box: Box) -> Box:
    return box


def _last(box: Box) -> str:
    return str(int(box[3]))


@dataclass(frozen=True)
class Form:
    """A format for lists of boxes."""

    name: str
    item: Callable[[Box, str], str]
    join: Callable[[list[str]], str]
    labels: bool = True
    damage: str = "\"'{}[]():,\\ x7\n.-<>|/“”‘’：，［］"  # characters that may be inserted anywhere
    read: Callable[[Box], Box] = _same  # the numbers that the parser returns
    last: Callable[[Box], str] = _last  # the characters that end an item's numbers


def _numbers(box: Box) -> list[int]:
    return [int(v) for v in box]


def _json(box: Box, name: str) -> str:
    return json.dumps({"bbox_2d": _numbers(box), "label": name}, ensure_ascii=False)


def _array(box: Box) -> str:
    """As numpy prints it."""
    return f"[{' '.join(map(str, _numbers(box)))}]"


def _objects(make: Callable[[list[int], str], object]) -> Callable[[Box, str], str]:
    return lambda box, name: json.dumps(make(_numbers(box), name), ensure_ascii=False)


def _listed(items: list[str]) -> str:
    return f"[{', '.join(items)}]"


def _named(box: Sequence[int], names: str = "x1 y1 x2 y2") -> dict[str, int]:
    return dict(zip(names.split(), box, strict=True))


FORMS = (
    Form("json", _json, _listed),
    Form("fenced", _json, lambda items: "```json\n[\n\t" + ",\n\t".join(items) + "\n]\n```"),
    Form("label first", _objects(lambda box, name: {"label": name, "bbox_2d": box}), lambda i: f"[{','.join(i)}]"),
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
    Form("scored", lambda box, name: _json(box, name)[:-1] + ', "score": 0.5}', _listed),
    Form("Python", lambda box, name: repr({"bbox_2d": _numbers(box), "label": name}), _listed),
    Form("indented", lambda box, name: json.dumps({"bbox": _numbers(box), "class_name": name}, indent=2), ",\n".join),
    Form("two corners", _objects(lambda box, name: {"bbox_2d": [box[:2], box[2:]], "label": name}), _listed),
    Form("named corners", _objects(lambda box, name: {"category": name, **_named(box)}), _listed),
    Form("nested", _objects(lambda box, name: {"bbox": _named(box, "xmin ymin xmax ymax"), "Name": name}), _listed),
    Form("quoted list", _objects(lambda box, name: {"bbox_2d": str(box), "label": name}), _listed),
    Form(
        "full width",
        lambda box, name: f'{{"bbox_2d"：［{"，".join(map(str, _numbers(box)))}］，"label"：{json.dumps(name)}}}',
        "，".join,
    ),
    Form("YAML", lambda box, name: f"- label: {json.dumps(name)}\n  bbox: {_numbers(box)}", "\n".join),
    Form("calls", lambda box, name: f"Box(bbox={_numbers(box)}, label={name!r})", _listed),
    Form("backticks", lambda box, name: f"{{`bbox`: {_numbers(box)}, `name`: `{name}`}}", _listed),
    Form("guillemets", lambda box, name: f"{{«bbox»: {_numbers(box)}, «name»: «{name}»}}", _listed),
    Form("blanks", lambda box, name: _json(box, name).replace(str(_numbers(box)), _array(box)), _listed),
    Form("dashes", lambda box, name: f"- bbox_2d: {_numbers(box)}\n  label: {json.dumps(name)}", "\n".join),
    Form("glm", _json, lambda items: f"<|begin_of_box|>{_listed(items)}<|end_of_box|>"),
    Form(
        "gemma",
        _objects(lambda box, name: {"box_2d": [box[1], box[0], box[3], box[2]], "label": name}),
        _listed,
        last=lambda box: str(int(box[2])),
    ),
    Form(
        "llava",
        lambda box, name: f"[{', '.join(f'{v / 1000:.3f}' for v in box)}]",
        ", ".join,
        labels=False,
        read=lambda box: [float(f"{v / 1000:.3f}") for v in box],
        last=lambda box: f"{box[3] / 1000:.3f}",
    ),
    Form(
        "paligemma",
        lambda box, name: "".join(f"<loc{int(box[i]):04d}>" for i in (1, 0, 3, 2)) + f" {name.replace(';', ',')}",
        " ; ".join,
        read=lambda box: [v / 1024 for v in box],
        last=lambda box: f"<loc{int(box[2]):04d}>",
    ),
    Form("parentheses", lambda box, name: str(tuple(_numbers(box))), ", ".join, labels=False),
    Form("bare corners", lambda box, name: str([_numbers(box)[:2], _numbers(box)[2:]]), "\n".join, labels=False),
    Form("pairs", lambda box, name: "({},{}),({},{})".format(*_numbers(box)), "\n".join, labels=False),
)


@dataclass(frozen=True)
class PointForm:
    """A format for lists of points."""

    name: str
    item: Callable[[int, tuple[int, int], str], str]  # (number from 1, point, label)
    join: Callable[[list[str]], str]
    labels: bool = True
    scale: float = 1.0  # of the numbers that the parser returns
    damage: str = FORMS[0].damage


def _points(make: Callable[[list[int], str], object]) -> Callable[[int, tuple[int, int], str], str]:
    return lambda _, point, name: json.dumps(make(list(point), name), ensure_ascii=False)


POINT_FORMS = (
    PointForm("json", _points(lambda point, name: {"point_2d": point, "label": name}), _listed),
    PointForm("label first", _points(lambda point, name: {"label": name, "point": point}), _listed),
    PointForm("named", _points(lambda point, name: {"x": point[0], "y": point[1], "label": name}), _listed),
    PointForm("nested", _points(lambda p, name: {"point": {"x": p[0], "y": p[1]}, "label": name}), _listed),
    PointForm("lists", lambda _, point, name: str(list(point)), _listed, labels=False),
    PointForm("pairs", lambda _, point, name: str(point), ", ".join, labels=False),
    PointForm(
        "molmo",
        lambda _, p, name: f'<point x="{p[0] / 10:.1f}" y="{p[1] / 10:.1f}" alt="{name}">{name}</point>',
        " ".join,
        scale=0.001,
    ),
    PointForm(
        "molmo, many",
        lambda n, p, name: f'x{n}="{p[0] / 10:.1f}" y{n}="{p[1] / 10:.1f}"',
        lambda items: f'<points {" ".join(items)} alt="cats">cats</points>',
        labels=False,
        scale=0.001,
    ),
)


def list_of_boxes(n: int) -> str:
    """A JSON list of about ``n`` characters."""
    return "[" + ", ".join(['{"bbox_2d": [1, 2, 300, 400], "label": "dog"}'] * (n // 48)) + "]"


def hostile_texts() -> dict[str, Callable[[int], str]]:
    """Texts of about ``n`` characters that take a naive parser quadratic time."""
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
        "dashes": "- ",
        "lines of keys": '\n- "bbox_2d": "[1, 2, ',
        "digits": "9",
        "JSON in JSON": r"{\n\"a\": \"x\", ",
        "backticks": "{`a`: `x, ",
        "guillemets": "{«a»: «x, ",
        "many strings": '"a": ["x", ',
        "YAML": "\n- a b: [1 2; 3\n",
        "marked numbers": "<box>1 2 3,",
        "lists of objects": '"boxes": [{"x": 1}',
    }
    return {name: lambda n, unit=unit: unit * (n // len(unit)) for name, unit in units.items()}
