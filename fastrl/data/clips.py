"""Tracked clips: one schema for all sources of trajectories, its checks, and its frames as pictures.

Frames are numbered from 1 everywhere (as in trajectory text): frame t is ``seconds[t - 1]``. Boxes are pixels of the
original frame, (x1, y1, x2, y2), counted from 0.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, overload

from fastrl.answers import Track
from fastrl.data.pictures import AnyPicture, file_of
from fastrl.data.records import Record, question
from fastrl.data.validate import TOLERANCE, Problem, fail, short

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SAMPLING = ("uniform", "first", "random")
Box = tuple[float, float, float, float]


class Span(NamedTuple):
    """An action over frames ``first`` to ``last``, both included."""

    action: str
    first: int
    last: int


@dataclass(frozen=True)
class Subject:
    """One tracked object of a clip: identity, name, appearance, its box in each frame that shows it, and its
    actions."""

    identity: int
    name: str
    boxes: Mapping[int, Box]
    appearance: str = ""
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Clip:
    """Frames in order with their times and subjects.

    The pictures are ``frames`` (files or PIL images, one per frame), or frames ``video_frames`` (from 0) of the file
    ``video``, or absent (annotations only).
    """

    id: str
    width: int
    height: int
    seconds: tuple[float, ...]
    subjects: tuple[Subject, ...]
    frames: tuple[AnyPicture, ...] = ()
    video: Path | None = None
    video_frames: tuple[int, ...] = ()
    caption: str = ""
    source: str = ""

    def __len__(self) -> int:
        return len(self.seconds)

    def select(self, numbers: Sequence[int], id: str | None = None) -> Clip:
        """The clip with only these frames (ascending), renumbered from 1; subjects in none of them are left out."""
        place = {number: i for i, number in enumerate(numbers, start=1)}
        subjects = []
        for subject in self.subjects:
            boxes = {place[t]: box for t, box in subject.boxes.items() if t in place}
            spans = []
            for span in subject.spans:
                inside = [place[t] for t in numbers if span.first <= t <= span.last]
                if inside:
                    spans.append(Span(span.action, inside[0], inside[-1]))
            if boxes:
                subjects.append(replace(subject, boxes=boxes, spans=tuple(spans)))
        return replace(
            self,
            id=id or self.id,
            seconds=tuple(self.seconds[t - 1] for t in numbers),
            subjects=tuple(subjects),
            frames=tuple(self.frames[t - 1] for t in numbers) if self.frames else (),
            video_frames=tuple(self.video_frames[t - 1] for t in numbers) if self.video_frames else (),
        )

    def tracks(self) -> list[Track]:
        """The subjects as tracks of ``fastrl.answers``."""
        return [Track(subject.identity, subject.name, dict(subject.boxes)) for subject in self.subjects]

    def images(self) -> tuple[AnyPicture, ...]:
        """The pictures of all frames; frames of a video file are decoded now."""
        if self.frames or self.video is None:
            return self.frames
        return tuple(read_video(self.video, self.video_frames))

    def target(self) -> dict[str, Any]:
        """The target of a trajectory record."""
        return {
            "tracks": [clip_subject(subject) for subject in self.subjects],
            "frames": len(self),
            "seconds": list(self.seconds),
            "size": [self.width, self.height],
        }

    def record(self) -> Record:
        """A trajectory record that asks for every subject by name."""
        images = self.images()
        names = list(dict.fromkeys(subject.name for subject in self.subjects))
        target = self.target()
        messages = question("trajectory", ", ".join(names), images=len(images), seconds=self.seconds)
        return Record(self.id, "trajectory", images, messages, target, source=self.source)


def clip_subject(subject: Subject) -> dict[str, Any]:
    """A subject as plain data, for targets and JSON."""
    plain: dict[str, Any] = {"id": subject.identity, "name": subject.name}
    plain["boxes"] = {t: list(box) for t, box in sorted(subject.boxes.items())}
    if subject.appearance:
        plain["appearance"] = subject.appearance
    if subject.spans:
        plain["spans"] = [span._asdict() for span in subject.spans]
    return plain


class HasRecord(Protocol):
    """Something that can be turned into a record with the same ``id``."""

    @property
    def id(self) -> str: ...

    def record(self) -> Record: ...


class ClipRecords(Sequence[Record]):
    """Trajectory records of ``clips`` (or of dialogues about them), made on demand, with their video frames."""

    def __init__(self, clips: Sequence[HasRecord]) -> None:
        self.clips = clips

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [clip.record() for clip in self.clips[index]]
        return self.clips[index].record()

    def __len__(self) -> int:
        return len(self.clips)


# ---- which frames


def sample_frames(total: int, count: int, how: str = "uniform", seed: int | str = 0) -> list[int]:
    """``count`` frame numbers of 1 … ``total``, ascending; all of them if there are no more than that.

    ``uniform``: the middle of each of ``count`` equal stretches; ``first``: the first ones; ``random``: one drawn from
    each stretch. Raises ``ValueError`` for an unknown ``how``.
    """
    if how not in SAMPLING:
        raise ValueError(f"unknown frame sampling {short(how)}; allowed: {', '.join(SAMPLING)}")
    if count >= total or how == "first":
        return list(range(1, min(count, total) + 1))
    edges = [i * total // count for i in range(count + 1)]
    if how == "uniform":
        return [(low + high - 1) // 2 + 1 for low, high in pairwise(edges)]
    rng = random.Random(f"frames/{seed}")
    return [rng.randrange(low, high) + 1 for low, high in pairwise(edges)]


def windows(clip: Clip, length: int, stride: int) -> list[Clip]:
    """Windows of ``length`` frames that begin every ``stride`` frames; frames left over at the end are not used."""
    starts = range(1, len(clip) - length + 2, stride)
    return [clip.select(range(start, start + length), f"{clip.id}:{start}") for start in starts]


# ---- pictures


def frame_files(folder: Path) -> list[Path]:
    """The picture files of a folder, in the order of the numbers in their names."""
    files = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES] if folder.is_dir() else []
    return sorted(files, key=lambda p: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", p.name)])


class VideoInfo(NamedTuple):
    """Properties of a video file; ``frames`` is counted by decoding if the header does not state it."""

    width: int
    height: int
    frames: int
    fps: float


def _open_video(path: Path) -> Any:
    try:
        import av
    except ImportError:
        raise fail(str(path), "missing package", "video files need PyAV: pip install 'fastrl[video]'") from None
    try:
        container = av.open(str(path))
    except (OSError, ValueError) as error:  # PyAV's errors derive from these
        raise fail(str(path), "bad video", f"cannot be read as video ({error})") from None
    if not container.streams.video:
        container.close()
        raise fail(str(path), "bad video", "has no video stream")
    return container


def video_info(path: Path) -> VideoInfo:
    """Size, number of frames and rate of a video file. Raises ``DataError`` for a bad file or without PyAV."""
    with _open_video(path) as container:
        stream = container.streams.video[0]
        frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        return VideoInfo(stream.width, stream.height, frames, float(stream.average_rate or 0) or 25.0)


def read_video(path: Path, numbers: Sequence[int]) -> list[Image]:
    """The frames ``numbers`` (from 0) of a video file as PIL images, read in one pass. Raises ``DataError``."""
    wanted = set(numbers)
    found: dict[int, Image] = {}
    with _open_video(path) as container:
        try:
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    found[index] = frame.to_image()
                    if len(found) == len(wanted):
                        break
        except (OSError, ValueError) as error:
            raise fail(str(path), "bad video", f"cannot be decoded ({error})") from None
    missing = sorted(wanted - set(found))
    if missing:
        raise fail(str(path), "bad video", f"has no frame {missing[0]} (counted from 0)")
    return [found[number] for number in numbers]


# ---- checks


def settle(clip: Clip, *, short: bool = False) -> tuple[Clip, list[Problem], list[Problem]]:
    """Check every track; returns the clip with its boxes clipped, the problems, and the notes.

    Problems: a box entirely outside the picture or without area, a frame number outside the clip, a repeated identity.
    Notes: boxes that reach outside (clipped), gaps, likely identity switches, and zero-length tracks, which are left
    out: an empty one, or (unless ``short``) a single box in a clip of several frames.
    """
    problems: list[Problem] = []
    notes: list[Problem] = []
    subjects = []
    seen: set[int] = set()
    for subject in clip.subjects:
        where = f"{clip.source or clip.id}:subject {subject.identity}"
        if subject.identity in seen:
            problems.append(Problem(where, "duplicate identity", f"identity {subject.identity} appears twice"))
        seen.add(subject.identity)
        boxes, clipped = _settle_boxes(clip, subject, where, problems)
        if clipped:
            message = (
                f"{len(clipped)} of {len(boxes)} boxes reach outside and were clipped, first in frame {clipped[0]}"
            )
            notes.append(Problem(where, "box outside", message))
        gaps = [(a, b) for a, b in pairwise(sorted(boxes)) if b > a + 1]
        if gaps:
            message = f"{len(gaps)} gaps, the first between frames {gaps[0][0]} and {gaps[0][1]}"
            notes.append(Problem(where, "gap", message))
        if len(boxes) <= (0 if short else min(1, len(clip) - 1)):
            notes.append(Problem(where, "zero-length track", f"{len(boxes)} boxes in {len(clip)} frames: left out"))
        else:
            subjects.append(replace(subject, boxes=boxes))
    settled = replace(clip, subjects=tuple(subjects))
    notes += _identity_switches(settled)
    return settled, problems, notes


def _settle_boxes(
    clip: Clip, subject: Subject, where: str, problems: list[Problem]
) -> tuple[dict[int, Box], list[int]]:
    boxes: dict[int, Box] = {}
    clipped = []
    for frame, box in sorted(subject.boxes.items()):
        if not 1 <= frame <= len(clip):
            problems.append(Problem(where, "frame outside", f"frame {frame} is not in 1 to {len(clip)}"))
            continue
        x1, y1, x2, y2 = box
        inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(clip.width)), min(y2, float(clip.height)))
        if x2 <= x1 or y2 <= y1:
            problems.append(Problem(where, "box without area", f"frame {frame}: box {box} has no area"))
        elif inside[2] <= inside[0] or inside[3] <= inside[1]:
            message = f"frame {frame}: box {box} lies wholly outside {clip.width}x{clip.height} pixels"
            problems.append(Problem(where, "box outside", message))
        else:
            boxes[frame] = inside
            if max(abs(a - b) for a, b in zip(box, inside, strict=True)) > TOLERANCE:
                clipped.append(frame)
    return boxes, clipped


def box_iou(a: Box, b: Box) -> float:
    """Intersection of two boxes over their union."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def _identity_switches(clip: Clip) -> list[Problem]:
    """Frames where a track jumps from its own last box to another's: their identities were probably exchanged."""
    notes = []
    for subject in clip.subjects:
        for frame, box in subject.boxes.items():
            before = subject.boxes.get(frame - 1)
            if before is None or box_iou(before, box) > 0:
                continue
            for other in clip.subjects:
                theirs = other.boxes.get(frame - 1)
                if other is not subject and theirs is not None and box_iou(theirs, box) > 0.5:
                    where = f"{clip.source or clip.id}:subject {subject.identity}"
                    message = f"frame {frame}: jumps to where subject {other.identity} was one frame before"
                    notes.append(Problem(where, "identity switch", message))
    return notes


def clip_to_dict(clip: Clip) -> dict[str, Any]:
    """A clip as one row of the ``tracks`` adapter's JSONL; frames must be files (or in a video)."""
    row: dict[str, Any] = {"id": clip.id, "width": clip.width, "height": clip.height, "seconds": list(clip.seconds)}
    if clip.frames:
        files = [file_of(frame) for frame in clip.frames]
        if None in files:
            raise ValueError(f"clip {clip.id}: frames in memory cannot be written to a row; save them as files")
        row["frames"] = [str(file) for file in files]
    elif clip.video is not None:
        row["video"], row["video_frames"] = str(clip.video), list(clip.video_frames)
    if clip.caption:
        row["caption"] = clip.caption
    row["subjects"] = [clip_subject(subject) for subject in clip.subjects]
    return row


def subjects_from_rows(rows: Iterable[tuple[int, int, str, Box]]) -> tuple[Subject, ...]:
    """Subjects from (identity, frame, name, box) in any order."""
    boxes: dict[int, dict[int, Box]] = {}
    names: dict[int, str] = {}
    for identity, frame, name, box in rows:
        boxes.setdefault(identity, {})[frame] = box
        names.setdefault(identity, name)
    return tuple(Subject(identity, names[identity], boxes[identity]) for identity in sorted(boxes))
