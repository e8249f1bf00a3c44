"""Tracked clips → trajectory records: MOTChallenge folders, COCO-RLE mask tracks (SA-V), and a generic JSONL.

- ``mot:FOLDER``: one sequence (``seqinfo.ini``, ``gt/gt.txt``, ``img1/``) or a folder of them. Its pixels count from 1.
- ``sav:FILE``: one ``*_manual.json`` or ``*_auto.json``. Masks become their bounding boxes; names are not annotated.
- ``tracks:FILE``: JSONL, one clip a row: ``id``; ``frames`` (picture files), or ``video`` with ``video_frames``, or
  neither; ``width``, ``height``, ``seconds`` (or ``fps``) if the pictures do not give them; ``caption``; ``subjects``,
  each with ``id``, ``name``, ``boxes`` {frame from 1: [x1, y1, x2, y2]}, ``appearance``, ``spans`` [{action, first,
  last}]. ``clips.clip_to_dict`` writes such rows.

Query keys of all: ``window`` and ``stride`` (cut into stretches of so many frames, one every so many), ``frames`` and
``sample`` (how many frames of each, and ``uniform``, ``first`` or ``random``), ``limit``, ``seed``, and how
pictures are read (``rows.READING``). Of mot and sav:
``name`` (what subjects are called; default "person" and "object"). Of sav and tracks: ``images`` (folder of the
frames). Of sav: ``video`` (the video file). A record's id is the clip's, with ``:`` and its first frame when cut.
"""

from __future__ import annotations

import configparser
import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastrl.answers import format_tracks
from fastrl.data.clip_rows import clip_frames, clip_rows, clip_video, row_clip
from fastrl.data.clips import (
    SAMPLING,
    Box,
    Clip,
    ClipRecords,
    frame_files,
    sample_frames,
    settle,
    subjects_from_rows,
    windows,
)
from fastrl.data.masks import rle_box
from fastrl.data.pictures import AnyPicture
from fastrl.data.records import Dataset
from fastrl.data.rows import READING, choice_option, exif_note, int_option, ordered, parse_json, read_text, reading
from fastrl.data.validate import (
    DataError,
    ImageFolder,
    Problem,
    Row,
    fail,
    is_number,
    short,
)

_COMMON = ("window", "stride", "frames", "sample", "limit", "seed", *READING)
KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"mot": (*_COMMON, "name"), "sav": (*_COMMON, "name", "images", "video"), "tracks": (*_COMMON, "images")}
)
# MOT16/17/20 class ids; MOT15 writes -1.
_MOT_CLASSES = MappingProxyType(
    {
        2: "person on vehicle",
        3: "car",
        4: "bicycle",
        5: "motorbike",
        6: "non-motorised vehicle",
        7: "static person",
        8: "distractor",
        9: "occluder",
    }
)


def load_mot(path: str, query: Mapping[str, str]) -> Dataset:
    """Read one MOTChallenge sequence or a folder of them. Raises ``DataError`` for an unreadable file or option."""
    root = Path(path)
    if not root.is_dir():
        raise fail(path, "missing file", "no such folder: a MOTChallenge sequence or a folder of sequences is needed")
    folders = [root] if (root / "gt").is_dir() else sorted(p.parent for p in root.glob("*/gt"))
    if not folders:
        raise fail(path, "missing file", "holds no gt/gt.txt, nor does any folder in it")
    images = ImageFolder(Path(), reading(query, path))
    clips = [_mot_clip(folder, query.get("name", "person"), images) for folder in folders]
    return _dataset(clips, query, path, images)


def load_sav(path: str, query: Mapping[str, str]) -> Dataset:
    """Read one SA-V mask-track file. Raises ``DataError`` for an unreadable file or option."""
    images = ImageFolder(Path(), reading(query, path))
    return _dataset([_sav_clip(path, query, images)], query, path, images)


def load_jsonl(path: str, query: Mapping[str, str]) -> Dataset:
    """Read clips from JSONL. Raises ``DataError`` for an unreadable file or option."""
    clips: list[Clip | list[Problem]] = []
    found = clip_rows(Path(path), query)
    for row in found.rows:
        clip = row_clip(row) if isinstance(row, Row) else None
        wrong = row.problems if isinstance(row, Row) else [row]
        clips.append(wrong if wrong or clip is None else clip)
    return _dataset(clips, query, path, found.images)


def _dataset(
    clips: Sequence[Clip | list[Problem]], query: Mapping[str, str], path: str, images: ImageFolder
) -> Dataset:
    """Check, cut and sample clips, and return them as a data set."""
    limit, seed = int_option(query, "limit", path, 1), int_option(query, "seed", path)
    window, stride = int_option(query, "window", path, 1), int_option(query, "stride", path, 1)
    count, how = int_option(query, "frames", path, 1), choice_option(query, "sample", SAMPLING, path)
    problems: list[Problem] = []
    notes = exif_note(images, path)
    left_out: list[Problem] = []
    pieces: list[Clip] = []
    seen: set[str] = set()
    for clip in clips:
        if isinstance(clip, list):
            problems += clip
            continue
        if clip.id in seen:
            problems.append(Problem(clip.source, "duplicate id", f"an earlier clip has the id {short(clip.id)}"))
            continue
        seen.add(clip.id)
        settled, wrong, worth_knowing = settle(clip)
        wrong += _unwritable(settled)
        problems += wrong
        notes += worth_knowing
        if wrong:
            continue
        for piece in windows(settled, window, stride or window) if window else [settled]:
            if count is not None:
                piece = piece.select(sample_frames(len(piece), count, how, f"{seed}/{piece.id}"))
            if piece.subjects:
                pieces.append(piece)
            else:
                left_out.append(Problem(f"{clip.source}:{piece.id}", "no subject", "no subject in these frames"))
    records = ClipRecords(ordered(pieces, seed)[:limit])
    return Dataset(records, problems, left_out, notes)


def _unwritable(clip: Clip) -> list[Problem]:
    """Problems for names that trajectory text cannot represent."""
    problems = []
    for track in clip.tracks():
        try:
            format_tracks([track])
        except ValueError as error:
            problems.append(Problem(f"{clip.source}:subject {track.identity}", "bad name", str(error)))
    return problems


# ---- MOTChallenge


def _mot_clip(folder: Path, person: str, images: ImageFolder) -> Clip | list[Problem]:
    where = str(folder / "seqinfo.ini")
    info = configparser.ConfigParser(interpolation=None)
    try:
        info.read_string(read_text(folder / "seqinfo.ini"))
        section = info["Sequence"]
        rate, length = section.getfloat("frameRate", 0.0), section.getint("seqLength", 0)
        width, height = section.getint("imWidth", 0), section.getint("imHeight", 0)
    except DataError as error:
        return list(error.problems)
    except (configparser.Error, KeyError, ValueError) as error:
        return [Problem(where, "bad seqinfo", f"not a MOTChallenge seqinfo.ini ({error})")]
    if not (math.isfinite(rate) and rate > 0 and min(length, width, height) > 0):
        return [Problem(where, "bad seqinfo", "frameRate, seqLength, imWidth and imHeight must be positive")]
    problems: list[Problem] = []
    files = frame_files(folder / section.get("imDir", "img1"))
    frames = clip_frames(files, length, (width, height), where, images, problems)
    rows = _mot_rows(folder / "gt" / "gt.txt", person, problems)
    if problems:
        return problems
    seconds = tuple(i / rate for i in range(length))
    name = section.get("name", folder.name)
    source = str(folder / "gt" / "gt.txt")
    return Clip(name, width, height, seconds, subjects_from_rows(rows), frames, source=source)


def _mot_rows(file: Path, person: str, problems: list[Problem]) -> list[tuple[int, int, str, Box]]:
    """(identity, frame, name, box) of valid lines: MOT16 and later mark the others with a 0 in column 7."""
    rows: dict[tuple[int, int], tuple[int, int, str, Box]] = {}
    try:
        lines = read_text(file).splitlines()
    except DataError as error:
        problems += error.problems
        return []
    for i, fields in enumerate(csv.reader(lines), start=1):
        if not fields:
            continue
        where = f"{file}:{i}"
        try:
            numbers = [float(field) for field in fields]
            frame, identity = int(numbers[0]), int(numbers[1])
            x, y, width, height = numbers[2:6]
        except (ValueError, OverflowError, IndexError):
            problems.append(Problem(where, "wrong type", f"needs frame, id, x, y, width, height; got {short(fields)}"))
            continue
        if (frame, identity) in rows:
            problems.append(Problem(where, "duplicate box", f"second box of identity {identity} in frame {frame}"))
        if not all(is_number(v) for v in numbers[:6]):
            problems.append(Problem(where, "not a number", f"must be finite numbers, got {short(fields)}"))
        if len(numbers) > 6 and numbers[6] == 0:
            continue
        name = _MOT_CLASSES.get(int(numbers[7]), person) if len(numbers) > 7 and is_number(numbers[7]) else person
        rows[frame, identity] = (identity, frame, name, (x - 1, y - 1, x + width - 1, y + height - 1))
    return list(rows.values())


# ---- COCO-RLE mask tracks


def _sav_clip(path: str, query: Mapping[str, str], images: ImageFolder) -> Clip | list[Problem]:
    data = parse_json(read_text(Path(path)), path)
    if isinstance(data, Problem):
        return [data]
    fields = ("video_width", "video_height", "video_frame_count", "video_duration")
    if not isinstance(data, dict) or not isinstance(data.get("masklet"), list) or not data["masklet"]:
        return [Problem(path, "wrong type", "no list 'masklet': not a mask-track file")]
    if not all(is_number(data.get(field)) and data[field] > 0 for field in fields):
        return [Problem(path, "wrong type", f"{', '.join(fields)} must be positive numbers")]
    width, height, total = int(data["video_width"]), int(data["video_height"]), int(data["video_frame_count"])
    masklets = data["masklet"]
    identities = data.get("masklet_id", list(range(len(masklets[0]) if isinstance(masklets[0], list) else 0)))
    problems: list[Problem] = []
    rows = _sav_rows(masklets, identities, (width, height), query.get("name", "object"), path, problems)
    stride = max(1, round(total / len(masklets)))
    numbers = tuple(i * stride for i in range(len(masklets)))
    seconds = tuple(number * data["video_duration"] / total for number in numbers)
    frames, video = _sav_pictures(query, numbers, (width, height), path, images, problems)
    if problems:
        return problems
    name = str(data.get("video_id", Path(path).stem))
    video_frames = numbers if video else ()
    return Clip(name, width, height, seconds, subjects_from_rows(rows), frames, video, video_frames, source=path)


def _sav_rows(
    masklets: list[Any], identities: Any, size: tuple[int, int], name: str, path: str, problems: list[Problem]
) -> list[tuple[int, int, str, Box]]:
    width, height = size
    if not isinstance(identities, list) or not all(isinstance(i, int) and i >= 0 for i in identities):
        problems.append(Problem(path, "wrong type", "masklet_id must be a list of integers of at least 0"))
        return []
    rows = []
    for frame, masks in enumerate(masklets, start=1):
        where = f"{path}:masklet {frame}"
        if not isinstance(masks, list) or len(masks) != len(identities):
            problems.append(Problem(where, "wrong type", f"must hold {len(identities)} masks, got {short(masks)}"))
            continue
        for identity, mask in zip(identities, masks, strict=True):
            if not isinstance(mask, dict) or mask.get("size") != [height, width]:
                message = f"mask of object {identity} must have size [{height}, {width}], got {short(mask)}"
                problems.append(Problem(where, "wrong size", message))
                continue
            try:
                box = rle_box(mask.get("counts"), height, width)
            except ValueError as error:
                problems.append(Problem(where, "bad mask", f"mask of object {identity}: {error}"))
                continue
            if box is not None:
                rows.append((identity, frame, name, box))
    return rows


def _sav_pictures(
    query: Mapping[str, str],
    numbers: Sequence[int],
    size: tuple[int, int],
    path: str,
    images: ImageFolder,
    problems: list[Problem],
) -> tuple[tuple[AnyPicture, ...], Path | None]:
    if "images" in query:
        files = frame_files(Path(query["images"]))
        if len(files) > len(numbers):  # all frames of the video: take those that are annotated
            files = [files[number] for number in numbers if number < len(files)]
        return clip_frames(files, len(numbers), size, path, images, problems), None
    if "video" in query:
        video = Path(query["video"])
        return (), clip_video(video, numbers, size, path, images.reading, problems)
    return (), None
