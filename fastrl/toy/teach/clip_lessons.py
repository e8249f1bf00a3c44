"""What a small model is taught about clips: follow a named shape, answer UTR queries, say what a clip shows.

It first meets single frames, then mostly whole clips. Single frames make the rest learnable in minutes, and a model
that has never seen a frame alone would find any text unlikely there, which is no sign of temporal understanding.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace

from fastrl.data.clips import Clip
from fastrl.data.records import Record
from fastrl.data.scenes import tasks
from fastrl.data.scenes.clips import sample_clip

ALONE_FIRST, ALONE_LATER = 0.2, 0.25  # share of all steps that show single frames only, and of the steps after those

CLIP_QUESTIONS: Mapping[str, Callable[[random.Random, Clip], Record]] = {
    "trajectory": tasks.follow_one,
    "utr": lambda rng, clip: tasks.pick_dialogue(rng, clip).record(),
    "shown": lambda rng, clip: tasks.shown_in(clip),
}
ALONE = ("trajectory", "shown")  # what is asked about a single frame


def frame_of_step(step: int, steps: int, frames: int, rng: random.Random) -> int | None:
    """The one frame (from 1) that the clips of a step are seen in; None: all of them."""
    alone = step < ALONE_FIRST * steps or rng.random() < ALONE_LATER
    return rng.randint(1, frames) if alone else None


def clip_questions(
    rng: random.Random, questions: Mapping[str, int], frames: int, level: int, size: int, alone: int | None
) -> list[Record]:
    """Draw a clip and questions about it, about all its frames or about one; all records show the same pictures.

    Args:
        rng: of the clip and the questions.
        questions: task → how many.
        frames, level, size: of the clip.
        alone: the only frame that is shown; it keeps its number and its time.
    """
    clip = tasks.tracked_clip(sample_clip(rng, frames, level, size), "train")
    chosen = questions if alone is None else {task: 2 * count for task, count in questions.items() if task in ALONE}
    records = [CLIP_QUESTIONS[task](rng, clip) for task, count in chosen.items() for _ in range(count)]
    return records if alone is None else [only_frame(record, alone) for record in records]


def only_frame(record: Record, number: int) -> Record:
    """The record with one of its frames, and the truth in that frame."""
    parts = record.messages[0]["content"]
    content = [*parts[2 * (number - 1) : 2 * number], parts[-1]]
    tracks = [t | {"boxes": {number: t["boxes"][number]}} for t in record.target.get("tracks", ())]
    target = {**record.target, **({"tracks": tracks} if tracks else {})}
    images = (record.images[number - 1],)
    return replace(record, images=images, messages=({"role": "user", "content": content},), target=target)
