"""UTR dialogues: ``utr:FILE`` → trajectory records, each a question about a tracked clip and the answer to learn.

One JSON object per line, as ``fastrl build utr`` writes them:

    {"id": "clip-7", "frames": ["img/1.jpg", …], "seconds": [0.0, 0.5, …], "width": 768, "height": 576,
     "query": {"kind": "spatial", "attribute": "box", "frame": 3}, "question": "In frame 3 there is …",
     "answer": "Track1: person<Id1>Frame1:[…];…</Id1> It …", "subjects": [{"id": 1, "name": "person", "boxes": …}],
     "caption"?: "…", "tpl"?: 1.7}

- ``frames`` are picture files, or ``video`` a file with ``video_frames`` (numbers from 0); ``subjects`` (those asked
  about) are as in the ``tracks`` adapter, boxes in pixels.
- ``query.kind`` is ``spatial`` (``attribute`` box, location or appearance, in ``frame``) or ``temporal`` (span, time or
  action, ``first`` to ``last``).
- ``answer`` is trajectory text with coordinates 0-1000 about these frames and subjects; other text may follow.

A record is one user turn, number and time before each frame, the question last; its target has ``answer``, ``query``,
``tpl`` where the row has it, and the truth of the subjects.

Query keys: ``images`` (folder of the frames), ``frames`` and ``sample`` (how many of a dialogue's frames, and
``uniform``, ``first`` or ``random``: question and answer are renumbered), ``min_tpl``, ``limit``, ``seed``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastrl.answers import parse_tracks
from fastrl.data.clip_rows import clip_rows, row_clip
from fastrl.data.clips import SAMPLING, Clip, ClipRecords, clip_to_dict, settle
from fastrl.data.dialogues import QUERIES, Dialogue, Query, select_frames
from fastrl.data.records import Dataset
from fastrl.data.rows import READING, choice_option, exif_note, int_option, ordered
from fastrl.data.validate import Problem, Row, fail, is_number, nearest, short

KEYS = ("images", "frames", "sample", "min_tpl", "limit", "seed", *READING)


def load(path: str, query: Mapping[str, str]) -> Dataset:
    """Read a file of dialogues. Raises ``DataError`` for an unreadable file or option."""
    limit, seed = int_option(query, "limit", path, 1), int_option(query, "seed", path)
    count, how = int_option(query, "frames", path, 1), choice_option(query, "sample", SAMPLING, path)
    least = _least_tpl(query, path)
    problems: list[Problem] = []
    left_out: list[Problem] = []
    dialogues: list[Dialogue] = []
    seen: dict[str, str] = {}
    found = clip_rows(Path(path), query)
    for row in found.rows:
        if isinstance(row, Problem):
            problems.append(row)
            continue
        dialogue = _dialogue(row)
        if dialogue is not None and dialogue.clip.id in seen:
            row.fail("duplicate id", f"id {short(dialogue.clip.id)} is already the id of {seen[dialogue.clip.id]}")
        if dialogue is not None and not row.problems and count is not None and count < len(dialogue.clip):
            try:
                dialogue = select_frames(dialogue, count, how, f"{seed}/{dialogue.clip.id}")
            except ValueError as error:
                row.fail("other wording", str(error))
        problems += row.problems
        if dialogue is None or row.problems:
            continue
        seen[dialogue.clip.id] = row.where
        if least is not None and (dialogue.tpl is None or dialogue.tpl < least):
            what = "no tpl" if dialogue.tpl is None else "tpl below min_tpl"
            left_out.append(Problem(row.where, what, f"{what} ({dialogue.tpl}, min_tpl={least:g})"))
            continue
        dialogues.append(dialogue)
    if not (dialogues or problems or left_out):
        raise fail(path, "empty file", "holds no rows")
    records = ClipRecords(ordered(dialogues, seed)[:limit])
    return Dataset(records, problems, left_out, exif_note(found.images, path))


def dialogue_row(dialogue: Dialogue, images: Sequence[str] = ()) -> dict[str, Any]:
    """A dialogue as one line of a file; ``images`` are its frames' files as the line names them (none: those of the
    clip, or its video).
    """
    clip = replace(dialogue.clip, subjects=dialogue.subjects)
    if images:
        clip = replace(clip, frames=tuple(Path(name) for name in images))
    row = clip_to_dict(clip)
    subjects = row.pop("subjects")
    row |= {"query": dialogue.query.plain(), "question": dialogue.question, "answer": dialogue.answer}
    if dialogue.tpl is not None:
        row["tpl"] = dialogue.tpl
    return row | {"subjects": subjects}


def _least_tpl(query: Mapping[str, str], path: str) -> float | None:
    if "min_tpl" not in query:
        return None
    try:
        return float(query["min_tpl"])
    except ValueError:
        raise fail(path, "bad option", f"min_tpl must be a number, got {short(query['min_tpl'])}") from None


def _dialogue(row: Row) -> Dialogue | None:
    clip = row_clip(row)
    asked, answer = row.text("question"), row.text("answer")
    tpl = row.truth("tpl")
    if tpl is not None and not is_number(tpl):
        row.fail("not a number", f"tpl must be a finite number, got {short(tpl)}")
    if clip is None or row.problems or asked is None or answer is None:
        return None
    settled, problems, _ = settle(clip, short=True)
    row.problems += problems
    if not (settled.frames or settled.video or row.images.reading.stated):
        row.fail("missing image", "a dialogue needs frames (picture files), or video with video_frames")
    if not settled.subjects:
        row.fail("no subject", "subjects must hold at least one subject with a box")
    query = _query(row, clip)
    _check_answer(row, settled, answer)
    if query is None or row.problems:
        return None
    return Dialogue(settled, settled.subjects, query, asked, answer, float(tpl) if tpl is not None else None)


def _query(row: Row, clip: Clip) -> Query | None:
    value = row.truth("query")
    if not isinstance(value, Mapping):
        row.fail("bad query", f"query must be an object with kind and attribute, got {short(value)}")
        return None
    kind, attribute = str(value.get("kind")), str(value.get("attribute"))
    if kind not in QUERIES:
        row.fail("bad query", f"query.kind {short(kind)} is unknown{nearest(kind, QUERIES)}")
        return None
    if attribute not in QUERIES[kind]:
        row.fail("bad query", f"query.attribute {short(attribute)} is not {kind}{nearest(attribute, QUERIES[kind])}")
        return None
    names = ("frame",) if kind == "spatial" else ("first", "last")
    numbers = [n for n in (value.get(name) for name in names) if isinstance(n, int) and not isinstance(n, bool)]
    if len(numbers) < len(names) or not all(1 <= n <= len(clip) for n in numbers) or sorted(numbers) != numbers:
        given = short([value.get(name) for name in names])
        row.fail("bad query", f"query.{' <= query.'.join(names)} must lie in 1 to {len(clip)}, got {given}")
        return None
    return Query(kind, attribute, **dict(zip(names, numbers, strict=True)))


def _check_answer(row: Row, clip: Clip, answer: str) -> None:
    parsed = parse_tracks(answer)
    if not parsed.parsable or parsed.dropped:
        row.fail("bad answer", "answer must be trajectory text: Track1: name<Id1>Frame1:[x1,y1,x2,y2];…</Id1>")
    known = {subject.identity for subject in clip.subjects}
    for track in parsed:
        if track.identity not in known:
            row.fail("bad answer", f"answer has identity {track.identity}, subjects have {sorted(known)}")
        outside = [t for t in track.boxes if not 1 <= t <= len(clip)]
        if outside:
            row.fail("bad answer", f"answer has frame {outside[0]}, the clip has {len(clip)}")
        if not all(0 <= value <= 1000 for value in track.coords):
            row.fail("bad answer", f"answer, identity {track.identity}: coordinates must lie in 0 to 1000")
