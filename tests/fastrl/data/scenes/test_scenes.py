"""Drawn scenes: exact truth, unambiguous questions, reproducible records."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from fastrl.data import load_data
from fastrl.data.scenes import LEVELS, MAKERS, Scene, Shape, Word, load, render, sample_scene, scene_record
from fastrl.data.scenes.clips import MOTIONS, render_frame, sample_clip
from fastrl.data.scenes.expressions import expressions, related
from fastrl.data.scenes.tasks import describe
from fastrl.data.scenes.world import KINDS, covered

WHITE = (255, 255, 255)


def ink(image) -> tuple[int, int, int, int]:
    """Extent of everything that is not white."""
    rows, columns = np.nonzero((np.asarray(image) != 255).any(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [6, 7, 13, 20, 41])
def test_a_shape_fills_its_box_to_the_pixel(kind: str, side: int) -> None:
    box = (5, 9, 5 + side, 9 + side)
    assert ink(render(Scene(64, 64, WHITE, (Shape(kind, "red", "small", box),)))) == box


@pytest.mark.parametrize("seed", range(20))
def test_words_lie_in_their_boxes(seed: int) -> None:
    scene = sample_scene(random.Random(seed), 2, 112, words=1)
    for word in scene.words:
        x1, y1, x2, y2 = ink(render(Scene(112, 112, WHITE, (), (Word(word.text, word.box, word.font),))))
        assert word.box[0] <= x1 < x2 <= word.box[2] + 1
        assert word.box[1] <= y1 < y2 <= word.box[3] + 1


@pytest.mark.parametrize("level", sorted(LEVELS))
def test_difficulty_bounds_number_size_and_overlap(level: int) -> None:
    limits = LEVELS[level]
    most = 0
    for seed in range(60):
        scene = sample_scene(random.Random(seed), level)
        most = max(most, len(scene.shapes))
        for i, shape in enumerate(scene.shapes):
            assert 0 <= shape.box[0] < shape.box[2] <= 112
            assert shape.kind in KINDS[: limits.kinds]
            low, high = limits.small if shape.size == "small" else limits.large
            assert low <= shape.box[2] - shape.box[0] <= high
            assert all(covered(shape.box, other.box) <= limits.overlap for other in scene.shapes[:i])
    assert most == limits.shapes[1]


def meaning(scene: Scene, expression: str) -> list[Shape]:
    """Parses an expression word by word, independent of the library."""
    for phrase in ("left of the ", "right of the ", "above the ", "below the "):
        if phrase in expression:
            noun, anchor_name = expression.split(phrase)
            anchors = [s for s in scene.shapes if s.name == anchor_name]
            assert len(anchors) == 1
            return [
                s
                for s in meaning(scene, noun.strip())
                if s is not anchors[0] and related(s, phrase.removesuffix(" the "), anchors[0], scene.width)
            ]
    first, _, rest = expression.partition(" ")
    order = {
        "leftmost": lambda s: s.center[0],
        "rightmost": lambda s: -s.center[0],
        "topmost": lambda s: s.center[1],
        "lowest": lambda s: -s.center[1],
    }
    if first in order:
        return [min(meaning(scene, rest), key=order[first])]
    words = set(expression.split()) - {"shape"}
    return [s for s in scene.shapes if words <= {s.kind, s.color, s.size}]


def test_every_expression_means_exactly_its_target() -> None:
    checked = 0
    for seed in range(150):
        scene = sample_scene(random.Random(seed), 1 + seed % 4)
        for target in scene.shapes:
            for group in expressions(scene, target).values():
                for expression in group:
                    assert meaning(scene, expression) == [target], expression
                    checked += 1
    assert checked > 1000


@pytest.mark.parametrize("task", sorted(MAKERS))
def test_records_are_reproducible_and_differ(task: str) -> None:
    one, again, other = (scene_record(task, i, seed=3) for i in (5, 5, 6))
    assert one.target == again.target
    assert one.messages == again.messages
    assert [a.tobytes() for a in one.images] == [b.tobytes() for b in again.images]
    assert one.id != other.id
    assert (one.target, one.images[0].tobytes()) != (other.target, other.images[0].tobytes())


def test_counting_lists_what_the_label_says() -> None:
    for i in range(40):
        target = scene_record("counting", i, seed=1, difficulty=3).target
        assert target["count"] == len(target["points"]) == len(target["boxes"]) >= 1
        assert target["boxes"] == sorted(target["boxes"])


def test_captions_state_only_facts() -> None:
    for seed in range(40):
        scene = sample_scene(random.Random(seed), 3)
        shapes = sorted(scene.shapes, key=lambda s: s.box)
        text, relations = describe(shapes, scene.width)
        assert text.count(".") == len(shapes)
        for (subject, phrase, anchor), sentence in zip(
            relations, [s for s in text.split(". ") if " the " in s], strict=True
        ):
            assert subject in sentence
            assert phrase in sentence
            assert anchor in sentence
        for previous, shape in pairwise(shapes):
            if [shape.kind, "above", previous.kind] in relations and len(shapes) == 2:
                assert shape.center[1] < previous.center[1]


@pytest.mark.parametrize("frames", [1, 2, 6, 9])
def test_clips_move_as_their_spans_say(frames: int) -> None:
    for seed in range(20):
        clip = sample_clip(random.Random(seed), frames, difficulty=3)
        assert clip.frames == frames
        assert len({m.name for m in clip.movers}) == len(clip.movers)
        for mover in clip.movers:
            assert len(mover.boxes) == frames
            assert [s.first for s in mover.spans] == [0, *(s.last + 1 for s in mover.spans[:-1])]
            assert mover.spans[-1].last == frames - 1
            for span in mover.spans:
                dx, dy = MOTIONS[span.action]
                for a, b in zip(
                    mover.boxes[span.first : span.last], mover.boxes[span.first + 1 : span.last + 1], strict=True
                ):
                    assert (b[0] - a[0]) * dx >= 0
                    assert (b[1] - a[1]) * dy >= 0
                    assert (dx != 0) or a[0] == b[0]
        assert render_frame(clip, frames - 1).size == (84, 84)


def test_the_adapter_names_a_data_set() -> None:
    data = load_data("scenes:grounding?n=7&seed=5&difficulty=3")
    assert len(data) == 7
    assert data[-1].id == data[6].id == "grounding-5-6"
    assert [r.id for r in data[2:4]] == ["grounding-5-2", "grounding-5-3"]
    assert data.skipped == 0


@pytest.mark.parametrize(
    ("path", "query", "message"),
    [
        ("groundin", {}, "expected one of"),
        ("grounding", {"m": "3"}, "unknown key 'm'"),
        ("grounding", {"n": "many"}, "n must be an integer"),
        ("grounding", {"n": "-1"}, "must not be negative"),
        ("grounding", {"difficulty": "9"}, "difficulty: expected one of"),
        ("grounding", {"size": "20"}, "56 to 4096"),
        ("grounding", {"size": "100000"}, "56 to 4096"),
        ("trajectory", {"frames": "0"}, "at least 1"),
        ("grounding", {"frames": "3"}, "has pictures, not clips"),
    ],
)
def test_wrong_names_are_errors_that_say_what_is_allowed(path: str, query: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(path, query)
