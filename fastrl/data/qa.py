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
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, overload

from fastrl.data import rows
from fastrl.data.clips import SAMPLING, frame_files, read_video, sample_frames, video_info
from fastrl.data.records import Dataset, Record, lettered, question
from fastrl.data.rows import Rows, choice_option, int_option, load_rows, read_text, reading
from fastrl.data.validate import ImageFolder, Problem, Reading, Row, fail, short

KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "nextqa": ("videos", "frames", "sample", "fps", "limit", "seed", "prompt", *rows.READING),
        "pope": (*rows.KEYS, "prompt"),
    }
)
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")
COLUMNS = ("video", "question", "answer", "qid", "type")
CHOICE_PROMPT = "Answer with the letter of the right option."
YES_NO_PROMPT = "Answer yes or no."


def load_nextqa(path: str, query: Mapping[str, str]) -> Dataset:
    """Read a NExT-QA file. Raises ``DataError`` for an unreadable file or option, and for videos that are missing."""
    count = int_option(query, "frames", path, 1) or 8
    sample = choice_option(query, "sample", SAMPLING, path)
    fps = int_option(query, "fps", path, 1)
    data = load_rows(path, {k: v for k, v in query.items() if k in ("limit", "seed")}, _choice_record, _csv_rows(path))
    how = reading(query, path)
    if "videos" not in query or how.stated:  # whose answers are scored without a look at them
        return data
    folder = Path(query["videos"])
    if not folder.is_dir():
        raise fail(path, "missing file", f"videos folder not found: {folder}")
    found = {name: _find_video(folder, name) for name in dict.fromkeys(r.target["video"] for r in data)}
    kept = [r for r in data if found[r.target["video"]] is not None]
    problems = [
        Problem(r.source, "missing video", f"no video or folder of frames {r.target['video']!r} in {folder}")
        for r in data
        if found[r.target["video"]] is None
    ]
    sources = {name: file for name, file in found.items() if file is not None}
    records = VideoRecords(kept, sources, Frames(count, sample, fps, int(query.get("seed", "0")), how))
    return Dataset(records, [*data.problems, *problems], data.left_out)


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
    if answer is not None and not (answer.isascii() and answer.isdigit() and int(answer) < len(choices)):
        row.fail("wrong answer", f"answer must be the place of an option, 0 to {len(choices) - 1}; got {short(answer)}")
    if row.problems or video is None or asked is None or answer is None:
        return None
    options = [choice for choice in choices if choice is not None]
    target: dict[str, Any] = {"choices": options, "answer": int(answer), "video": video, "question": asked}
    if row.fields.get("type"):
        target["type"] = str(row.fields["type"]).strip()
    messages = question("qa", images=0, prompt=choice_question(asked, options))
    return Record(f"{video}_{number}", "qa", (), messages, target)


def _yes_no_record(row: Row, pictures: bool) -> Record | None:
    identity = row.fields.get("question_id", row.fields.get("id", row.number))
    if isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
        row.fail("wrong type", f"question_id must be a string or an integer, got {short(identity)}")
    asked, label = row.text("text"), row.text("label")
    image = row.image("image") if pictures else None
    if label is not None and label.lower() not in ("yes", "no"):
        row.fail("wrong answer", f"label must be yes or no, got {short(label)}")
    if row.problems or asked is None or label is None:
        return None
    messages = question("qa", images=int(image is not None), prompt=f"{asked} {YES_NO_PROMPT}")
    return Record(
        str(identity), "qa", (image[0],) if image else (), messages, {"answer": label.lower(), "question": asked}
    )


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


# ---- videos


@dataclass(frozen=True)
class Frames:
    """Which frames of a video the model gets; ``fps`` is the rate for folders of frames, which have no times."""

    count: int
    how: str
    fps: int | None
    seed: int
    reading: Reading = field(default_factory=Reading)


class VideoFrames(NamedTuple):
    """Pictures of a video with their times in seconds (none: unknown)."""

    images: tuple[Any, ...]
    seconds: tuple[float, ...]


class VideoRecords(Sequence[Record]):
    """Records with the frames of their videos, read on demand."""

    def __init__(self, records: Sequence[Record], files: Mapping[str, Path], frames: Frames) -> None:
        self.records, self.files, self.frames = records, files, frames

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return VideoRecords(self.records[index], self.files, self.frames)
        record = self.records[index]
        shown = read_frames(self.files[record.target["video"]], self.frames)
        words = record.messages[0]["content"][-1]["text"]
        asked = question("qa", images=len(shown.images), prompt=words, seconds=shown.seconds)
        return replace(record, images=shown.images, messages=asked)

    def __len__(self) -> int:
        return len(self.records)


def read_frames(file: Path, frames: Frames) -> VideoFrames:
    """The chosen frames of a video file or of a folder of pictures. Raises ``DataError``."""
    if file.is_dir():
        pictures, folder = frame_files(file), ImageFolder(file, frames.reading)
        numbers = [n - 1 for n in sample_frames(len(pictures), frames.count, frames.how, f"{frames.seed}/{file.stem}")]
        seconds = tuple(n / frames.fps for n in numbers) if frames.fps else ()
        return VideoFrames(tuple(folder.picture(pictures[n]) for n in numbers), seconds)
    info = video_info(file)
    numbers = [n - 1 for n in sample_frames(info.frames, frames.count, frames.how, f"{frames.seed}/{file.stem}")]
    return VideoFrames(tuple(read_video(file, numbers)), tuple(n / info.fps for n in numbers))


def _find_video(folder: Path, name: str) -> Path | None:
    """A video's file or non-empty folder of frames, in ``folder`` or one level below (as NExT-QA is laid out)."""
    for pattern in ("", "*/"):
        for suffix in (*VIDEO_SUFFIXES, ""):
            for found in sorted(folder.glob(f"{pattern}{_literal(name)}{suffix}")):
                if found.is_file() if suffix else bool(frame_files(found)):
                    return found
    return None


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
