"""Lessons in the use of reasons, for the study of reflection: the answer after a reason changes what the reason denies.

Captions are worded in several ways, so that good and bad ones share fewer words. A lesson is a dialogue whose last
answer is taught: a caption with one or two wrong facts, the rule critic's reason, and the same caption with exactly the
denied fact mended; a right caption is said again. Some lessons are a right caption alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fastrl.captions import compare, parse_caption, truth_of
from fastrl.critics import Case, Critique, RuleCritic
from fastrl.data.records import Record
from fastrl.data.reflection import SpokenTurn
from fastrl.data.scenes import tasks
from fastrl.data.scenes.expressions import related
from fastrl.data.scenes.world import COLORS, KINDS, SIZES, Scene, Shape, sample_scene

NAMED = 1  # wrong facts in a reason: with two, the attributes of a thing that is not there would be denied as well
OPENINGS = ("A", "There is a")
SIZE_WORDS = ({"small": "small", "large": "large"}, {"small": "little", "large": "big"})
RELATION_WORDS = (
    {"above": "above", "below": "below", "right of": "right of"},
    {"above": "over", "below": "under", "right of": "right of"},
)
ALONE, RIGHT, LEFT_OUT = 0.3, 0.2, 0.1  # fractions of lessons: one caption; a right first caption; a shape left out
AGAIN = 0.3  # fraction of lessons from own captions in which the right caption is said again at the end


class Wording(NamedTuple):
    """How a caption says things; the same in all turns of a lesson."""

    opening: str
    sizes: dict[str, str]
    relations: dict[str, str]


def draw_wording(rng: random.Random) -> Wording:
    """One of eight wordings."""
    return Wording(rng.choice(OPENINGS), rng.choice(SIZE_WORDS), rng.choice(RELATION_WORDS))


def describe(shapes: Sequence[Shape], side: int, wording: Wording) -> str:
    """A caption as :func:`fastrl.data.scenes.tasks.describe` writes it, in another wording."""
    sentences = []
    for previous, shape in zip([None, *shapes], shapes, strict=False):
        phrase = None
        if previous is not None and previous.name != shape.name:
            phrase = next((p for p in wording.relations if related(shape, p, previous, side)), None)
        placed = f" {wording.relations[phrase]} the {previous.name}" if phrase is not None and previous else ""
        sentences.append(f"{wording.opening} {wording.sizes[shape.size]} {shape.name}{placed}.")
    return " ".join(sentences)


def critic() -> RuleCritic:
    """The critic of the lessons and of the study: it names one fact that is wrong."""
    return RuleCritic(feedback="reason", named=NAMED)


class Shuffled:
    """A critic whose feedback is that for the answer of another picture; scores stay each answer's own."""

    rules = True

    def __init__(self, judge: RuleCritic) -> None:
        self.judge = judge

    def score(self, cases: Sequence[Case]) -> list[Critique]:
        """Each case's critique with the feedback of the nearest case before it (in a circle) about another picture.

        Raises:
            ValueError: all cases are about one picture.
        """
        found, ids = self.judge.score(cases), [case.record.id for case in cases]
        if len(set(ids)) < 2:
            raise ValueError(f"{ids[0] if ids else 'no case'}: there is no other picture whose feedback could be taken")
        others = [next(i - k for k in range(1, len(ids)) if ids[i - k] != ids[i]) for i in range(len(ids))]
        return [replace(own, feedback=found[other].feedback) for own, other in zip(found, others, strict=True)]


def reason_record(rng: random.Random, scene: Scene, identity: str, difficulty: int) -> Record | None:
    """One lesson about a scene, a record with ``target["dialogue"]`` and ``target["taught"]`` (of each turn, whether it
    is trained on: the last); None if the scene has no shapes or a mistake cannot be named."""
    record = tasks.caption_record(rng, scene, identity, difficulty)
    if record is None:
        return None
    truth, wording = sorted(scene.shapes, key=lambda s: (s.box[0], s.box[1])), draw_wording(rng)
    kind = rng.random()
    if kind < ALONE:
        steps = [truth]
    elif kind < ALONE + RIGHT:
        steps = [truth, truth]
    elif kind < ALONE + RIGHT + LEFT_OUT and len(truth) > 1:
        missed = rng.randrange(len(truth))
        steps = [[s for i, s in enumerate(truth) if i != missed], truth]
    else:
        found = _mended(rng, record, scene, truth, wording)
        if found is None:
            return None
        steps = found
    answers = [describe(shapes, scene.width, wording) for shapes in steps]
    critiques = critic().score([Case(record, text) for text in answers])
    turns = [SpokenTurn(text, c.score or 0.0, c.feedback) for text, c in zip(answers, critiques, strict=True)]
    turns[-1] = turns[-1]._replace(feedback="")
    taught = (*(False,) * (len(turns) - 1), True)
    return replace(record, target={**record.target, "dialogue": tuple(turns), "taught": taught})


def own_lesson(rng: random.Random, record: Record, shapes: Sequence[Shape], side: int, caption: str) -> Record | None:
    """A lesson from a model's own caption: with one wrong word, its reason, and the caption with the right word.

    Made-up mistakes can be seen, so that lessons from them also teach to look again; what a model itself got wrong it
    only knows from the reason. A right caption is said again, in a fraction ``RIGHT`` of the cases alone instead.
    ``shapes``: of the scene, ``side`` pixels wide. None for a caption that differs in more than a word.
    """
    truth = sorted(shapes, key=lambda s: (s.box[0], s.box[1]))
    texts = [describe(truth, side, Wording(o, s, r)) for o in OPENINGS for s in SIZE_WORDS for r in RELATION_WORDS]
    mended = caption if caption in texts else next((text for text in texts if _one_word(caption, text)), None)
    if mended is None or (caption != mended and not wrong(record, caption)):  # another word for the same
        return None
    turns = [SpokenTurn(mended, 1.0)]
    if caption != mended or rng.random() > RIGHT:
        (critique,) = critic().score([Case(record, caption)])
        turns.insert(0, SpokenTurn(caption, critique.score or 0.0, critique.feedback))
    if rng.random() < AGAIN:
        (critique,) = critic().score([Case(record, mended)])
        turns.insert(-1, turns[-1]._replace(feedback=critique.feedback))
    taught = (*(False,) * (len(turns) - 1), True)
    return replace(record, target={**record.target, "dialogue": tuple(turns), "taught": taught})


def _one_word(caption: str, other: str) -> bool:
    """Whether two captions are equal, or one word of the first is another one wherever it stands in the second."""
    first, second = caption.replace(".", "").split(), other.replace(".", "").split()
    differ = {pair for pair in zip(first, second, strict=False) if pair[0] != pair[1]}
    return len(first) == len(second) and caption.count(".") == other.count(".") and len(differ) < 2


def spoken(seed: int, count: int = 400) -> Iterator[str]:
    """What is said in lessons, for a tokenizer."""
    for index in range(count):
        rng = random.Random(f"reasons/{seed}/{index}")
        record = reason_record(rng, sample_scene(rng), "lesson", 2)
        for turn in record.target["dialogue"] if record else ():
            yield turn.answer
            yield turn.feedback


def _mended(
    rng: random.Random, record: Record, scene: Scene, truth: Sequence[Shape], wording: Wording
) -> list[list[Shape]] | None:
    """Shapes of two or three turns: one or two mistakes, then each time without the one that the reason denies."""
    places = rng.sample(range(len(truth)), min(len(truth), rng.choice((1, 1, 2))))
    shapes = list(truth)
    for place in places:
        shapes[place] = mistaken(rng, shapes[place])
    steps = [shapes]
    for _ in range(rng.randint(1, len(places))):
        before = first_wrong(record, describe(steps[-1], scene.width, wording))
        mends = [[truth[i] if i == place else s for i, s in enumerate(steps[-1])] for place in places]
        helped = [m for m in mends if before and before not in wrong(record, describe(m, scene.width, wording))]
        if not helped:
            return None
        steps.append(helped[0])
    return steps


def wrong(record: Record, caption: str) -> list[Any]:
    """The facts of a caption that are not true, objects first, in the order in which the critic names them."""
    matches = compare(parse_caption(caption), truth_of(record.target, record.id))
    return [fact for match in matches.values() for fact in match.wrong]


def first_wrong(record: Record, caption: str) -> Any:
    """The fact that the critic's reason denies; None if all are true."""
    return next(iter(wrong(record, caption)), None)


def mistaken(rng: random.Random, shape: Shape) -> Shape:
    """The shape with another kind, colour or size."""
    field, values = rng.choice((("kind", KINDS[:4]), ("color", tuple(COLORS)), ("size", SIZES)))
    return replace(shape, **{field: rng.choice([v for v in values if v != getattr(shape, field)])})
