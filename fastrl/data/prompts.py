"""``prompt=`` in a spec: what records ask, as a template with their own words in it.

``refexp:train.jsonl?prompt=Where is the {expression}?`` replaces the last question of every record. ``{name}`` stands
for a word of the record (:func:`words_of`), ``{{`` and ``}}`` for braces. A value with neither a blank nor a brace is
the name of a prompt in ``NAMED``. Nothing of a template is evaluated: names are looked up, and that is all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple, overload

from fastrl.data.records import Dataset, Record, is_frame_label, lettered, question_of
from fastrl.data.validate import DataError, Problem, fail, nearest, short

KEY = "prompt"
# adapter -> values of the key that it reads itself (Perception-R1's prompt, the row's own)
OWN: Mapping[str, tuple[str, ...]] = MappingProxyType({"refexp": ("paper", "row"), "rows": ("row", "paper")})
# name -> task that it is for, template. PerPO: the question of the released sample data (arXiv:2502.04371, §4.3 [code])
NAMED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "perpo": (
            "grounding",
            "Please provide the bounding box coordinate of the region this sentence describes: {expression}",
        ),
    }
)
PLACE = "<image>"  # where other trainers' prompts have a picture
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class Template(NamedTuple):
    """A prompt with places for words of a record; ``task``: the only one it is for, or None."""

    text: str
    task: str | None = None

    @property
    def names(self) -> list[str]:
        """The words that it needs, in order."""
        return [m.group(1) for m in _PIECE.finditer(self.text) if m.group(1) is not None]

    def filled(self, words: Mapping[str, str]) -> str:
        """The prompt. Raises ``KeyError`` for a missing word."""

        def piece(match: re.Match[str]) -> str:
            return words[match.group(1)] if match.group(1) is not None else match.group()[0]

        return _PIECE.sub(piece, self.text)


def template_of(value: str | None, adapter: str, where: str) -> Template | None:
    """The template of a spec's ``prompt=``; None if there is none or the adapter reads the value itself.

    Raises:
        DataError: an unknown name, or a brace without its other half.
    """
    own = OWN.get(adapter, ())
    if value is None or value in own:
        return None
    if value in NAMED:
        task, text = NAMED[value]
        return Template(text, task)
    if not value.strip() or not re.search(r"[\s{}]", value):
        known = (*own, *NAMED)
        message = f"{KEY}={value}: no prompt of that name{nearest(value, known)}. A template has a blank or a {{name}}"
        raise fail(where, "bad option", message)
    odd = next((m for m in _PIECE.finditer(value) if m.group() in ("{", "}") or m.group(1) == ""), None)
    if odd is not None:
        what = f"{odd.group()!r} at {odd.start()} is no place for a word; a brace itself is {{{{"
        raise fail(where, "bad option", f"{KEY}={short(value, 200)}: {what}")
    if PLACE in value:
        raise fail(where, "bad option", f"{KEY}={short(value, 200)}: pictures stand before the text; leave {PLACE} out")
    return Template(value)


def suffixed(data: Dataset, suffix: str | None, where: str) -> Dataset:
    """The data with a text after every question; unchanged for None. Raises ``DataError`` for a text with a picture."""
    if suffix is None:
        return data
    template = template_of("{prompt} " + suffix.replace("{", "{{").replace("}", "}}"), "", where)
    assert template is not None  # it has a blank
    return asked(data, template, where)


def asked(data: Dataset, template: Template, where: str) -> Dataset:
    """The data with other questions. A record that lacks a word of the template is bad; of records made on demand, the
    first one is looked at now.

    Raises:
        DataError: the first of records made on demand lacks a word.
    """
    from fastrl.data.videos import VideoRecords  # imported here, as few specs have a template

    if isinstance(data.records, VideoRecords):  # what is asked is known without the frames
        found = asked(Dataset(list(data.records.records), data.problems, data.left_out, data.notes), template, where)
        shown = VideoRecords(found.records, data.records.files, data.records.frames)
        return Dataset(shown, found.problems, found.left_out, found.notes)
    if not isinstance(data.records, list):
        if len(data.records):
            ask(data.records[0], template, where)
        return Dataset(Asked(data.records, template, where), data.problems, data.left_out, data.notes)
    kept: list[Record] = []
    problems: list[Problem] = []
    for record in data.records:
        problem = fault(record, template, where)
        problems += [problem] if problem is not None else []
        kept += [_ask(record, template)] if problem is None else []
    return Dataset(kept, (*data.problems, *problems), data.left_out, data.notes)


class Asked(Sequence[Record]):
    """``records`` that are made on demand, with other questions."""

    def __init__(self, records: Sequence[Record], template: Template, where: str) -> None:
        self.records, self.template, self.where = records, template, where

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return Asked(self.records[index], self.template, self.where)
        return ask(self.records[index], self.template, self.where)

    def __len__(self) -> int:
        return len(self.records)


def ask(record: Record, template: Template, where: str) -> Record:
    """The record with the template as its question. Raises ``DataError`` if it lacks a word."""
    problem = fault(record, template, where)
    if problem is not None:
        raise DataError([problem])
    return _ask(record, template)


def fault(record: Record, template: Template, where: str) -> Problem | None:
    """Why a template does not fit a record, or None."""
    place = record.source or f"{where}: {record.id}"
    if template.task not in (None, record.task):
        message = f"{KEY}={short(template.text, 200)} asks for {template.task}; this is a record for {record.task}"
        return Problem(place, "prompt of another task", message)
    words = words_of(record)
    for name in template.names:
        if name not in words:
            return Problem(place, "unknown word", f"{KEY} needs {{{name}}}{nearest(name, words)}")
        if PLACE in words[name]:
            message = f"{{{name}}} says {PLACE}, but pictures stand before the text; {{prompt}} has it left out"
            return Problem(place, "place of a picture", message)
    return None


def words_of(record: Record) -> dict[str, str]:
    """What a template may name: ``prompt`` (the record's own question), ``expression``, ``label``, ``categories``,
    ``question`` and ``options`` (lettered, one a line) where the truth has them, and the row's columns that are a
    text or a number."""
    target = record.target
    words = {name: str(value) for name, value in record.columns.items() if _is_word(value)}
    words |= {name: str(target[name]) for name in ("expression", "label", "question") if _is_word(target.get(name))}
    if record.task == "detection" and target.get("categories"):
        words["categories"] = ", ".join(target["categories"])
    if record.task == "qa" and target.get("choices"):
        words["options"] = "\n".join(lettered(target["choices"]))
    return words | {"prompt": question_of(record.messages)}


def _is_word(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _ask(record: Record, template: Template) -> Record:
    return replace(record, messages=_replaced(record.messages, template.filled(words_of(record))))


def _replaced(messages: Sequence[Mapping[str, Any]], text: str) -> tuple[Mapping[str, Any], ...]:
    """Messages whose last user turn says ``text`` after its pictures, which keep their frame labels."""
    turns = list(messages)
    place = max((n for n, turn in enumerate(turns) if turn.get("role") == "user"), default=None)
    if place is None:
        return (*turns, {"role": "user", "content": [{"type": "text", "text": text}]})
    content = turns[place].get("content", "")
    parts = [] if isinstance(content, str) else list(content)
    kept = [part for part in parts if part.get("type") != "text" or is_frame_label(part["text"])]
    turns[place] = {**turns[place], "content": [*kept, {"type": "text", "text": text}]}
    return tuple(turns)
