"""Error-tolerant reading of JSON-like objects in a model's text: damage affects only the entry in which it occurs.

A model may forget a brace, write a quote inside a label or stop in the middle. A JSON decoder then loses the whole
text, and a parser that pairs quotes misreads everything after the error. This one anchors on *keys*: a short quoted
name followed by a colon. After a key it reads one value, then expects another key, a brace or a bracket; at anything
else it abandons the structure and searches for the next key, in the same object or at the start of the next.

A string ends at a quote that is followed by the end of an entry (``,`` ``}`` ``]``, another key), so a quote inside a
label is part of it; a string without such an end extends to the next key.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Set
from dataclasses import dataclass, field, replace

from fastrl.answers.scan import MAX_LABEL, NUMBER, Scanner, clean_label, numbers

MAX_DEPTH = 32
_KEYS_PER_OBJECT = 32  # keys read per requested object (plus 1000 in total, for objects without coordinates)

_OPENING, _CLOSING = "\"'`“‘„‚«‹＂＇", "\"'`”’“‘»›＂＇"
_QUOTED = (  # a quote too many, or a backslash before it, changes nothing
    rf"(?:\\?+[{_OPENING}]){{1,2}}+(?P<key>[^{_OPENING}{_CLOSING}\\\n{{}}\[\]():,]{{1,60}}+)"
    rf"(?:\\?+[{_CLOSING}]){{1,2}}+"
)
_BARE = r"(?P<bare>[A-Za-z_][A-Za-z0-9_]{0,60}+)"
_COLON = r"\s*+[:=]"
_FORGOTTEN = r"\s*+(?=\[)"  # a list at once: the colon is missing
_KEY = rf"(?:{_QUOTED}(?:{_COLON}|{_FORGOTTEN})|{_BARE}{_COLON})"


def _again(pattern: str) -> str:
    """The pattern without group names, so that it can be used twice."""
    return re.sub(r"\(\?P<\w+>", "(?:", pattern)


_ALONE = _QUOTED.replace("<key>", "<alone>")
_HALF = r"(?<![A-Za-z0-9_<|/])(?P<half>[A-Za-z][A-Za-z0-9_]{0,60}+)"  # a quote is missing or something else is there
_DASH = r"(?:(?<=\s)(?P<dash>-)[ \t]++)?+"  # YAML's, before an item of a list
_LINE = r"(?<![^\n])[ \t]{0,40}+(?P<item>-)[ \t]++(?P<line>[A-Za-z_][A-Za-z0-9_ -]{0,60}+):(?=\s)"  # YAML's
_START = re.compile(
    rf"(?P<brace>[{{(])\s*+{_KEY}|{_LINE}|{_DASH}(?:{_ALONE}(?:{_COLON}|{_FORGOTTEN})"
    rf"|{_HALF}(?:(?<=2d)[^\w\[\]]{{0,8}}+|\\?+[{_OPENING}{_CLOSING}](?:{_COLON})?+\s*+)(?=\[))",
    re.IGNORECASE,
)
_NEXT = re.compile(rf"[\s,;\]]*+(?:(?P<close>\}})|(?P<open>\{{)|{_KEY}|)")
_RUN = re.compile(rf"(?:{NUMBER}|[\[\](),;\s])*+")
_QUOTED_RUN = re.compile(rf"(?:.(?P<run>\s*+[\[(]{_RUN.pattern}))?+")
_WORD = re.compile(rf"[^,;\[\]{{}}{_OPENING}:\n]{{0,200}}+")
_NO_TEXT = ("", "null", "none", "true", "false")
_LIST = re.compile(r"[^\[\]()]+")
_CLOSED = r"(?P<closed>[ \t]*+(?=\n)|\s*+(?=[,;\]})]|\Z))?+"
_STRINGS = {  # by the opening quote: a whole string, and where a damaged one ends
    opening: (
        re.compile(rf"{opening}(?P<body>{body})(?:(?P<end>{closing}){_CLOSED}|)", re.DOTALL),
        re.compile(
            rf"(?P<end>[{_CLOSING}])(?:[ \t]*+(?=\n)|\s*+)(?=\n|[\]}})]|\Z|[,;]?+\s*+(?:{_again(_KEY)})|[,;]\s*+[\[{{])"
            rf"|[{{(]\s*+(?:{_again(_KEY)})|(?:[,;]|\n(?:[ \t]*+-)?+)\s*+(?:{_again(_KEY)})"
        ),
    )
    for opening, closing, body in (
        ('"', '"', r'(?:[^"\\]++|\\.)*+'),
        ("'", "'", r"(?:[^'\\]++|\\.)*+"),
        ("`", "`", "[^`]*+"),
        ("＂", "＂", "[^＂]*+"),
        ("＇", "＇", "[^＇]*+"),
        ("“", "”", "[^“”]*+"),
        ("‘", "’", "[^‘’]*+"),
        ("„", "[“”]", "[^„“”]*+"),
        ("‚", "[‘’]", "[^‚‘’]*+"),
        ("«", "»", "[^«»]*+"),
        ("‹", "›", "[^‹›]*+"),
    )
}
_AROUND = "\\ \t\r\n,;[]{}" + _OPENING + _CLOSING  # no part of a damaged label
_AND = re.compile(r"(?:\s*+,\s*+(?=[" + _OPENING + r"]))?+")
_ENDED = re.compile(r"(?P<ended>\s*+,?+\s*+(?:\]|\Z))?+")
_ESCAPE = re.compile(r"\\")


@dataclass(slots=True)
class Value:
    """One value: texts, or lists of numbers (a malformed list is None), or neither."""

    texts: tuple[str | None, ...] = ()
    lists: tuple[tuple[float, ...] | None, ...] = ()
    scalar: float | None = None
    decimal: bool = False  # a number is written with a decimal point
    holds: bool = False  # a list of objects

    @property
    def text(self) -> str | None:
        """The text, or the first of several."""
        return self.texts[0] if self.texts else None


_NOTHING = Value()


@dataclass(slots=True, eq=False)
class Found:
    """The entries of one object, by the lower-case letters and digits of their names."""

    values: dict[str, Value] = field(default_factory=dict)
    wanted: bool = False
    around: Found | None = None  # the object whose wanted entry is a list of such as this one
    holds: bool = False  # is one around a wanted object


def key_name(key: str) -> str:
    """``BBox_2D`` → ``bbox2d``."""
    return "".join(c for c in key.casefold() if c.isalnum())


def read_objects(scan: Scanner, wanted: Set[str], limit: int) -> tuple[list[Found], bool]:
    """Objects with an entry named in ``wanted``, in the order of these entries, at most ``limit`` + 1; and whether
    reading stopped before the end of the text.
    """
    found: list[Found] = []
    stack: list[Found] = []
    budget = _KEYS_PER_OBJECT * limit + 1000
    while (start := scan.seek(_START)) is not None:
        if start["brace"] is not None or not stack:
            _push(stack, Found())
        elif start["dash"] is not None or start["item"] is not None:
            stack[-1] = Found()
        key = start["key"] or start["bare"] or start["alone"] or start["half"] or start["line"]
        while key is not None:
            budget -= 1
            if len(found) > limit or budget < 0:
                return found, True
            key = _entry(scan, stack, found, key_name(key), wanted)
    return found, False


def _entry(scan: Scanner, stack: list[Found], found: list[Found], name: str, wanted: Set[str]) -> str | None:
    """Read the value of an entry and what follows it; returns the next key, or None if the structure ends."""
    top = stack[-1]
    itself = len(stack) > 1 and stack[-2] is top and top.values.get(name) == _NOTHING  # {"bbox": {"bbox": […]}}
    if name in top.values and top.wanted and not itself:  # a repeated key: a brace is missing
        top = stack[-1] = Found()
    if name in wanted and not top.wanted:
        top.wanted = True
        found.append(top)
        if top.around is not None:
            top.around.holds = True
    value = _value(scan)
    top.values[name] = value
    inside = value == _NOTHING and name in wanted  # {"bbox": {"x1": …}}: entries of the object itself
    around = top if value.holds and name in wanted else None  # {"boxes": [{"x1": …}, …]}: objects of its own
    while True:
        step = scan.at(_NEXT)
        if step["open"] is not None:
            _push(stack, top if inside else Found(around=around))
        elif step["close"] is not None:
            around = stack.pop().around
            if not stack:
                return None
        else:
            return step["key"] or step["bare"]
        inside = False


def _push(stack: list[Found], item: Found) -> None:
    if len(stack) == MAX_DEPTH:
        del stack[0]
    stack.append(item)


def _value(scan: Scanner) -> Value:
    run = scan.at(_RUN).group()
    digits = run.strip()
    if digits in ("", "[") and scan.plain.startswith("\\", scan.position):
        scan.at(_ESCAPE)
    following = scan.plain[scan.position : scan.position + 1]
    if digits in ("", "[") and following in _STRINGS:
        held = _NOTHING if digits else _quoted_list(scan)
        return held if held.lists else Value(texts=_strings(scan, following, many=bool(digits)))
    if not digits:
        word = "" if following == "{" else scan.at(_WORD).group().strip()
        return Value(texts=(clean_label(word),)) if word.casefold() not in _NO_TEXT else _NOTHING
    if following == "{" and not digits.strip("[( \t\r\n"):
        return Value(holds=True)
    return _numbers(run, following)


def _strings(scan: Scanner, opening: str, many: bool) -> tuple[str | None, ...]:
    """One string, or all of a list."""
    found = [_string(scan, opening)]
    while many and scan.at(_AND).group() and (opening := scan.plain[scan.position : scan.position + 1]) in _STRINGS:
        found.append(_string(scan, opening))
    if many and scan.at(_ENDED)["ended"] is None:
        found.append(None)  # what follows is no text
    return tuple(found)


def _quoted_list(scan: Scanner) -> Value:
    """A list in quotes, as JSON inside JSON is written; nothing where the quotes hold something else."""
    start = scan.position
    run = scan.at(_QUOTED_RUN)["run"]
    behind = scan.plain[scan.position : scan.position + 1]
    if not run or (behind and behind not in _CLOSING):
        scan.position = start
        return _NOTHING
    text = clean_label(scan.text[start + 1 : scan.position])
    scan.position += len(behind)
    return replace(_numbers(run, ""), texts=(text,))


def _numbers(run: str, following: str) -> Value:
    """Lists of numbers; ``following`` is the character behind them."""
    if run.strip()[0] in ",;])":  # nothing stands before the comma
        return Value(lists=(None,))
    lists = [numbers(piece.strip().removeprefix(",")) for piece in _LIST.findall(run) if piece.strip(",; \t\r\n")]
    if lists and run[-1].isdigit() and (following.isalnum() or following == "_"):
        lists[-1] = None  # a number followed directly by other characters
    single = lists[0] if len(lists) == 1 else None
    scalar = single[0] if single is not None and len(single) == 1 and "[" not in run else None
    scalar = scalar / 100 if scalar is not None and following == "%" else scalar
    return Value(lists=tuple(lists) or (None,), scalar=scalar, decimal="." in run)


def _string(scan: Scanner, opening: str) -> str | None:
    """The text of a string that begins at the position; None for one that is cut off by the end of the text."""
    whole, damaged = _STRINGS[opening]
    start = scan.position
    match = scan.at(whole)
    if match["end"] is not None and match["closed"] is not None:
        return _unescape(scan.text[match.start("body") : match.end("body")], opening)
    scan.position = start + 1
    stop = scan.seek(damaged)
    if stop is None:
        return None
    if stop["end"] is None:
        scan.position = stop.start()
    return _unescape(scan.text[start + 1 : stop.start()][:MAX_LABEL].rstrip(_AROUND).lstrip(_AROUND[1:]), opening)


def _unescape(inside: str, quote: str) -> str | None:
    inside = inside[:MAX_LABEL]
    if "\\" in inside:
        body = inside.replace("\\'", "'")
        if quote == "'":
            body = body.replace('\\"', '"').replace('"', '\\"')
        with contextlib.suppress(ValueError):  # an invalid escape: the characters are kept
            inside = json.loads(f'"{body}"', strict=False)
    return clean_label(inside)
