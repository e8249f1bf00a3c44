"""Teaching the small models: their tokenizer, their rows, and models that start from another's weights."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastrl.data.reflection import dialogue_messages, dialogue_of
from fastrl.data.scenes import MAKERS, scene_record
from fastrl.models.load import load_policy
from fastrl.models.open import resolve_model
from fastrl.toy.teach.architectures import ARCHITECTURES
from fastrl.toy.teach.build import build, collate, corpus, scene_answer
from fastrl.toy.teach.curriculum import CURRICULA, Curriculum, RowMaker, scene_questions
from fastrl.toy.teach.optim import orthogonalize
from fastrl.toy.teach.tokenizer import train_tokenizer
from fastrl.toy.teach.transfer import coordinate_twins

PERCEPTION = resolve_model("tiny:perception")


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
@pytest.mark.parametrize(
    "text", ["héllo \n wörld 12345", '[{"bbox_2d": [1, 2', "Track1: a<Id1>Frame10:[3,4,5,6];</Id1>", "日本 🎈"]
)
def test_any_text_survives_the_tokenizer(text: str, model_type: str) -> None:
    texts = [scene_answer(scene_record(t, i, 0)) for t in MAKERS for i in range(20)]
    tokenizer = train_tokenizer(texts, ARCHITECTURES[model_type].spelling, 1000)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize(("name", "lessons"), [("perception", "perception"), ("llava", "llava-pictures")])
def test_branches_see_the_start_and_themselves_only(name: str, lessons: str) -> None:
    policy = load_policy(resolve_model(f"tiny:{name}"))
    make = RowMaker(CURRICULA[lessons], policy.family, policy.tokenizer, policy.preprocessor, scene_answer)
    rows = [make(random.Random(i)) for i in range(2)]
    shared = rows[0].branch.count(0)
    batch = collate(rows, 0)
    for i, row in enumerate(rows):
        for q in range(0, len(row.ids), 7):
            seen = {k for k in range(len(row.ids)) if batch["mask"][i, 0, q, k]}
            assert seen == {k for k in range(q + 1) if row.branch[k] in (0, row.branch[q])}
    prompt, _ = policy.encode(scene_record("grounding", 0, seed=0))
    assert torch.equal(batch["positions"][:, 0, :shared], prompt.positions[:, :shared])


@pytest.mark.parametrize("name", ["language", "llava"])
def test_a_dialogue_is_one_branch_spelled_as_the_policy_spells_it_and_only_true_captions_are_taught(name: str) -> None:
    policy = load_policy(resolve_model(f"tiny:{name}"))
    curriculum = Curriculum({"dialogue": 1}, levels=(2,))
    make = RowMaker(curriculum, policy.family, policy.tokenizer, policy.preprocessor, scene_answer)
    taught = []
    for seed in range(30):
        row, (record,) = make(random.Random(seed)), scene_questions(curriculum, random.Random(seed))
        turns = dialogue_of(record)
        spoken = replace(record, messages=dialogue_messages(record.messages, turns))
        prompt, completion, _ = policy.encode_dialogue(spoken)
        assert row.ids == [*prompt.token_ids.tolist(), *completion.token_ids.tolist()]
        true = [turn.answer == record.target["references"][0] for turn in turns]
        own = [number >= 0 and true[number] for number in completion.per_token["turn"].tolist()]
        assert row.answer == [False] * len(prompt.token_ids) + own
        assert true[-1]
        assert all(0 <= turn.score < 1 for turn, right in zip(turns, true, strict=True) if not right)
        taught.append(sum(true) / len(true))
    assert 0.3 < sum(taught) / len(taught) < 0.9


def test_orthogonalize_flattens_the_spectrum() -> None:
    for shape in ((8, 20), (20, 8), (12, 12)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert 0.6 < values.min() <= values.max() < 1.3


@pytest.mark.parametrize("alone", [None, 3])
def test_lessons_about_clips_show_all_frames_or_one(alone: int | None) -> None:
    curriculum = CURRICULA["video"]
    tokenizer = train_tokenizer(corpus(scene_answer, 0, clips=True), ARCHITECTURES["qwen2_5_vl"].spelling)
    policy = load_policy(resolve_model("tiny:perception"))
    make = RowMaker(curriculum, policy.family, tokenizer, policy.preprocessor, scene_answer)
    row = make(random.Random(5), alone)
    shown = tokenizer.decode([t for t, b in zip(row.ids, row.branch, strict=True) if b == 0])
    answers = tokenizer.decode([t for t, told in zip(row.ids, row.answer, strict=True) if told])
    frames = [1, 2, 3, 4, 5, 6] if alone is None else [alone]
    assert [f"Frame{t} " in shown for t in range(1, 7)] == [t in frames for t in range(1, 7)]
    assert {int(t) for t in re.findall(r"Frame(\d):", answers)} == set(frames)
    assert ("It " in answers) is (alone is None)  # no actions in a single frame
    assert "The clip shows" in answers
    assert sum(len(image.pixel_values) for image in row.images) == len(frames) * 36


def test_a_model_begins_with_what_another_has_learned(tmp_path: Path) -> None:
    build("video", tmp_path, steps=1, rows=1, start=PERCEPTION, retokenize=True, lr=0.0, log=print)
    old, new = load_policy(resolve_model("tiny:perception")), load_policy(tmp_path)
    theirs, ours = old.core.state_dict(), new.core.state_dict()
    assert all(torch.equal(theirs[k], ours[k]) for k in ours if "embed_tokens" not in k and "lm_head" not in k)
    twins = coordinate_twins(new.tokenizer, old.tokenizer, 84)
    names = {new.tokenizer.decode([here]): old.tokenizer.decode([there]) for here, there in twins.items()}
    assert (len(names), names[",500"], names["500"]) == (170, ", 42", "42")  # 0 to 84 pixels, in either place of a box
    vocabulary = old.tokenizer.get_vocab()
    pairs = {here: vocabulary[t] for t, here in new.tokenizer.get_vocab().items() if t in vocabulary} | twins
    assert len(pairs) > 1000
    theirs, ours = (p.core.get_input_embeddings().weight for p in (old, new))
    assert torch.equal(theirs[list(pairs.values())], ours[list(pairs)])


def test_build_writes_a_model_that_loads_and_is_reproducible(tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        build("perception", tmp_path / name, steps=2, rows=2, start=PERCEPTION, log=lambda _: None)
        weights.append(load_policy(tmp_path / name).core.state_dict())
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    with pytest.raises(ValueError, match="perception"):
        build("huge", tmp_path / "c", steps=1)


def test_a_small_llava_is_built_and_learns_pictures_and_clips_in_turn(tmp_path: Path) -> None:
    build("llava", tmp_path, steps=3, rows=1, start=resolve_model("tiny:llava"), log=lambda _: None)
    policy = load_policy(tmp_path)
    make = RowMaker(CURRICULA["llava"], policy.family, policy.tokenizer, policy.preprocessor, scene_answer)
    assert [make.of_step(step).curriculum.frames for step in range(4)] == [6, 1, 6, 1]
    clip, scene = make(random.Random(0)), make.of_step(1)(random.Random(0))
    assert (len(clip.images), len(scene.images)) == (6, 1)
    assert policy.tokenizer.decode(clip.ids[:8]).startswith("<s>USER: Frame1")
    prompt, _ = policy.encode(scene_record("utr", 0, seed=0, size=84))
    assert prompt.token_ids.tolist().count(policy.family.image_token) == 6 * 36
