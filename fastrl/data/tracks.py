"""Tracked clips → trajectory records: MOTChallenge folders, COCO-RLE mask tracks (SA-V), and a generic JSONL.

- ``mot:FOLDER``: one sequence (``seqinfo.ini``, ``gt/gt.txt``, ``img1/``) or a folder of them. Its pixels count from 1.
- ``sav:FILE``: one ``*_manual.json`` or ``*_auto.json``. Masks become their bounding boxes; names are not annotated.
- ``tracks:FILE``: JSONL, one clip a row: ``id``; ``frames`` (picture files), or ``video`` with ``video_frames``, or
  neither; ``width``, ``height``, ``seconds`` (or ``fps``) where the pictures do not say; ``caption``; ``subjects``,
  each with ``id``, ``name``, ``boxes`` {frame from 1: [x1, y1, x2, y2]}, ``appearance``, ``spans`` [{action, first,
  last}]. ``clips.clip_to_dict`` writes such rows.

Query keys of all: ``window`` and ``stride`` (cut into stretches of so many frames, one every so many), ``frames`` and
``sample`` (how many frames of each, and ``uniform``, ``first`` or ``random``), ``limit``, ``seed``. Of mot and sav:
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
from fastrl.data.clips import (
    SAMPLING,
    Box,
    Clip,
    ClipRecords,
    Span,
    Subject,
    frame_files,
    sample_frames,
    settle,
    subjects_from_rows,
    video_info,
    windows,
)
from fastrl.data.masks import rle_box
from fastrl.data.records import Dataset
from fastrl.data.rows import choice_option, int_option, ordered, parse_json, read_rows, read_text
from fastrl.data.validate import (
    DataError,
    ImageFolder,
    Problem,
    Row,
    corners,
    fail,
    find_image_folder,
    is_number,
    short,
)

_COMMON = ("window", "stride", "frames", "sample", "limit", "seed")
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
    return _dataset([_mot_clip(folder, query.get("name", "person")) for folder in folders], query, path)


def load_sav(path: str, query: Mapping[str, str]) -> Dataset:
    """Read one SA-V mask-track file. Raises ``DataError`` for an unreadable file or option."""
    return _dataset([_sav_clip(path, query)], query, path)


def load_jsonl(path: str, query: Mapping[str, str]) -> Dataset:
    """Read clips from JSONL. Raises ``DataError`` for an unreadable file or option."""
    file = Path(path)
    rows = list(read_rows(file))
    names = []
    for _, _, row in rows:
        if isinstance(row, Mapping):
            frames = row.get("frames")
            names += [row.get("video", ""), *(frames[:1] if isinstance(frames, list) else [])]
    folder = Path(query["images"]) if "images" in query else find_image_folder(file, names)
    images = ImageFolder(folder)
    clips: list[Clip | list[Problem]] = []
    for number, where, fields in rows:
        if isinstance(fields, Problem):
            clips.append([fields])
            continue
        row = Row(fields, where, number, images)
        clip = _row_clip(row)
        clips.append(row.problems if row.problems or clip is None else clip)
    return _dataset(clips, query, path)


def _dataset(clips: Sequence[Clip | list[Problem]], query: Mapping[str, str], path: str) -> Dataset:
    """Check, cut and sample clips, and make them a data set."""
    limit, seed = int_option(query, "limit", path, 1), int_option(query, "seed", path)
    window, stride = int_option(query, "window", path, 1), int_option(query, "stride", path, 1)
    count, how = int_option(query, "frames", path, 1), choice_option(query, "sample", SAMPLING, path)
    problems: list[Problem] = []
    notes: list[Problem] = []
    left_out: list[Problem] = []
    pieces: list[Clip] = []
    seen: set[str] = set()
    for clip in clips:
        if isinstance(clip, list):
            problems += clip
            continue
        if clip.id in seen:
            problems.append(Problem(clip.source, "duplicate id", f"a clip before it has the id {clip.id!r}"))
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
    """Names that trajectory text cannot hold."""
    problems = []
    for track in clip.tracks():
        try:
            format_tracks([track])
        except ValueError as error:
            problems.append(Problem(f"{clip.source}:subject {track.identity}", "bad name", str(error)))
    return problems


# ---- MOTChallenge


def _mot_clip(folder: Path, person: str) -> Clip | list[Problem]:
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
    frames = frame_files(folder / section.get("imDir", "img1"))
    problems = _check_frames(frames, length, (width, height), where)
    rows = _mot_rows(folder / "gt" / "gt.txt", person, problems)
    if problems:
        return problems
    seconds = tuple(i / rate for i in range(length))
    name = section.get("name", folder.name)
    source = str(folder / "gt" / "gt.txt")
    return Clip(name, width, height, seconds, subjects_from_rows(rows), tuple(frames), source=source)


def _check_frames(frames: Sequence[Path], length: int, size: tuple[int, int], where: str) -> list[Problem]:
    if len(frames) != length:
        return [Problem(where, "wrong length", f"{length} frames announced, {len(frames)} picture files found")]
    folder = ImageFolder(Path())
    problems = []
    for frame in frames:
        found = folder.size(frame)
        if found != size:
            message = (
                found
                if isinstance(found, str)
                else f"{frame} has {found[0]}x{found[1]} pixels, not {size[0]}x{size[1]}"
            )
            problems.append(Problem(where, "bad image" if isinstance(found, str) else "wrong size", message))
    return problems


def _mot_rows(file: Path, person: str, problems: list[Problem]) -> list[tuple[int, int, str, Box]]:
    """(identity, frame, name, box) of the lines that count: MOT16 and later mark the others with a 0 in column 7."""
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
            x1, y1, x2, y2 = corners(numbers[2:6])
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
        rows[frame, identity] = (identity, frame, name, (x1 - 1, y1 - 1, x2 - 1, y2 - 1))
    return list(rows.values())


# ---- COCO-RLE mask tracks


def _sav_clip(path: str, query: Mapping[str, str]) -> Clip | list[Problem]:
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
    frames, video = _sav_pictures(query, numbers, (width, height), path, problems)
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
    query: Mapping[str, str], numbers: Sequence[int], size: tuple[int, int], path: str, problems: list[Problem]
) -> tuple[tuple[Path, ...], Path | None]:
    if "images" in query:
        files = frame_files(Path(query["images"]))
        if len(files) > len(numbers):  # all frames of the video: take those that are annotated
            files = [files[number] for number in numbers if number < len(files)]
        problems += _check_frames(files, len(numbers), size, path)
        return tuple(files), None
    if "video" in query:
        video = Path(query["video"])
        _check_video(video, numbers, size, path, problems)
        return (), video
    return (), None


def _check_video(
    video: Path, numbers: Sequence[int], size: tuple[int, int], where: str, problems: list[Problem]
) -> None:
    if not video.is_file():
        problems.append(Problem(where, "missing video", f"video not found: {video}"))
        return
    try:
        info = video_info(video)
    except DataError as error:
        problems += [Problem(where, problem.kind, f"{video} {problem.message}") for problem in error.problems]
        return
    if (info.width, info.height) != size:
        message = f"{video} has {info.width}x{info.height} pixels, not {size[0]}x{size[1]}"
        problems.append(Problem(where, "wrong size", message))
    if numbers and max(numbers) >= info.frames:
        message = f"{video} has {info.frames} frames; frame {max(numbers)} (from 0) is asked for"
        problems.append(Problem(where, "wrong length", message))


# ---- JSONL


def _row_clip(row: Row) -> Clip | None:
    identity, fields = row.id(), row.fields
    frames, video, numbers = _row_pictures(row)
    seconds = _row_seconds(row, len(frames) or len(numbers))
    size = (fields.get("width"), fields.get("height"))
    if frames and size == (None, None):
        found = row.images.size(frames[0])
        size = found if isinstance(found, tuple) else size
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size):
        row.fail("wrong size", f"width and height must be positive integers, got {short(size)}")
    if row.problems or seconds is None:
        return None
    width, height = int(size[0] or 0), int(size[1] or 0)
    row.problems += _check_frames(frames, len(frames), (width, height), row.where)
    if video is not None:
        _check_video(video, numbers, (width, height), row.where, row.problems)
    subjects = fields.get("subjects")
    if not isinstance(subjects, list):
        row.fail("wrong type", f"subjects must be a list, got {short(subjects)}")
        return None
    built = [_row_subject(row, subject) for subject in subjects]
    caption = fields.get("caption", "")
    if not isinstance(caption, str):
        row.fail("wrong type", f"caption must be a string, got {short(caption)}")
    kept = tuple(subject for subject in built if subject is not None)
    return Clip(identity, width, height, seconds, kept, frames, video, numbers, str(caption), row.where)


def _row_pictures(row: Row) -> tuple[tuple[Path, ...], Path | None, tuple[int, ...]]:
    frames, video = row.fields.get("frames"), row.fields.get("video")
    if frames is not None:
        if isinstance(frames, list) and frames and all(isinstance(f, str) and f and "\0" not in f for f in frames):
            return tuple(row.images.path(frame) for frame in frames), None, ()
        row.fail("wrong type", f"frames must be a list of file names, got {short(frames)}")
    elif video is not None:
        numbers = row.fields.get("video_frames")
        sound = isinstance(numbers, list) and all(isinstance(n, int) and n >= 0 for n in numbers)
        if isinstance(video, str) and "\0" not in video and isinstance(numbers, list) and numbers and sound:
            return (), row.images.path(video), tuple(numbers)
        row.fail("wrong type", f"video needs video_frames, a list of frame numbers from 0; got {short(numbers)}")
    return (), None, ()


def _row_seconds(row: Row, pictures: int) -> tuple[float, ...] | None:
    seconds, fps = row.fields.get("seconds"), row.fields.get("fps")
    if seconds is None and pictures:
        if fps is not None and not (is_number(fps) and fps > 0):
            row.fail("wrong type", f"fps must be a positive number, got {short(fps)}")
            return None
        return tuple(i / (fps or 1.0) for i in range(pictures))
    sound = (
        isinstance(seconds, list) and all(is_number(s) for s in seconds) and len(seconds) == (pictures or len(seconds))
    )
    if sound and isinstance(seconds, list) and seconds and sorted(seconds) == seconds:
        return tuple(float(s) for s in seconds)
    row.fail("wrong type", f"seconds must be ascending times, one for each frame; got {short(seconds)}")
    return None


def _row_subject(row: Row, subject: Any) -> Subject | None:
    if not isinstance(subject, dict) or not isinstance(subject.get("boxes"), dict):
        row.fail("wrong type", f"a subject needs id, name and boxes {{frame: box}}, got {short(subject)}")
        return None
    identity, name, looks = subject.get("id"), subject.get("name"), subject.get("appearance", "")
    if isinstance(identity, bool) or not isinstance(identity, int) or identity < 0:
        row.fail("wrong type", f"a subject's id must be an integer of at least 0, got {short(identity)}")
        return None
    if not isinstance(name, str) or not name.strip() or not isinstance(looks, str):
        row.fail("wrong type", f"subject {identity}: name must be a non-empty string, appearance a string")
        return None
    boxes: dict[int, Box] = {}
    for frame, box in subject["boxes"].items():
        if not (frame.isascii() and frame.isdigit() and len(frame) < 10):
            row.fail("wrong type", f"subject {identity}: frame {short(frame)} is no number")
        elif not (isinstance(box, list) and len(box) == 4 and all(is_number(v) for v in box)):
            row.fail("not a number", f"subject {identity}, frame {frame}: box must be four numbers, got {short(box)}")
        else:
            boxes[int(frame)] = (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
    spans = _row_spans(row, identity, subject.get("spans", []))
    return Subject(identity, name.strip(), boxes, looks, spans)


def _row_spans(row: Row, identity: int, spans: Any) -> tuple[Span, ...]:
    result = []
    for span in spans if isinstance(spans, list) else [spans]:
        action, first, last = (span.get(k) for k in Span._fields) if isinstance(span, dict) else (None, None, None)
        if isinstance(action, str) and isinstance(first, int) and isinstance(last, int) and 1 <= first <= last:
            result.append(Span(action, first, last))
        else:
            row.fail("wrong type", f"subject {identity}: a span needs action, first <= last; got {short(span)}")
    return tuple(result)
