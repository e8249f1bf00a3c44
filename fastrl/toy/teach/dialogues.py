"""Dialogues for the small language model: a caption, feedback, and another caption, as in instruction data.

LLaVA's instruction data contains dialogues, so the models that RePer starts from can answer a second time. Only true
captions are trained on; captions with mistakes are earlier turns of the dialogue.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from fastrl.critics import Case, RuleCritic
from fastrl.data.records import Record
from fastrl.data.reflection import SpokenTurn
from fastrl.data.scenes import tasks
from fastrl.data.scenes.world import COLORS, KINDS, SIZES, Scene, Shape, sample_scene

TRUE = 0.3  # fraction of the captions before the last that are true as well
WORDINGS = ("request", "request", "score", "reason")  # of the feedback; see RuleCritic
_CRITICS = {wording: RuleCritic(feedback=wording) for wording in set(WORDINGS)}


def dialogue_record(rng: random.Random, scene: Scene, identity: str, difficulty: int) -> Record | None:
    """A caption record whose ``target["dialogue"]`` has two or three turns; the last caption is the truth.

    A turn's score is the rule critic's, 1.0 for the true caption; None for a scene without shapes.
    """
    record = tasks.caption_record(rng, scene, identity, difficulty)
    if record is None:
        return None
    critic, truth = _CRITICS[rng.choice(WORDINGS)], record.target["references"][0]
    turns = []
    for _ in range(rng.choice((1, 2))):
        text = truth if rng.random() < TRUE else imperfect_caption(rng, scene)
        (critique,) = critic.score([Case(record, text)])
        turns.append(SpokenTurn(text, critique.score or 0.0, critique.feedback))
    turns.append(SpokenTurn(truth, 1.0))
    return replace(record, target={**record.target, "dialogue": tuple(turns)})


def feedbacks(seed: int, count: int = 400) -> Iterator[str]:
    """What the critic says to captions, for a tokenizer."""
    for index in range(count):
        rng = random.Random(f"feedback/{seed}/{index}")
        record = dialogue_record(rng, sample_scene(rng), "feedback", 2)
        yield from (turn.feedback for turn in record.target["dialogue"] if turn.feedback) if record else ()


def imperfect_caption(rng: random.Random, scene: Scene) -> str:
    """The scene's caption with mistakes: shapes of another kind, colour or size, left out, or invented."""
    shapes = sorted(scene.shapes, key=lambda s: (s.box[0], s.box[1]))
    kept = [_mistaken(rng, s) if rng.random() < 0.35 else s for s in shapes if len(shapes) == 1 or rng.random() > 0.1]
    if not kept or rng.random() < 0.15:
        kept.append(Shape(rng.choice(KINDS), rng.choice(list(COLORS)), rng.choice(SIZES), shapes[-1].box))
    if kept == shapes:
        place = rng.randrange(len(kept))
        kept[place] = _mistaken(rng, kept[place])
    return tasks.describe(kept, scene.width)[0]


def _mistaken(rng: random.Random, shape: Shape) -> Shape:
    field, values = rng.choice((("kind", KINDS), ("color", tuple(COLORS)), ("size", SIZES)))
    return replace(shape, **{field: rng.choice([v for v in values if v != getattr(shape, field)])})
