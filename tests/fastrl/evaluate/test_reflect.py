"""Reflection: algorithm 1, the cached dialogue against a new prefill of all of it, early stops, and failing critics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastrl.critics import Case, CriticError, Critique
from fastrl.data import load_data
from fastrl.data.reflection import SpokenTurn, dialogue_messages
from fastrl.evaluate.reflect import evaluate_reflection, reflect, reflect_on_image
from fastrl.models.load import Policy, load_policy
from fastrl.rollout import Generator, Sampling

RECORDS = load_data("scenes:caption?n=3&seed=6")


class Judge:
    """Returns given scores by turn and records what it was shown."""

    rules = False

    def __init__(self, scores: Sequence[float | None], fail_at: int | None = None) -> None:
        self.scores, self.fail_at, self.seen = scores, fail_at, list[list[Case]]()

    def score(self, cases: Sequence[Case]) -> list[Critique]:
        self.seen.append(list(cases))
        turn = len(cases[0].history)
        if self.fail_at == turn:
            raise CriticError("the server is gone")
        return [Critique(self.scores[turn], f"feedback {turn}", "" if self.scores[turn] else "prose") for _ in cases]


@pytest.fixture(scope="module")
def policy(tiny_folder: Callable[[str], Path]) -> Policy:
    return load_policy(tiny_folder("qwen2_5"), dtype=torch.float32)


def test_every_turn_sees_the_whole_history_through_the_kept_cache(policy: Policy) -> None:
    judge = Judge([0.2, 0.4, 0.3])
    found = reflect(policy, judge, RECORDS[:3], turns=3, max_new_tokens=10)
    assert [len(cases[0].history) for cases in judge.seen] == [0, 1, 2]
    for reflection in found:
        assert [turn.score for turn in reflection.turns] == [0.2, 0.4, 0.3]
        assert reflection.answer == reflection.turns[-1].answer  # the last, not the best
        for number in range(3):
            spoken = [SpokenTurn(t.answer, 0.0, t.feedback) for t in reflection.turns[:number]]
            whole = replace(reflection.record, messages=dialogue_messages(reflection.record.messages, spoken))
            ((anew,),) = Generator(policy).generate([policy.encode(whole)[0]], Sampling(1, 10, 0.0))
            assert anew.text == reflection.turns[number].answer


def test_images_go_through_the_tower_once(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    features = policy.features
    monkeypatch.setattr(policy, "features", lambda images: (calls.append(len(images)), features(images))[1])
    reflect(policy, Judge([0.1] * 3), RECORDS[:1], turns=3, max_new_tokens=4)
    assert calls == [1]


def test_a_turn_reads_only_what_was_said_since(policy: Policy) -> None:
    """Keys and values of the picture and the history are kept: the model processes every token of the dialogue once."""
    read: list[int] = []
    hook = policy.core.model.language_model.register_forward_pre_hook(
        lambda _m, _a, given: read.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    (found,) = reflect(policy, Judge([0.1] * 3), RECORDS[:1], turns=3, max_new_tokens=4)
    hook.remove()
    spoken = [SpokenTurn(turn.answer, 0.0, turn.feedback) for turn in found.turns]
    prompts = [
        policy.encode(replace(found.record, messages=dialogue_messages(found.record.messages, spoken[:n])))[0].token_ids
        for n in range(3)
    ]
    lengths = [len(ids) for ids in prompts]
    since = [lengths[0], lengths[1] - lengths[0], lengths[2] - lengths[1]]
    assert [count for count in read if count > 1] == since  # everything else is decoding, one token at a time
    assert since[1] < lengths[0]


def test_continuation_is_the_rest_of_the_prompt(policy: Policy) -> None:
    record = RECORDS[0]
    spoken = [SpokenTurn("A dog.", 0.1, "Better?"), SpokenTurn("A cat.", 0.1, "Again?")]
    prompts = [
        policy.encode(replace(record, messages=dialogue_messages(record.messages, spoken[:n])))[0].token_ids
        for n in range(3)
    ]
    for n in (1, 2):
        going = policy.encode_continuation(replace(record, messages=dialogue_messages(record.messages, spoken[:n])))
        assert torch.equal(torch.cat([prompts[n - 1], going]), prompts[n])
    with pytest.raises(ValueError, match="to continue, a dialogue needs"):
        policy.encode_continuation(record)


def test_a_critic_that_fails_midway_leaves_the_best_answer_so_far(policy: Policy) -> None:
    found = reflect(policy, Judge([0.9, 0.2, 0.0], fail_at=2), RECORDS[:3], max_new_tokens=6, portion=2)
    assert len(found) == 2  # the second portion was not started
    for reflection in found:
        assert "failed at turn 3" in reflection.error
        assert "the server is gone" in reflection.error
        assert reflection.answer == reflection.turns[0].answer
        assert len(reflection.turns) == 3
        assert reflection.row()["error"]
    (first,) = reflect(policy, Judge([0.0], fail_at=0), RECORDS[:1], max_new_tokens=6)
    assert first.answer == first.turns[0].answer


def test_an_unscored_answer_is_followed_by_a_plain_request(policy: Policy) -> None:
    judge = Judge([None, 0.5])
    judge.score = lambda cases: [Critique(None, problem="prose") for _ in cases]  # type: ignore[method-assign]
    (found,) = reflect(policy, judge, RECORDS[:1], turns=2, max_new_tokens=4)
    assert len(found.turns) == 2
    assert found.turns[0].feedback
    assert found.turns[0].problem == "prose"


def test_stop_at_ends_single_dialogues_and_the_rest_goes_on(policy: Policy) -> None:
    class Half(Judge):
        def score(self, cases: Sequence[Case]) -> list[Critique]:
            return [Critique(0.9 if case.record is RECORDS_LIST[1] else 0.1, "more") for case in cases]

    everything = reflect(policy, Half([]), RECORDS_LIST, turns=3, max_new_tokens=6)
    stopped = reflect(policy, Half([]), RECORDS_LIST, turns=3, max_new_tokens=6, stop_at=0.8)
    assert [len(r.turns) for r in stopped] == [3, 1, 3]
    for a, b in zip(everything, stopped, strict=True):
        assert [t.answer for t in a.turns][: len(b.turns)] == [t.answer for t in b.turns]
    with pytest.raises(ValueError, match="turns"):
        reflect(policy, Half([]), RECORDS_LIST, turns=0)


RECORDS_LIST = list(RECORDS[:3])


def test_one_image_from_the_command(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    Image.new("RGB", (56, 56), (255, 0, 0)).save(tmp_path / "a.png")
    messages: list[str] = []
    row = reflect_on_image(
        tmp_path / "a.png", "Describe.", model=str(tiny_folder("qwen2_5")), critic="rule", turns=2,
        references=["A red square."], max_new_tokens=4, say=messages.append,
    )  # fmt: skip
    assert [turn["score"] for turn in row["turns"]] == [0.0, 0.0]
    assert messages[0].startswith("turn 1:")
    with pytest.raises(ValueError, match="--reference"):
        reflect_on_image(tmp_path / "a.png", "Describe.", model="x", critic="rule")
    with pytest.raises(FileNotFoundError, match="image not found"):
        reflect_on_image(tmp_path / "b.png", "Describe.", model="x", critic="rule")


def test_eval_reports_every_turn(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "dialogues.jsonl"
    metrics = evaluate_reflection(
        "scenes:caption?n=3&seed=6", model=str(tiny_folder("qwen2_5")), turns=2, max_new_tokens=4, limit=2, out=out
    )
    assert metrics.pop("matching") == "rules"
    assert {name.partition("/")[0] for name in metrics} == {"turn1", "turn2"}
    assert metrics["turn2/n"] == 2
    assert len(out.read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="reflection is evaluated on captions"):
        evaluate_reflection("scenes:counting?n=1", model="x")
