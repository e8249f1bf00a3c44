"""``choice:FILE``: multiple-choice benchmarks as they are published → qa records.

The layout is recognised by the columns (``LAYOUTS``) and reported in a note:

- **MMBench**: TSV or table with ``index, question, hint, A, B, C, D, answer, category``, pictures in ``image`` (base64)
- **SEED-Bench**: ``{"questions": […], "question_type": {…}}`` or rows of ``choice_a … choice_d``; pictures: ``data_id``
- **AI2D**: ``question, options, answer`` (the place of the right option, from 0), ``image``
- **MVBench**: a JSON list of ``video, question, candidates, answer`` (its text; of equal candidates the last is right,
  as in the authors' code), with ``start`` and ``end`` in seconds
- **TempCompass**: ``{video: {dim: [{question, answer}]}}`` or rows of ``video_id, question, answer, dim``; the options
  are lines of the question; yes/no questions have none
- **Video-MME**: ``videoID, question, options`` (``A. …``), ``answer``

Query keys: ``images`` (folder of picture files; pictures inside the file need none, ``none`` leaves them out), those of
``videos``, ``limit``, ``seed``, ``split``, ``prompt``, ``type`` (the column by which accuracies are also reported),
``circular=yes`` (every question once for each rotation of its options, MMBench's CircularEval).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fastrl.answers.choice import LETTERS
from fastrl.data import rows, videos
from fastrl.data.choice_files import choice_rows
from fastrl.data.pictures import AnyPicture, holds_picture
from fastrl.data.qa import YES_NO_PROMPT, choice_question
from fastrl.data.records import Dataset, Record, question
from fastrl.data.rows import LeftOut, choice_option, load_rows, read_rows, reading
from fastrl.data.truth import is_empty, is_number, whole_number
from fastrl.data.validate import DataError, Problem, Row, fail, short
from fastrl.data.videos import with_videos

KEYS = (*rows.KEYS, *videos.KEYS, "prompt", "type", "circular")
_OPTION = re.compile(r"\s*(?:([A-Z])[.)]|((?:Caption|Option|Sentence) [A-Z0-9]):)\s*(\S.*)")
_ALONE = re.compile(r"\s*\(?([A-Za-z])[).:]?\s*")
_LETTERED = re.compile(r"([A-Z])\.\s*(.*)", re.S)


class Asked(NamedTuple):
    """A question, its options (none: yes or no) and the right one: its place from 0, or ``yes`` or ``no``."""

    text: str
    choices: tuple[str, ...]
    answer: int | str


class Layout(NamedTuple):
    """A benchmark's rows. ``read`` returns None after noting problems on the row."""

    name: str
    columns: tuple[str, ...]  # recognised if all of these are present
    read: Callable[[Row], Asked | None]
    types: tuple[str, ...] = ()  # columns with the type of a question, the first that the row has
    identity: str = "id"
    video: str | None = None  # column with the name of the video


def load(path: str, query: Mapping[str, str]) -> Dataset:
    """Read a multiple-choice benchmark. Raises ``DataError`` for an unreadable file, layout or option."""
    given = choice_rows(Path(path))
    layout = _layout(given if given is not None else read_rows(Path(path), query.get("split")), path)
    key, other, about = ("videos", "videos", "pictures") if layout.video is None else ("images", "pictures", "videos")
    if query.get(key, "none") != "none":
        raise fail(path, "bad option", f"{key} is for questions about {other}; {layout.name} asks about {about}")
    circular = choice_option(query, "circular", ("no", "yes"), path) == "yes"
    plain = {key: value for key, value in query.items() if (key, value) != ("images", "none")}
    stated = reading(query, path).stated
    named = None if query.get("images") == "none" else "images" in plain and not stated
    build = _Build(layout, path, query.get("type"), named, stated)
    data = load_rows(path, plain, build.record, given)
    note = Problem(path, "layout", f"read as {layout.name} rows")
    data = Dataset(data.records, data.problems, data.left_out, (note, *data.notes))
    data = _rotated(data) if circular else data
    return with_videos(data, path, query) if layout.video is not None else data


def _layout(given: Iterable[tuple[int, str, Mapping[str, Any] | Problem]], path: str) -> Layout:
    """The layout of the first row that is one."""
    problems: list[Problem] = []
    for _, _, row in given:
        if isinstance(row, Problem):
            problems.append(row)
            continue
        found = next((layout for layout in LAYOUTS if set(row) >= set(layout.columns)), None)
        if found is not None:
            return found
        names = "; ".join(f"{each.name}: {', '.join(each.columns)}" for each in LAYOUTS)
        has = short(", ".join(map(str, row)), 200)
        raise fail(path, "unknown layout", f"columns {has}: not a known benchmark ({names})")
    raise DataError(problems) if problems else fail(path, "empty file", "holds no rows")


class _Build:
    """Rows of one layout → records."""

    def __init__(self, layout: Layout, path: str, kind: str | None, named: bool | None, stated: bool) -> None:
        self.layout, self.path, self.kind = layout, path, kind
        self.stated = stated  # whether pictures may be missing
        self.named = named  # whether pictures given by name are opened; None: no pictures at all

    def record(self, row: Row) -> Record | LeftOut | None:
        """One row as a record."""
        layout = self.layout
        if layout.video is None and row.fields.get("data_type") == "video" and not _inside(row):
            return LeftOut("video", "asks about a video, which SEED-Bench cuts out of other data sets")
        identity = row.named(layout.identity)
        asked = layout.read(row)
        video = _video(row, layout.video) if layout.video is not None else None
        images = self._pictures(row)
        span = _span(row) if layout.video is not None else None
        kind = self._type(row)
        if row.problems or asked is None:
            return None
        target: dict[str, Any] = {"answer": asked.answer, "question": asked.text}
        target |= {"choices": list(asked.choices)} if asked.choices else {}
        target |= {"video": video} if video is not None else {}
        target |= {"span": span} if span is not None else {}
        target |= {"type": kind} if kind is not None else {}
        messages = question("qa", images=len(images), prompt=_words(target))
        return Record(identity, "qa", tuple(images), messages, target)

    def _pictures(self, row: Row) -> list[AnyPicture]:
        if self.layout.video is not None or self.named is None:
            return []
        value = row.fields.get("image", row.fields.get("images"))
        gap = ("image" in row.fields or "images" in row.fields) and (is_empty(value) or value == [])
        if gap or (self.named and value is None):
            if not self.stated:
                row.fail("missing image", "no image (images=none reads the questions alone)")
            return []
        if not (self.named or _inside(row)):
            return []
        return [picture for picture, _ in row.pictures()]

    def _type(self, row: Row) -> str | None:
        if self.kind is not None and self.kind not in row.fields:
            has = ", ".join(map(str, row.fields))
            row.fail("missing field", f"no column {short(self.kind)}, which type= names; there are {short(has, 200)}")
        names = (self.kind,) if self.kind is not None else self.layout.types
        value = next((row.fields[name] for name in names if not is_empty(row.fields.get(name))), None)
        if value is None and self.layout.name == "MVBench":
            return Path(self.path).stem  # one file for each of its tasks
        return None if value is None else _text(value)


def _inside(row: Row) -> bool:
    """Whether the row brings its pictures, and not the names of files."""
    value = row.fields.get("image", row.fields.get("images"))
    first = value[0] if isinstance(value, list | tuple) and value else value
    return holds_picture(first)


def _words(target: Mapping[str, Any]) -> str:
    if target.get("choices"):
        return choice_question(target["question"], target["choices"])
    return f"{target['question']} {YES_NO_PROMPT}"


def _span(row: Row) -> tuple[float, float] | None:
    """MVBench's part of a video, in seconds."""
    start, end = row.fields.get("start"), row.fields.get("end")
    if start is None or end is None:
        return None
    if not is_number(start) or not is_number(end) or not 0 <= start < end:
        row.fail("wrong type", f"start and end must be seconds, the one before the other; got {short([start, end])}")
        return None
    return float(start), float(end)


def _rotated(data: Dataset) -> Dataset:
    """Every question once for each rotation of its options; the group ``circular`` holds those of a question."""
    found: list[Record] = []
    for record in data:
        options = record.target.get("choices") or [None]
        for turn in range(len(options)):
            target = {**record.target, "groups": {"circular": record.id}, "group_sizes": {"circular": len(options)}}
            if record.target.get("choices"):
                target["choices"] = [*options[turn:], *options[:turn]]
                target["answer"] = (record.target["answer"] - turn) % len(options)
            asked = question("qa", images=len(record.images), prompt=_words(target))
            found.append(replace(record, id=f"{record.id}/{turn}", target=target, messages=asked))
    return Dataset(found, data.problems, data.left_out, data.notes)


# ---- layouts


def _asked(row: Row, text: str | None, choices: Sequence[str | None], place: int | None) -> Asked | None:
    """The question, if nothing is wrong with it."""
    options = tuple(choice for choice in choices if choice is not None)
    if any(choice is not None for choice in choices[len(options) :]):
        row.fail("missing field", f"option {LETTERS[list(choices).index(None)]} is empty, but one after it is not")
    elif not 2 <= len(options) <= len(LETTERS):
        row.fail("missing field", f"a question has 2 to {len(LETTERS)} options; found {len(options)}")
    elif place is not None and not 0 <= place < len(options):
        row.fail("wrong answer", f"the answer is option {place} (from 0), but there are {len(options)}")
    return Asked(text, options, place) if text is not None and place is not None and not row.problems else None


def _letter(row: Row, value: Any) -> int | None:
    """The place of a letter, as ``A``, ``a``, ``A.`` or ``(A)``."""
    found = _ALONE.fullmatch(value) if isinstance(value, str) else None
    if found:
        return LETTERS.index(found.group(1).upper())
    row.fail("wrong answer", f"answer must be the letter of an option, got {short(value)}")
    return None


def _given(row: Row, name: str) -> str | None:
    """An option or hint; None where the table has an empty cell (which some copies write as ``nan``)."""
    value = row.fields.get(name)
    if value is not None and not isinstance(value, str | int | float):
        row.fail("wrong type", f"{name} must be a text or a number, got {short(value)}")
        return None
    return None if value is None or is_empty(value) or str(value).strip().lower() == "nan" else _text(value)


def _text(value: str | int | float) -> str:
    """A text or number as a text; 2.0, as pandas writes 2 in a column with gaps, is 2."""
    number = whole_number(value) if isinstance(value, float) else None
    return str(value if number is None else number).strip()


def _video(row: Row, name: str) -> str | None:
    """The name of a video, which may be a number."""
    value: Any = row.fields.get(name)
    return _text(value) if is_number(value) else row.text(name)


def _mmbench(row: Row) -> Asked | None:
    text, hint = row.text("question"), _given(row, "hint")
    whole = f"{hint}\n{text}" if hint and text else text
    names = [letter for letter in LETTERS if letter in row.fields]
    return _asked(row, whole, [_given(row, name) for name in names], _letter(row, row.fields.get("answer")))


def _seed(row: Row) -> Asked | None:
    names = [f"choice_{letter}" for letter in LETTERS.lower() if f"choice_{letter}" in row.fields]
    options = [_given(row, name) for name in names]
    return _asked(row, row.text("question"), options, _letter(row, row.fields.get("answer")))


def _options(row: Row) -> Asked | None:
    """Options in a list; the answer is a letter (Video-MME) or a place from 0 (AI2D)."""
    text, options, answer = row.text("question"), _texts(row, "options"), row.fields.get("answer")
    place = whole_number(answer)
    place = _letter(row, answer) if place is None else place
    return _asked(row, text, _bare(options), place)


def _candidates(row: Row) -> Asked | None:
    """MVBench: the answer is the text of the right option."""
    text, options, answer = row.text("question"), _texts(row, "candidates"), _given(row, "answer")
    if row.problems:
        return None
    places = [place for place, option in enumerate(options) if option is not None and option == answer]
    if not places:
        given = short(answer) if answer is not None else "(none)"
        row.fail("wrong answer", f"the answer {given} is not one of the candidates {short(options)}")
        return None
    return _asked(row, text, options, places[-1])  # of equal ones the last, as in the authors' code


def _in_text(row: Row) -> Asked | None:
    """TempCompass: the options are lines of the question."""
    text, answer = row.text("question"), row.text("answer")
    if text is None or answer is None:
        return None
    lines = text.splitlines()
    found = [_OPTION.fullmatch(line) for line in lines]
    first = next((n for n, match in enumerate(found) if match), len(lines))
    asked = "\n".join(lines[:first]).strip()
    options = [match for match in found[first:] if match]
    if not options:
        if answer.strip(" .").lower() not in ("yes", "no"):
            row.fail("wrong answer", f"a question without options is answered yes or no, got {short(answer)}")
            return None
        return Asked(asked, (), answer.strip(" .").lower())
    right = _OPTION.fullmatch(answer)
    label = (right.group(1) or right.group(2)) if right else None
    places = [n for n, m in enumerate(options) if (m.group(1) or m.group(2)) == label or m.group(3).strip() == answer]
    if len(places) != 1:
        which = "one of the options of the question" if not places else f"one option but {len(places)} equal ones"
        row.fail("wrong answer", f"the answer {short(answer)} is not {which}")
        return None
    return _asked(row, asked, [match.group(3).strip() for match in options], places[0])


def _texts(row: Row, name: str) -> list[str | None]:
    """A list of options, numbers as texts; None for one that is empty, as tables fill lists of one length."""
    value = row.truth(name)
    if not isinstance(value, list) or not all(v is None or isinstance(v, str | int | float) for v in value):
        row.fail("wrong type", f"{name} must be a list of texts, got {short(value)}")
        return []
    return [None if is_empty(v) else _text(v) for v in value]


def _bare(options: Sequence[str | None]) -> list[str | None]:
    """Options without their letters, if all begin with their own."""
    found = [_LETTERED.fullmatch(option or "") for option in options]
    own = all(
        option is None or (match and match.group(1) == letter)
        for option, match, letter in zip(options, found, LETTERS, strict=False)
    )
    return [match.group(2) if own and match else option for match, option in zip(found, options, strict=True)]


LAYOUTS: tuple[Layout, ...] = (
    Layout("TempCompass", ("video_id", "question", "answer", "dim"), _in_text, ("dim",), video="video_id"),
    Layout(
        "Video-MME",
        ("videoID", "question", "options", "answer"),
        _options,
        ("task_type", "duration"),
        "question_id",
        "videoID",
    ),
    Layout("MVBench", ("video", "question", "candidates", "answer"), _candidates, video="video"),
    Layout(
        "SEED-Bench",
        ("question", "choice_a", "choice_b", "answer"),
        _seed,
        ("question_type", "question_type_id"),
        "question_id",
    ),
    Layout("MMBench", ("question", "A", "B", "answer"), _mmbench, ("category",), "index"),
    Layout("AI2D", ("question", "options", "answer"), _options),
)
