"""One JSONL row → a tracked clip, for the ``tracks`` and ``utr`` adapters; and checks of its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastrl.data.clips import Box, Clip, Span, Subject, video_info
from fastrl.data.pictures import AnyPicture, Picture, is_file, over_large
from fastrl.data.rows import read_rows, reading
from fastrl.data.truth import read_box, read_list, read_truth
from fastrl.data.validate import (
    DataError,
    ImageFolder,
    Problem,
    Reading,
    Row,
    find_image_folder,
    is_number,
    short,
    why_turned,
)


class ClipRows(NamedTuple):
    """The rows of a file of clips, or what is wrong with them; ``images``: where their paths start, and how pictures
    are read."""

    rows: list[Row | Problem]
    images: ImageFolder


def clip_rows(file: Path, query: Mapping[str, str]) -> ClipRows:
    """Read a file of clips. Paths start from ``images`` of the query, else where the first of them is found."""
    rows = list(read_rows(file))
    names: list[Any] = []
    for _, _, fields in rows:
        if isinstance(fields, Mapping):
            frames = fields.get("frames")
            names += [fields.get("video", ""), *(frames[:1] if isinstance(frames, list) else [])]
    place = Path(query["images"]) if "images" in query else find_image_folder(file, names)
    folder = ImageFolder(place, reading(query, str(file)))
    return ClipRows([f if isinstance(f, Problem) else Row(f, where, n, folder) for n, where, f in rows], folder)


def clip_frames(
    files: Sequence[Path],
    length: int,
    size: tuple[int, int],
    where: str,
    folder: ImageFolder,
    problems: list[Problem],
    explicit: bool = True,
) -> tuple[AnyPicture, ...]:
    """A clip's picture files, read according to ``folder``. Notes problems: a wrong number of files, a file that is
    missing or unreadable, or one of another size. If stated sizes suffice, files may be missing. ``explicit``: the size
    comes from the row, not from a picture."""
    stated = folder.reading.stated
    if len(files) != length:
        if not stated:
            message = f"{length} frames announced, {len(files)} picture files found"
            problems.append(Problem(where, "wrong length", message))
        return ()
    frames: list[AnyPicture] = []
    for file in files:
        header = folder.header(file)
        if isinstance(header, str):
            if stated and "not found" in header:
                frames.append(Picture(file, stated=size))
            else:
                problems.append(Problem(where, "bad image", header))
            continue
        frames.append(folder.picture(file))
        if header.size != size:
            width, height = header.size
            message = f"{file} has {width}x{height} pixels, not {size[0]}x{size[1]}{why_turned(header, size)}"
            problems.append(Problem(where, "wrong size", message))
        elif header.orientation != 1 and not header.turned and not (explicit and header.swaps):
            folder.unheeded.append(str(file))
    return tuple(frames)


def clip_video(
    video: Path, numbers: Sequence[int], size: tuple[int, int], where: str, how: Reading, problems: list[Problem]
) -> Path | None:
    """The video file that frames ``numbers`` (from 0) are to come from; notes what is wrong with it. None: it is not
    there, and need not be."""
    if not is_file(video) and how.stated:
        return None
    _check_video(video, numbers, size, where, how, problems)
    return video


def _check_video(
    video: Path, numbers: Sequence[int], size: tuple[int, int], where: str, how: Reading, problems: list[Problem]
) -> None:
    if not is_file(video):
        problems.append(Problem(where, "missing video", f"video not found: {video}"))
        return
    try:
        info = video_info(video)
    except DataError as error:
        problems += [Problem(where, problem.kind, f"{video} {problem.message}") for problem in error.problems]
        return
    if info.width * info.height > how.max_pixels:
        problems.append(Problem(where, "bad image", over_large((info.width, info.height), how.max_pixels, str(video))))
    if (info.width, info.height) != size:
        message = f"{video} has {info.width}x{info.height} pixels, not {size[0]}x{size[1]}"
        problems.append(Problem(where, "wrong size", message))
    if numbers and max(numbers) >= info.frames:
        message = f"{video} has {info.frames} frames; frame {max(numbers)} (from 0) is asked for"
        problems.append(Problem(where, "wrong length", message))


def row_clip(row: Row) -> Clip | None:
    """The clip of a row; None where ``row.problems`` says why not. Its boxes are not checked yet (``clips.settle``)."""
    identity, fields = row.id(), row.fields
    files, video, numbers = _row_pictures(row)
    seconds = _row_seconds(row, len(files) or len(numbers))
    size = (fields.get("width"), fields.get("height"))
    if files and size == (None, None):
        found = row.images.size(files[0])
        size = found if isinstance(found, tuple) else size
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size):
        row.fail("wrong size", f"width and height must be positive integers, got {short(size)}")
    if row.problems or seconds is None:
        return None
    width, height = int(size[0] or 0), int(size[1] or 0)
    explicit = fields.get("width") is not None
    frames = clip_frames(files, len(files), (width, height), row.where, row.images, row.problems, explicit)
    if video is not None:
        video = clip_video(video, numbers, (width, height), row.where, row.images.reading, row.problems)
    subjects = row.parse("subjects", read_list, fields.get("subjects"))
    if subjects is None:
        return None
    built = [_row_subject(row, subject) for subject in subjects]
    caption = fields.get("caption", "")
    if not isinstance(caption, str):
        row.fail("wrong type", f"caption must be a string, got {short(caption)}")
    kept = tuple(subject for subject in built if subject is not None)
    return Clip(identity, width, height, seconds, kept, frames, video, numbers, str(caption), row.where)


def _row_pictures(row: Row) -> tuple[tuple[Path, ...], Path | None, tuple[int, ...]]:
    frames, video = row.truth("frames"), row.fields.get("video")
    if frames is not None:
        if isinstance(frames, list) and frames and all(isinstance(f, str) and f and "\0" not in f for f in frames):
            return tuple(row.images.path(frame) for frame in frames), None, ()
        row.fail("wrong type", f"frames must be a list of file names, got {short(frames)}")
    elif video is not None:
        numbers = row.truth("video_frames")
        valid = isinstance(numbers, list) and all(isinstance(n, int) and n >= 0 for n in numbers)
        if isinstance(video, str) and "\0" not in video and isinstance(numbers, list) and numbers and valid:
            return (), row.images.path(video), tuple(numbers)
        row.fail("wrong type", f"video needs video_frames, a list of frame numbers from 0; got {short(numbers)}")
    return (), None, ()


def _row_seconds(row: Row, pictures: int) -> tuple[float, ...] | None:
    seconds, fps = row.truth("seconds"), row.truth("fps")
    if seconds is None and pictures:
        if fps is not None and not (is_number(fps) and fps > 0):
            row.fail("wrong type", f"fps must be a positive number, got {short(fps)}")
            return None
        return tuple(i / (fps or 1.0) for i in range(pictures))
    valid = (
        isinstance(seconds, list) and all(is_number(s) for s in seconds) and len(seconds) == (pictures or len(seconds))
    )
    if valid and isinstance(seconds, list) and seconds and sorted(seconds) == seconds:
        return tuple(float(s) for s in seconds)
    row.fail("wrong type", f"seconds must be ascending times, one for each frame; got {short(seconds)}")
    return None


def _row_subject(row: Row, subject: Any) -> Subject | None:
    subject = read_truth(subject)
    given = read_truth(subject.get("boxes")) if isinstance(subject, dict) else None
    if not isinstance(subject, dict) or not isinstance(given, dict):
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
    for frame, box in given.items():
        if not (frame.isascii() and frame.isdigit() and len(frame) < 10):
            row.fail("wrong type", f"subject {identity}: frame {short(frame)} is no number")
            continue
        found = row.parse(f"subject {identity}, frame {frame}: box", read_box, box)
        if found is not None:
            boxes[int(frame)] = found
    spans = _row_spans(row, identity, read_truth(subject.get("spans", [])))
    return Subject(identity, name.strip(), boxes, looks, spans)


def _row_spans(row: Row, identity: int, spans: Any) -> tuple[Span, ...]:
    result = []
    for span in spans if isinstance(spans, list) else [spans]:
        span = read_truth(span)
        action, first, last = (span.get(k) for k in Span._fields) if isinstance(span, dict) else (None, None, None)
        if isinstance(action, str) and isinstance(first, int) and isinstance(last, int) and 1 <= first <= last:
            result.append(Span(action, first, last))
        else:
            row.fail("wrong type", f"subject {identity}: a span needs action, first <= last; got {short(span)}")
    return tuple(result)
