"""Trajectory text ↔ tracks: ``Track1: dog<Id1>Frame1:[x1,y1,x2,y2];Frame2:[x1,y1,x2,y2];</Id1>``.

The notation is Merlin's, which Video-UTR builds on (also without ``Track1:``); its coordinates are 0-1000. Frame
numbers count from 1 within the clip. ``parse_tracks`` of ``format_tracks`` gives the same tracks, and formatting these
gives the same text. Parsing follows the rules of ``parse.py``: it never raises, takes linear time, and bounds counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

from fastrl.answers.frames import View, from_original
from fastrl.answers.scan import NUMBER, Scanner, clean_label, number
from fastrl.answers.text import answer_region

MAX_TRACKS = 256
MAX_FRAMES = 4096  # boxes of one track

_OPEN = re.compile(r"<id\s{0,4}+([0-9]{1,9}+)\s{0,4}+>", re.IGNORECASE)
_FOUR = r"(?:\s*+,\s*+|\s++)".join([f"({NUMBER})"] * 4)
_FRAME = re.compile(  # a box that lost its bracket ends where the next thing begins; one that is none has no numbers
    r"frame[ \t_]{0,8}+([0-9]{1,9}+)\s*+(?:[:=]\s*+[\[(]{0,2}+|[\[(]{1,2}+)"
    rf"(?:\s*+{_FOUR}\s*+,?+\s*+(?:[\])]|(?=[;<]|frame)|\Z))?+",
    re.IGNORECASE,
)
_HEADING = re.compile(r"track[ \t]{0,8}+[0-9]{0,9}+\s{0,8}+:", re.IGNORECASE)
_TEXT_WINDOW = 4096  # characters after a track that are kept
_NUMBER = r"-?[0-9]{1,9}+(?:\.[0-9]{1,9}+)?+"
_STRICT = re.compile(
    r"(?:Track[0-9]{1,9}+: )?+[^<>;:\n\r]{1,100}+<Id(?P<id>[0-9]{1,9}+)>"
    rf"(?P<frames>(?:Frame[0-9]{{1,9}}+:\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\];)++)</Id(?P=id)>"
)
_NAME_WINDOW = 200  # characters before <Id> in which a track's name is searched
_BEFORE_NAME = re.compile(r"[<>;:\n\r.]")
_NOT_IN_NAME = "<>;:\n\r"

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Track:
    """One subject's boxes by frame number (from 1). Corners as written, finite."""

    identity: int
    name: str
    boxes: Mapping[int, Box]
    coords: tuple[float, ...] = field(default=(), repr=False, compare=False)  # all numbers, for resolve_frame
    text_after: str = field(default="", repr=False, compare=False)  # the text between this track and the next


@dataclass(frozen=True)
class ParsedTracks(Sequence[Track]):
    """The tracks of a text, in order; two tracks of one identity are kept as two."""

    tracks: tuple[Track, ...] = ()
    format: str | None = None  # "tracks", or None if nothing was recognised
    decimal: bool = False
    dropped: int = 0  # malformed boxes and second boxes for a frame (the first one counts)
    truncated: bool = False  # more than max_tracks tracks or max_frames boxes were found

    @property
    def parsable(self) -> bool:
        """At least one track with at least one box."""
        return bool(self.tracks)

    @overload
    def __getitem__(self, index: int) -> Track: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Track, ...]: ...
    def __getitem__(self, index: int | slice) -> Track | tuple[Track, ...]:
        return self.tracks[index]

    def __len__(self) -> int:
        return len(self.tracks)


def parse_tracks(text: str, max_tracks: int = MAX_TRACKS, max_frames: int = MAX_FRAMES) -> ParsedTracks:
    """Tracks of a model's answer, in the text's own numbers.

    A track extends from ``<Id1>`` to ``</Id1>``, the next track, or the end (a truncated answer keeps its boxes).
    Tracks without a single box are left out. The name is the text before ``<Id1>``, after ``Track1:`` if present.
    """
    scan = Scanner(answer_region(text))
    text, plain = scan.text, scan.plain
    tracks: list[Track] = []
    dropped, decimal, truncated = 0, False, False
    openings = []
    for match in _OPEN.finditer(plain):
        openings.append((int(match.group(1)), match.start(), match.end()))
        if len(openings) > 4 * max_tracks:
            truncated = True
            break
    for i, (identity, head, start) in enumerate(openings):
        end = openings[i + 1][1] if i + 1 < len(openings) else len(text)
        close = text.find("</", start, end)
        body_end = end if close < 0 else close
        boxes: dict[int, Box] = {}
        for match in _FRAME.finditer(plain, start, body_end):
            values = [value for v in match.groups()[1:] if v is not None and (value := number(v)) is not None]
            frame = int(match.group(1))
            if frame in boxes or len(values) < 4:
                dropped += 1
            elif len(boxes) == max_frames:
                truncated = True
                break
            else:
                boxes[frame] = (values[0], values[1], values[2], values[3])
                decimal = decimal or "." in match.group()
        if not boxes:
            continue
        if len(tracks) == max_tracks:
            truncated = True
            break
        previous_end = openings[i - 1][2] if i else 0
        coords = tuple(v for box in boxes.values() for v in box)
        name = _name(scan, max(previous_end, head - _NAME_WINDOW), head)
        text_after = text[body_end:end][:_TEXT_WINDOW].partition(">")[2]  # without the closing tag
        tracks.append(Track(identity, name, boxes, coords, text_after))
    return ParsedTracks(tuple(tracks), "tracks" if tracks else None, decimal, dropped, truncated)


def _name(scan: Scanner, start: int, end: int) -> str:
    headings = list(_HEADING.finditer(scan.plain, start, end))
    if not headings:  # prose may precede: the name is what follows the last mark that no name holds
        headings = list(_BEFORE_NAME.finditer(scan.plain, start, end))
    return clean_label(scan.text[headings[-1].end() if headings else start : end]) or ""


def matches_tracks(text: str) -> bool:
    """Whether a text has the form that ``format_tracks`` writes: one line per track, with frames in ascending order.

    A track's actions may follow on its line, and other text (a caption) after the first track.
    """
    for place, line in enumerate(text.strip().split("\n")):
        match = _STRICT.match(line)
        if match is None:
            if place == 0 or _OPEN.search(line):
                return False
            continue
        frames = [int(found.group(1)) for found in _FRAME.finditer(match["frames"])]
        if frames != sorted(set(frames)) or _OPEN.search(line, match.end()):
            return False
    return True


def format_tracks(tracks: Iterable[Track], view: View | None = None) -> str:
    """Tracks as text, one per line. With ``view``, original pixels become 0-1000 integers; else boxes stay as given.

    Raises ``ValueError`` for a name that would not survive the round trip (empty, too long, or holding ``<>;:`` or a
    line break), for an empty track, and for a frame number below 1.
    """
    lines = []
    for position, track in enumerate(tracks, start=1):
        name = track.name
        if not _is_writable(name):
            raise ValueError(f"track {track.identity}: name {name!r:.80} cannot be written in trajectory text")
        if not 0 <= track.identity < 10**9 or not track.boxes:
            raise ValueError(f"track {track.identity}: needs an identity from 0 to 999999999 and at least one box")
        frames = ""
        for frame in sorted(track.boxes):
            if not 1 <= frame < 10**9:
                raise ValueError(f"track {track.identity}: frame numbers count from 1, got {frame}")
            frames += f"Frame{frame}:[{','.join(_numbers(track.boxes[frame], view))}];"
        lines.append(f"Track{position}: {name}<Id{track.identity}>{frames}</Id{track.identity}>")
    return "\n".join(lines)


def _is_writable(name: str) -> bool:
    clean = bool(name) and name == clean_label(name)
    return clean and len(name) <= _NAME_WINDOW // 2 and not any(c in name for c in _NOT_IN_NAME)


def _numbers(box: Sequence[float], view: View | None) -> list[str]:
    if view is not None:
        return [str(min(max(math.floor(v + 0.5), 0), 1000)) for v in from_original(box, "thousand", view)]
    return [str(int(v)) if float(v).is_integer() and abs(v) < 1e15 else repr(float(v)) for v in box]
