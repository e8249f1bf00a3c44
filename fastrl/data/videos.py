"""Questions about videos: their files are found by name, and the frames that a model is shown are read on demand.

Query keys of an adapter that takes them: ``videos`` (folder of video files, or of folders of frames), ``frames`` and
``sample`` (how many of a video's frames, default 8, and ``uniform``, ``first`` or ``random``), ``fps`` (of folders of
frames). A record names its video in ``target["video"]``; with ``target["span"]``, (first, last) second, only frames in
between are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, overload

from fastrl.data.clips import SAMPLING, frame_files, read_video, sample_frames, video_info
from fastrl.data.records import Dataset, Record, question
from fastrl.data.rows import choice_option, int_option, reading
from fastrl.data.validate import ImageFolder, Problem, Reading, fail, short

KEYS = ("videos", "frames", "sample", "fps")
LONGEST_NAME = 250  # bytes; with a suffix no more than a file system takes
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")


def with_videos(data: Dataset, path: str, query: Mapping[str, str]) -> Dataset:
    """Questions with the frames of their videos; unchanged without ``videos`` in the query, or where answers are scored
    without a look at them. A video that is missing makes its row a bad one. Raises ``DataError`` for an option."""
    count = int_option(query, "frames", path, 1) or 8
    sample = choice_option(query, "sample", SAMPLING, path)
    fps = int_option(query, "fps", path, 1)
    how = reading(query, path)
    if "videos" not in query or how.stated:
        return data
    folder = Path(query["videos"])
    if not folder.is_dir():
        raise fail(path, "missing file", f"videos folder not found: {folder}")
    found = {name: find_video(folder, name) for name in dict.fromkeys(r.target["video"] for r in data)}
    kept = [r for r in data if found[r.target["video"]] is not None]
    problems = [
        Problem(r.source, "missing video", f"no video or folder of frames {short(r.target['video'])} in {folder}")
        for r in data
        if found[r.target["video"]] is None
    ]
    sources = {name: file for name, file in found.items() if file is not None}
    records = VideoRecords(kept, sources, Frames(count, sample, fps, int(query.get("seed", "0")), how))
    return Dataset(records, [*data.problems, *problems], data.left_out, data.notes)


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
        shown = read_frames(self.files[record.target["video"]], self.frames, record.target.get("span"))
        words = record.messages[0]["content"][-1]["text"]
        asked = question("qa", images=len(shown.images), prompt=words, seconds=shown.seconds)
        return replace(record, images=shown.images, messages=asked)

    def __len__(self) -> int:
        return len(self.records)


def read_frames(file: Path, frames: Frames, span: tuple[float, float] | None = None) -> VideoFrames:
    """The chosen frames of a video file or of a folder of pictures, of all or of those in ``span`` (seconds). Raises
    ``DataError``, also for a span without frames or of a folder whose rate is not known."""
    seed = f"{frames.seed}/{file.stem}"
    if file.is_dir():
        pictures, folder = frame_files(file), ImageFolder(file, frames.reading)
        if span is not None and not frames.fps:
            raise fail(str(file), "no rate", "a question about a part of a video needs fps= for folders of frames")
        first, total = _part(file, len(pictures), frames.fps, span)
        numbers = [first + n - 1 for n in sample_frames(total, frames.count, frames.how, seed)]
        seconds = tuple(n / frames.fps for n in numbers) if frames.fps else ()
        return VideoFrames(tuple(folder.picture(pictures[n]) for n in numbers), seconds)
    info = video_info(file)
    first, total = _part(file, info.frames, info.fps, span)
    numbers = [first + n - 1 for n in sample_frames(total, frames.count, frames.how, seed)]
    return VideoFrames(tuple(read_video(file, numbers)), tuple(n / info.fps for n in numbers))


def _part(file: Path, total: int, fps: float | None, span: tuple[float, float] | None) -> tuple[int, int]:
    """First frame (from 0) and number of frames of a span; a span that ends after the video ends with it."""
    if span is None or fps is None:
        return 0, total
    first, last = max(0, round(span[0] * fps)), min(total - 1, round(span[1] * fps))
    if first > last:
        raise fail(str(file), "no frames", f"has no frame between {span[0]:g} and {span[1]:g} s ({total / fps:.2f} s)")
    return first, last - first + 1


def find_video(folder: Path, name: str) -> Path | None:
    """A video's file (``name`` with or without its suffix) or non-empty folder of frames, in ``folder`` or one level
    below. A name that leads out of the folder, is its own or no file can have is not looked for."""
    parts = Path(name).parts
    long = any(len(part.encode(errors="replace")) > LONGEST_NAME for part in parts)
    if Path(name).is_absolute() or ".." in parts or not parts or long:
        return None
    bare = name.removesuffix(Path(name).suffix) if Path(name).suffix.lower() in VIDEO_SUFFIXES else name
    for pattern in ("", "*/"):
        for suffix in dict.fromkeys((Path(name).suffix if bare != name else "", *VIDEO_SUFFIXES, "")):
            for found in sorted(folder.glob(f"{pattern}{_literal(bare)}{suffix}")):
                if found.is_file() if suffix else bool(frame_files(found)):
                    return found
    return None


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
