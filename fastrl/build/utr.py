"""``fastrl build utr``: tracked clips → dialogues that cannot be answered from a few frames (Video-UTR's task).

For each subject whose track covers several of a clip's frames there is one dialogue of each requested kind: its
attribute is drawn among those that identify this subject (see ``fastrl.data.dialogues``), and the answer follows the
subject through all frames. Subjects are numbered by when and where they first appear; ``track`` has the source's
number.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastrl.build.portions import Tally, build_portions
from fastrl.data import Dataset, load_data
from fastrl.data.clips import SAMPLING, Clip, ClipRecords, Span, Subject, sample_frames
from fastrl.data.dialogues import (
    QUERIES,
    Dialogue,
    make_dialogue,
    number_subjects,
    one_frame_dialogue,
    parsable_action,
    pick_query,
)
from fastrl.data.files import image_names
from fastrl.data.scenes import Scenes
from fastrl.data.utr import dialogue_row
from fastrl.data.validate import SHOWN, nearest

PORTION = 32  # clips between two writes of the summary
ANSWERS = ("trajectory", "frame")


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build; it can only be continued with the same options."""

    data: str
    frames: int
    sample: str = "uniform"
    queries: tuple[str, ...] = ("spatial", "temporal")
    min_frames: int = 3  # of a subject's track in the chosen frames (of all of them in a shorter clip)
    answers: str = "trajectory"  # frame: answers from the query's own frame, a set that allows temporal hacking
    motion: bool = False  # derive actions of subjects without any from the movement of their boxes
    seed: int = 0
    limit: int | None = None
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.frames < 2:
            raise ValueError(f"--frames: a trajectory needs 2 or more, got {self.frames}")
        if self.sample not in SAMPLING:
            raise ValueError(f"--sample: unknown {self.sample!r}{nearest(self.sample, SAMPLING)}")
        if self.min_frames < 2:
            raise ValueError(f"--min-frames: a track of several frames has 2 or more, got {self.min_frames}")
        if self.answers not in ANSWERS:
            raise ValueError(f"--answers: unknown {self.answers!r}{nearest(self.answers, ANSWERS)}")
        if self.answers == "frame" and self.queries != ("spatial",):
            raise ValueError("--answers frame: only spatial queries can be answered from one frame (--queries spatial)")


def parse_queries(text: str) -> tuple[str, ...]:
    """``"spatial,temporal"`` as kinds of queries. Raises ``ValueError`` for an unknown kind, or none."""
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for kind in kinds:
        if kind not in QUERIES:
            raise ValueError(f"--queries: unknown kind {kind!r}{nearest(kind, QUERIES)}")
    if not kinds:
        raise ValueError(f"--queries: name one or more of {', '.join(QUERIES)}")
    return kinds


def build_dialogues(
    options: BuildOptions, out: Path, *, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Build a dialogue file, or continue an interrupted one.

    Args:
        options: see :class:`BuildOptions`.
        out: the JSONL file (``fastrl.data.utr`` describes its format). Next to it: ``NAME.summary.json`` and, if the
            clips' frames are not files, ``NAME.images/``.
        say: called with progress messages.

    Returns:
        The summary: clips and subjects seen, dialogues kept by attribute, what was dropped and why (one count for each
        subject, or for each subject and kind of query), ``notes`` on the data's tracks (boxes outside, gaps, identity
        switches, zero-length tracks) by kind, seconds.

    Raises:
        ValueError: ``out`` belongs to another build, or the data has no tracked clips.
        DataError: the data is bad.
    """
    data = load_data(options.data, skip_bad=options.skip_bad, deep=options.skip_bad)
    notes = data.notes
    for line in (data.skips, *(str(note) for note in notes[:SHOWN])):
        if line:
            say(line)
    total = min(len(data), options.limit) if options.limit is not None else len(data)
    clip_at = _clips_of(data, options.data)

    def work(portion: int, tally: Tally) -> list[str]:
        started = time.perf_counter()
        lines = []
        for number in range(portion * PORTION, min((portion + 1) * PORTION, total)):
            rows = clip_rows_of(clip_at(number), options, number, out, tally)
            lines += [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        tally["seconds"] += time.perf_counter() - started
        return lines

    def after(portion: int, tally: Tally) -> None:
        say(f"{tally['clips']}/{total} clips, {tally['kept']} dialogues")

    start: Tally = {"clips": 0, "subjects": 0, "kept": 0, "queries": {}, "dropped": {}, "seconds": 0.0}
    plain = json.loads(json.dumps(asdict(options)))  # tuples as JSON has them
    tally = build_portions(out, plain, -(-total // PORTION), work, start, after=after)
    return {**tally, "notes": dict(Counter(note.kind for note in notes))}


def clip_rows_of(clip: Clip, options: BuildOptions, number: int, out: Path, tally: Tally) -> list[dict[str, Any]]:
    """The lines of clip ``number``'s dialogues; counts into the tally."""
    tally["clips"] += 1
    if not (clip.frames or clip.video):
        _count(tally["dropped"], "clip without pictures (images= or video= in the spec)")
        return []
    chosen = clip.select(sample_frames(len(clip), options.frames, options.sample, f"{options.seed}/{clip.id}"))
    _count(tally["dropped"], "not in the chosen frames", len(clip.subjects) - len(chosen.subjects))
    tally["subjects"] += len(clip.subjects)
    numbered, tracks = number_subjects(_with_actions(chosen, options.motion))
    rows = []
    images: list[str] | None = None
    for subject in numbered.subjects:
        if len(subject.boxes) < min(options.min_frames, len(numbered)):
            _count(tally["dropped"], f"track covers fewer than {options.min_frames} frames")
            continue
        for kind in options.queries:
            dialogue = make_one(numbered, subject, kind, options)
            if dialogue is None:
                _count(tally["dropped"], f"no {kind} query is about one subject only")
                continue
            if images is None:  # written once, when the first dialogue needs them
                images = image_names(numbered.frames, number, out)
            row = dialogue_row(dialogue, images)
            if clip.video is not None and not images:
                row["video"] = str(clip.video.resolve())
            row["subjects"][0]["track"] = tracks[subject.identity]
            rows.append(row)
            tally["kept"] += 1
            _count(tally["queries"], f"{kind}/{dialogue.query.attribute}")
    return rows


def make_one(clip: Clip, subject: Subject, kind: str, options: BuildOptions) -> Dialogue | None:
    """A dialogue of one kind about one subject, its id ``CLIP/NUMBER-KIND``; None if no query is unique."""
    rng = random.Random(f"{options.seed}/{clip.id}/{subject.identity}/{kind}")
    query = pick_query(rng, clip, subject, kind)
    if query is None:
        return None
    make = make_dialogue if options.answers == "trajectory" else one_frame_dialogue
    dialogue = make(clip, subject, query)
    return replace(dialogue, clip=replace(clip, id=f"{clip.id}/{subject.identity}-{kind}"))


def _clips_of(data: Sequence[Any], spec: str) -> Callable[[int], Clip]:
    """A function that returns clip i of a data set of tracked clips, with all its subjects."""
    records = data.records if isinstance(data, Dataset) else data
    if isinstance(records, Scenes):
        return records.clip
    if isinstance(records, ClipRecords) and all(isinstance(clip, Clip) for clip in records.clips):
        clips = records.clips
        return lambda number: clips[number]  # type: ignore[return-value]
    raise ValueError(f"{spec}: no tracked clips; --data takes mot:, sav:, tracks: and scenes:trajectory")


def _with_actions(clip: Clip, motion: bool) -> Clip:
    """The clip with actions in parsable form; with ``motion``, subjects without actions get their movement."""
    subjects = []
    for subject in clip.subjects:
        spans = tuple(span._replace(action=parsable_action(span.action)) for span in subject.spans)
        spans = tuple(span for span in spans if span.action)
        if motion and not spans:
            spans = (motion_of(subject),)
        subjects.append(replace(subject, spans=spans))
    return replace(clip, subjects=tuple(subjects))


def motion_of(subject: Subject) -> Span:
    """The movement of a subject over its whole track: the main direction of the path from the centre of its first box
    to that of its last one; ``stays`` if that is less than half its mean side. It is relative to the picture, so camera
    motion counts.
    """
    first, last = min(subject.boxes), max(subject.boxes)
    a, b = subject.boxes[first], subject.boxes[last]
    dx, dy = (b[0] + b[2] - a[0] - a[2]) / 2, (b[1] + b[3] - a[1] - a[3]) / 2
    side = (a[2] - a[0] + a[3] - a[1]) / 2
    if max(abs(dx), abs(dy)) < side / 2:
        return Span("stays", first, last)
    if abs(dx) >= abs(dy):
        return Span("moves right" if dx > 0 else "moves left", first, last)
    return Span("moves down" if dy > 0 else "moves up", first, last)


def _count(counts: dict[str, int], name: str, number: int = 1) -> None:
    if number:
        counts[name] = counts.get(name, 0) + number
