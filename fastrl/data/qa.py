"""Questions with one right answer: NExT-QA's multiple choice and POPE's yes or no → qa records.

- ``nextqa:FILE``: NExT-QA's CSV (``video, question, answer, qid, type, a0 … a4``; ``answer`` is the place of the right
  option, from 0). A record's id is ``VIDEO_QID``. Query keys: ``videos`` (folder of video files, or of folders of
  frames, named by video), ``frames`` and ``sample`` (how many of a video's frames, default 8, and ``uniform``,
  ``first`` or ``random``), ``fps`` (of folders of frames), ``limit``, ``seed``.
- ``pope:FILE``: POPE's JSONL (``question_id, image, text, label``; ``label`` is yes or no). Query keys: ``images``
  (folder of the pictures), ``limit``, ``seed``.

Without ``videos`` or ``images`` the records have no pictures, which is enough to score answers from a file.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastrl.data import rows, videos
from fastrl.data.records import Dataset, Record, lettered, question
from fastrl.data.rows import Rows, load_rows, read_text, reading
from fastrl.data.truth import whole_number
from fastrl.data.validate import Problem, Row, fail, short
from fastrl.data.videos import with_videos

KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "nextqa": (*videos.KEYS, "limit", "seed", "prompt", *rows.READING),
        "pope": (*rows.KEYS, "prompt"),
    }
)
COLUMNS = ("video", "question", "answer", "qid", "type")
CHOICE_PROMPT = "Answer with the letter of the right option."
YES_NO_PROMPT = "Answer yes or no."


def load_nextqa(path: str, query: Mapping[str, str]) -> Dataset:
    """Read a NExT-QA file. Raises ``DataError`` for an unreadable file or option, and for videos that are missing."""
    plain = {k: v for k, v in query.items() if k in ("limit", "seed")}
    return with_videos(load_rows(path, plain, _choice_record, _csv_rows(path)), path, query)


def load_pope(path: str, query: Mapping[str, str]) -> Dataset:
    """Read a POPE file. Raises ``DataError`` for an unreadable file or option."""
    pictures = "images" in query and not reading(query, path).stated
    return load_rows(path, query, lambda row: _yes_no_record(row, pictures))


# ---- records


def choice_question(text: str, choices: Sequence[str]) -> str:
    """A multiple-choice question as the model gets it: the options with their letters, one per line."""
    return "\n".join([text, *lettered(choices), CHOICE_PROMPT])


def _choice_record(row: Row) -> Record | None:
    video, asked, number = row.text("video"), row.text("question"), row.text("qid")
    names = sorted(
        (name for name in row.fields if name[:1] == "a" and name[1:].isdigit()), key=lambda name: int(name[1:])
    )
    choices = [row.text(name) for name in names]
    answer = row.text("answer")
    if len(choices) < 2:
        row.fail("missing field", f"a question needs the options a0, a1, …; found {len(choices)}")
    place = whole_number(answer)  # "2.0" is pandas' 2
    if answer is not None and (place is None or not 0 <= place < len(choices)):
        row.fail("wrong answer", f"answer must be the place of an option, 0 to {len(choices) - 1}; got {short(answer)}")
    if row.problems or video is None or asked is None or place is None:
        return None
    options = [choice for choice in choices if choice is not None]
    target: dict[str, Any] = {"choices": options, "answer": place, "video": video, "question": asked}
    if row.fields.get("type"):
        target["type"] = str(row.fields["type"]).strip()
    messages = question("qa", images=0, prompt=choice_question(asked, options))
    return Record(f"{video}_{number}", "qa", (), messages, target)


def _yes_no_record(row: Row, pictures: bool) -> Record | None:
    identity = row.named("question_id" if "question_id" in row.fields else "id")
    asked, label = row.text("text"), row.text("label")
    image = row.image("image") if pictures else None
    said = label.strip(" .").lower() if label is not None else ""
    if label is not None and said not in ("yes", "no"):
        row.fail("wrong answer", f"label must be yes or no, got {short(label)}")
    if row.problems or asked is None or label is None:
        return None
    messages = question("qa", images=int(image is not None), prompt=f"{asked} {YES_NO_PROMPT}")
    return Record(identity, "qa", (image[0],) if image else (), messages, {"answer": said, "question": asked})


def _csv_rows(path: str) -> Rows:
    """Rows of a CSV file in the form of ``read_rows``; a row with another number of columns is a problem."""
    reader = csv.reader(read_text(Path(path)).splitlines())
    rows: list[tuple[int, str, Mapping[str, Any] | Problem]] = []
    try:
        names = [name.strip() for name in next(reader, [])]
        missing = [name for name in COLUMNS if name not in names]
        if missing:
            raise fail(path, "missing field", f"no column {', '.join(missing)}; found {', '.join(names) or 'none'}")
        for number, cells in enumerate(reader):
            where = f"{path}:{reader.line_num}"
            if len(cells) == len(names):
                rows.append((number, where, dict(zip(names, cells, strict=True))))
            elif cells:
                rows.append((number, where, Problem(where, "wrong length", f"{len(names)} columns, got {len(cells)}")))
    except csv.Error as error:
        raise fail(path, "unreadable file", f"cannot be read as CSV ({error})") from None
    return rows
