"""The training data of the small models: scenes with questions about them, as token rows.

A row is one scene: the shared start (system turn and image), then each question with its answer as a branch that
attends to the start and itself. A dialogue is one branch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastrl.batch import ImageInput
from fastrl.data.records import Record
from fastrl.data.reflection import SpokenTurn, dialogue_messages
from fastrl.data.scenes import tasks
from fastrl.data.scenes.world import sample_scene
from fastrl.models.families import Family
from fastrl.models.families.llava import Llava
from fastrl.models.families.qwen2_vl import Qwen2_5VL
from fastrl.models.vision import ImagePreprocessor
from fastrl.toy.teach.clip_lessons import clip_questions
from fastrl.toy.teach.dialogues import dialogue_record
from fastrl.toy.teach.reasons import reason_record

MAKERS = {**tasks.MAKERS, "dialogue": dialogue_record, "reason": reason_record}


@dataclass(frozen=True)
class Curriculum:
    """The training data of a small model: question mix per scene, difficulty levels, picture size, frames."""

    questions: dict[str, int]  # task (or dialogue) -> questions per row
    levels: tuple[int, ...] = (1, 2, 3, 4)
    size: int = 112
    frames: int = 1
    font: int = 17  # of words in the picture
    model_type: str = Qwen2_5VL.model_type
    between: Curriculum | None = None  # taught in every second step instead
    more: int = 1  # rows of a step without whole clips, for each row of one with them: they are shorter


LLAVA_PICTURES = Curriculum({"grounding": 4, "caption": 2}, levels=(1, 2, 2, 3), size=84, model_type=Llava.model_type)
# By kind of lesson; fastrl/toy/teach/stages.py says in which order the shipped models had them
CURRICULA = {
    "perception": Curriculum({"grounding": 4, "counting": 2, "detection": 1, "caption": 1}, levels=(1, 2, 2, 3)),
    "language": Curriculum({"ocr": 2, "caption": 2, "grounding": 1}, levels=(1, 2, 2, 3), font=tasks.OCR_FONT),
    "dialogues": Curriculum(
        {"ocr": 2, "caption": 2, "grounding": 1, "dialogue": 1}, levels=(1, 2, 2, 3), font=tasks.OCR_FONT
    ),
    # Of the study of reflection: from tiny:language
    "reasons": Curriculum({"reason": 4}, levels=(2,)),
    "video": Curriculum({"trajectory": 2, "utr": 1, "shown": 1}, levels=(1, 2, 2, 3), size=84, frames=6, more=2),
    "llava-pictures": LLAVA_PICTURES,
    Llava.model_type: Curriculum(
        {"trajectory": 2, "utr": 1, "shown": 1},
        levels=(1, 2, 2, 3),
        size=84,
        frames=6,
        more=2,
        model_type=Llava.model_type,
        between=replace(LLAVA_PICTURES, questions={"grounding": 3, "caption": 1, "dialogue": 1}, more=2),
    ),
}


def scene_questions(curriculum: Curriculum, rng: random.Random, alone: int | None = None) -> list[Record]:
    """Draw one scene (or clip) and the curriculum's questions about it; all records show the same pictures.

    ``alone`` is the only frame of a clip that is shown (None: all).
    """
    level = rng.choice(curriculum.levels)
    if curriculum.frames > 1:
        return clip_questions(rng, curriculum.questions, curriculum.frames, level, curriculum.size, alone)
    while True:
        snap = tasks.ocr_snap(level) if curriculum.font == tasks.OCR_FONT else 1
        words = rng.choice((0, 1, 1, 2, 3))
        scene = sample_scene(rng, level, curriculum.size, words, curriculum.font, snap)
        records = [
            record
            for task, count in curriculum.questions.items()
            for record in (MAKERS[task](rng, scene, "train", level) for _ in range(count))
            if record is not None
        ]
        if records:
            return records


@dataclass
class Row:
    """One scene with its questions as branches, before padding."""

    ids: list[int]
    branch: list[int]  # 0: shared start; 1, 2, …: a question with its answer
    position: list[int]  # text position of tokens after the image
    answer: list[bool]  # token is predicted in the loss
    start: Tensor  # [axes, shared] int64: positions of the shared start
    images: list[ImageInput]


class RowMaker:
    """Turns scenes into rows: encodes the shared start once, questions and answers as branches."""

    def __init__(
        self,
        curriculum: Curriculum,
        family: Family,
        tokenizer: Any,
        preprocessor: ImagePreprocessor,
        answer: Callable[[Record], str],
    ) -> None:
        self.curriculum, self.family, self.answer = curriculum, family, answer
        self.tokenizer, self.preprocessor = tokenizer, preprocessor

    def of_step(self, step: int) -> RowMaker:
        """The row maker of a step: this one, or in every second step that of ``curriculum.between``."""
        between = self.curriculum.between
        if between is None or step % 2 == 0:
            return self
        return RowMaker(between, self.family, self.tokenizer, self.preprocessor, self.answer)

    def _encode(self, text: str, *, first: bool = False) -> list[int]:
        return self.family.token_ids(self.tokenizer, text, first=first)

    def _turn(self, answer: str) -> str:
        return self.family.turn(answer, self.tokenizer.eos_token)

    def _turn_answers(self, record: Record) -> list[tuple[str, bool]]:
        """Each turn's answer, and whether it is trained on, as only true captions of a dialogue are."""
        turns: tuple[SpokenTurn, ...] = record.target.get("dialogue", ())
        taught = record.target.get("taught") or [turn.score == 1.0 for turn in turns]
        return [(t.answer, each) for t, each in zip(turns, taught, strict=True)] or [(self.answer(record), True)]

    def _turn_prompts(self, record: Record) -> list[str]:
        """The text before each turn's answer: system and question, then the text after the previous answer."""
        turns: tuple[SpokenTurn, ...] = record.target.get("dialogue") or (SpokenTurn("", 1.0),)
        parts, at = [], 0
        for number in range(len(turns)):
            history = [_as_parts(message) for message in dialogue_messages(record.messages, turns[:number])]
            text = self.family.render(self.tokenizer, history, True, self.tokenizer.eos_token)
            parts.append(text[at:])
            at = len(text) + len(self._turn(turns[number].answer))
        return parts

    def __call__(self, rng: random.Random, alone: int | None = None) -> Row:
        """A row of one scene; ``alone`` is the only frame of a clip that is shown (None: all)."""
        records = scene_questions(self.curriculum, rng, alone)
        shown = records[0].images
        images, views = zip(*(self.preprocessor(image, len(shown)) for image in shown), strict=True)
        start = torch.empty(0)
        ids: list[int] = []
        branch: list[int] = []
        answer: list[bool] = []
        starts: list[int] = []
        for number, record in enumerate(records, start=1):
            (first, *more), answers = self._turn_prompts(record), self._turn_answers(replace(record, views=views))
            cut = first.rindex(_question(record))
            if not ids:
                laid_out = self.family.lay_out(torch.tensor(self._encode(first[:cut], first=True)), images)
                start = laid_out.positions
                ids += laid_out.ids.tolist()
                branch += [0] * len(ids)
                answer += [False] * len(ids)
            starts.append(len(ids))
            for asked, (text, taught) in zip((first[cut:], *more), answers, strict=True):
                question, reply = self._encode(asked), self._encode(self._turn(text))
                ids += question + reply
                answer += [False] * len(question) + [taught] * len(reply)
            branch += [number] * (len(ids) - len(branch))
        return Row(ids, branch, starts, answer, start, list(images))


def _as_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}


def _question(record: Record) -> str:
    """The text of a record's first message after its last picture."""
    parts = record.messages[0]["content"]
    last = max(n for n, part in enumerate(parts) if part["type"] == "image")
    return "".join(part["text"] for part in parts[last + 1 :])
