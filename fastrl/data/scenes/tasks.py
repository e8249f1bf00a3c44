"""Scenes as ``Record``s: grounding, counting, detection, OCR, captions and trajectories from one seeded world."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from PIL.Image import Image

from fastrl.data import clips as tracked
from fastrl.data.dialogues import QUERIES, Dialogue, make_dialogue, number_subjects, pick_query
from fastrl.data.records import Record, question
from fastrl.data.scenes.clips import Clip, render_frame, sample_clip
from fastrl.data.scenes.expressions import RELATIONS, pick_expression, related
from fastrl.data.scenes.world import KINDS, Scene, Shape, render, sample_scene
from fastrl.data.truth import short

SHOWN = "What does the clip show?"
OCR_FONT = 26  # pixels: words to be read are larger than distractors


def ocr_snap(difficulty: int) -> int:
    """Grid in pixels to which the words of an OCR scene snap: easy scenes have print-like columns and lines."""
    return 14 if difficulty <= 2 else 1


def scene_record(task: str, index: int, seed: int, difficulty: int = 2, size: int = 112, frames: int = 6) -> Record:
    """Record ``index`` of a task; the same arguments give the same record. Raises ``ValueError``: unknown task."""
    if task not in (*MAKERS, *CLIP_MAKERS):
        allowed = ", ".join(sorted({*MAKERS, *CLIP_MAKERS}))
        raise ValueError(f"scenes task: expected one of {allowed}, got {short(task)}")
    rng = random.Random(f"{task}/{seed}/{index}")
    identity = f"{task}-{seed}-{index}"
    if task in CLIP_MAKERS:
        return CLIP_MAKERS[task](rng, sample_clip(rng, frames, difficulty, size), identity)
    words = rng.randint(1, min(difficulty, 3)) if task == "ocr" else int(rng.random() < 0.3)
    while True:  # draw again if a scene has nothing to ask about
        font, snap = (OCR_FONT, ocr_snap(difficulty)) if task == "ocr" else (17, 1)
        scene = sample_scene(rng, difficulty, size, words, font, snap)
        record = MAKERS[task](rng, scene, identity, difficulty)
        if record is not None:
            return record


def scene_clip(task: str, index: int, seed: int, difficulty: int = 2, size: int = 112, frames: int = 6) -> tracked.Clip:
    """The clip that record ``index`` of a task asks about, with all its shapes. Raises ``ValueError``: no clips."""
    if task not in CLIP_MAKERS:
        raise ValueError(f"scenes:{task} has pictures, not clips; clips are in scenes:{', scenes:'.join(CLIP_MAKERS)}")
    rng = random.Random(f"{task}/{seed}/{index}")
    return tracked_clip(sample_clip(rng, frames, difficulty, size), f"{task}-{seed}-{index}")


def grounding_record(rng: random.Random, scene: Scene, identity: str, difficulty: int) -> Record | None:
    """The box of an expression that matches exactly one shape."""
    if not scene.shapes:
        return None
    target = rng.choice(scene.shapes)
    expression = pick_expression(rng, scene, target, spatial=difficulty >= 2)
    if expression is None:
        return None
    truth = {"box": target.box, "expression": expression}
    return Record(identity, "grounding", (picture(scene),), question("grounding", expression), truth)


def counting_record(rng: random.Random, scene: Scene, identity: str, difficulty: int) -> Record | None:
    """All shapes of one kind, one colour, or simply all; the answer lists their boxes from left to right."""
    if not scene.shapes:
        return None
    anchor = rng.choice(scene.shapes)
    label, test = rng.choice(counting_labels(anchor))
    chosen = sorted((s.box for s in scene.shapes if test(s)), key=lambda b: (b[0], b[1]))
    points = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in chosen]
    truth = {"label": label, "count": len(chosen), "points": points, "boxes": [list(b) for b in chosen]}
    return Record(identity, "counting", (picture(scene),), question("counting", label), truth)


@lru_cache(maxsize=4)
def picture(scene: Scene) -> Image:
    """The scene's picture, drawn once for all questions about it."""
    return render(scene)


def counting_labels(shape: Shape) -> list[tuple[str, Callable[[Shape], bool]]]:
    """The sets of shapes that a counting question about a shape may ask for."""
    return [
        (f"{shape.kind}s", lambda s: s.kind == shape.kind),
        (f"{shape.color} shapes", lambda s: s.color == shape.color),
        ("shapes", lambda _: True),
    ]


def detection_record(rng: random.Random, scene: Scene, identity: str, difficulty: int) -> Record | None:
    """Every shape with its kind, listed from left to right."""
    shapes = sorted(scene.shapes, key=lambda s: (s.box[0], s.box[1]))
    truth = {
        "boxes": [list(s.box) for s in shapes],
        "labels": [s.kind for s in shapes],
        "crowd": [False] * len(shapes),
        "categories": list(KINDS),
    }
    return Record(identity, "detection", (picture(scene),), question("detection", ", ".join(KINDS)), truth)


def ocr_record(rng: random.Random, scene: Scene, identity: str, difficulty: int) -> Record | None:
    """The words from top to bottom, one per line."""
    if not scene.words:
        return None
    text = "\n".join(w.text for w in sorted(scene.words, key=lambda w: (w.box[1], w.box[0])))
    return Record(identity, "ocr", (picture(scene),), question("ocr"), {"text": text})


def caption_record(rng: random.Random, scene: Scene, identity: str, difficulty: int) -> Record | None:
    """A description with objects, attributes and relations, and the same facts as data."""
    if not scene.shapes:
        return None
    shapes = sorted(scene.shapes, key=lambda s: (s.box[0], s.box[1]))
    text, relations = describe(shapes, scene.width)
    truth = {
        "references": [text],
        "objects": [s.kind for s in shapes],
        "attributes": [[s.kind, a] for s in shapes for a in (s.size, s.color)],
        "relations": relations,
    }
    return Record(identity, "caption", (picture(scene),), question("caption", prompt="Describe the image."), truth)


def describe(shapes: list[Shape], side: int) -> tuple[str, list[list[str]]]:
    """A caption in reading order; each shape after the first is placed relative to the one before if unambiguous."""
    sentences, relations = [], []
    for previous, shape in zip([None, *shapes], shapes, strict=False):
        phrase = None
        if previous is not None and previous.name != shape.name:
            phrase = next((p for p in ("above", "below", "right of") if related(shape, p, previous, side)), None)
        start = f"A {shape.size} {shape.name}"
        if phrase is None or previous is None:
            sentences.append(f"{start}.")
        else:
            sentences.append(f"{start} {phrase} the {previous.name}.")
            relations.append([shape.kind, phrase, previous.kind])
    return " ".join(sentences), relations


def trajectory_record(rng: random.Random, clip: Clip, identity: str) -> Record:
    """Follow one named shape through all frames of a clip."""
    return follow_one(rng, tracked_clip(clip, identity))


def follow_one(rng: random.Random, clip: tracked.Clip) -> Record:
    """The record of :func:`trajectory_record` for a tracked clip."""
    return replace(clip, subjects=(rng.choice(clip.subjects),)).record()


def tracked_clip(clip: Clip, identity: str) -> tracked.Clip:
    """The clip with rendered frames in the schema of tracked clips; a shape's colour is its appearance."""
    subjects = tuple(
        tracked.Subject(
            number,
            m.name,
            dict(enumerate(m.boxes, start=1)),
            m.color,
            tuple(tracked.Span(s.action, s.first + 1, s.last + 1) for s in m.spans),
        )
        for number, m in enumerate(clip.movers, start=1)
    )
    frames = tuple(render_frame(clip, f) for f in range(clip.frames))
    whole = tracked.Clip(identity, clip.width, clip.height, clip.seconds, subjects, frames)
    return number_subjects(whole)[0]


def utr_record(rng: random.Random, clip: Clip, identity: str) -> Record:
    """A unique query, spatial or temporal, about one shape of a clip, with the answer over all frames."""
    return pick_dialogue(rng, tracked_clip(clip, identity)).record()


def pick_dialogue(rng: random.Random, clip: tracked.Clip) -> Dialogue:
    """A random unique query about a random subject of a clip of shapes; their names differ, so one exists."""
    for subject in rng.sample(clip.subjects, len(clip.subjects)):
        for kind in rng.sample(list(QUERIES), len(QUERIES)):
            query = pick_query(rng, clip, subject, kind)
            if query is not None:
                return make_dialogue(clip, subject, query)
    raise ValueError(f"clip {clip.id}: no query is about one shape only")


def shown_record(rng: random.Random, clip: Clip, identity: str) -> Record:
    """A description of the clip that every single frame supports."""
    return shown_in(tracked_clip(clip, identity))


def shown_in(clip: tracked.Clip) -> Record:
    """The record of :func:`shown_record` for a tracked clip."""
    asked = question("caption", images=len(clip), prompt=SHOWN, seconds=clip.seconds)
    text = "The clip shows " + " and ".join(sorted(s.name for s in clip.subjects)) + "."
    target = {"references": [text], "answer": text, "frames": len(clip), "seconds": list(clip.seconds)}
    return Record(clip.id, "caption", clip.images(), asked, target)


MAKERS: dict[str, Callable[..., Record | None]] = {
    "grounding": grounding_record,
    "counting": counting_record,
    "detection": detection_record,
    "ocr": ocr_record,
    "caption": caption_record,
    "trajectory": trajectory_record,
}

CLIP_MAKERS: dict[str, Callable[[random.Random, Clip, str], Record]] = {
    "trajectory": trajectory_record,
    "utr": utr_record,
    "shown": shown_record,
}

__all__ = ["CLIP_MAKERS", "MAKERS", "RELATIONS", "scene_clip", "scene_record", "tracked_clip"]
