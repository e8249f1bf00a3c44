"""Lessons in the use of reasons: exactly the denied fact changes, and reasons of other pictures are others'."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from fastrl.captions import parse_caption
from fastrl.critics import Case
from fastrl.data.records import Record
from fastrl.data.reflection import dialogue_of
from fastrl.data.scenes import scene_record
from fastrl.data.scenes.world import Scene, sample_scene
from fastrl.models.load import load_policy
from fastrl.models.open import resolve_model
from fastrl.toy.teach.build import scene_answer
from fastrl.toy.teach.curriculum import CURRICULA, RowMaker
from fastrl.toy.teach.reasons import Shuffled, critic, describe, draw_wording, reason_record, spoken, wrong


def lessons(count: int) -> list[Record]:
    found = []
    for seed in range(count):
        rng = random.Random(seed)
        record = reason_record(rng, sample_scene(rng), f"lesson-{seed}", 2)
        found += [record] if record is not None else []
    return found


def test_every_turn_but_the_last_is_context_and_the_last_has_no_feedback() -> None:
    found = lessons(120)
    turns = {len(dialogue_of(record)) for record in found}
    assert turns == {1, 2, 3}
    for record in found:
        dialogue = dialogue_of(record)
        assert record.target["taught"] == (*(False,) * (len(dialogue) - 1), True)
        assert dialogue[-1].feedback == ""
        assert all(turn.feedback for turn in dialogue[:-1])


def test_the_answer_after_a_reason_no_longer_states_what_it_denies() -> None:
    denied = 0
    for record in lessons(300):
        dialogue = dialogue_of(record)
        for turn, following in pairwise(dialogue):
            facts = wrong(record, turn.answer)
            if not facts:
                continue
            denied += 1
            assert facts[0] not in wrong(record, following.answer)
            assert following.score > turn.score
            assert _denies(turn.feedback, facts[0])
    assert denied > 80


def _denies(feedback: str, fact: object) -> bool:
    words = [fact] if isinstance(fact, str) else list(fact)  # type: ignore[call-overload]
    return all(word in feedback for word in words)


def test_right_captions_are_said_again() -> None:
    again = [r for r in lessons(200) if len(dialogue_of(r)) == 2 and dialogue_of(r)[0].score == 1.0]
    assert len(again) > 15
    assert all(dialogue_of(r)[0].answer == dialogue_of(r)[1].answer for r in again)


def test_every_wording_says_the_same_facts_to_the_critic() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        scene: Scene = sample_scene(rng)
        shapes = sorted(scene.shapes, key=lambda s: (s.box[0], s.box[1]))
        texts = {describe(shapes, scene.width, draw_wording(random.Random(n))) for n in range(40)}
        assert len(texts) > 3
        kinds = [shape.kind for shape in shapes]
        assert {tuple(parse_caption(text).objects) for text in texts} == {tuple(kinds)}


def test_the_last_caption_of_a_lesson_scores_full_marks_in_any_wording() -> None:
    whole = [r for r in lessons(200) if len(dialogue_of(r)) < 3]
    scores = [dialogue_of(record)[-1].score for record in whole]
    assert sum(score == pytest.approx(1.0) for score in scores) > 0.8 * len(scores)


def test_shuffled_feedback_is_that_for_another_picture_and_scores_stay() -> None:
    records = [scene_record("caption", index, 5) for index in range(3)]
    cases = [Case(r, f"A small {color} star.") for r in records for color in ("red", "blue")]
    own, other = critic().score(cases), Shuffled(critic()).score(cases)
    assert [c.score for c in own] == [c.score for c in other]
    said = [c.feedback for c in own]
    assert [c.feedback for c in other] == [said[5], said[5], said[1], said[1], said[3], said[3]]
    with pytest.raises(ValueError, match="no other picture"):
        Shuffled(critic()).score(cases[:2])


def test_only_the_last_turn_is_taught() -> None:
    policy = load_policy(resolve_model("tiny:language"))
    make = RowMaker(CURRICULA["reasons"], policy.family, policy.tokenizer, policy.preprocessor, scene_answer)
    row = make(random.Random(3))
    taught = policy.tokenizer.decode([i for i, on in zip(row.ids, row.answer, strict=True) if on])
    assert taught.count(policy.tokenizer.eos_token) == len(
        {b for b, on in zip(row.branch, row.answer, strict=True) if on}
    )
    assert "This caption" not in taught


def test_a_tokenizer_hears_captions_and_reasons() -> None:
    said = list(spoken(0, 40))
    assert any(text.startswith("There is no such") or "There is no such" in text for text in said)
    assert any(text.startswith("There is a") for text in said)


def test_a_scene_without_shapes_has_no_lesson() -> None:
    scene = replace(sample_scene(random.Random(0)), shapes=())
    assert reason_record(random.Random(0), scene, "none", 2) is None
