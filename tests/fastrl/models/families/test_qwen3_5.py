"""Qwen3.5's own: dialogues behind empty thoughts, sessions and early ends with recurrent states, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastrl.batch import Completion, PromptGroup, pack_row
from fastrl.data.records import Record
from fastrl.models import load_policy
from fastrl.models.attention import readout
from fastrl.models.attention.readout import read_attention
from fastrl.models.families import family_of
from fastrl.models.policy import packed_states
from fastrl.rollout import Generator, Sampling
from fastrl.rollout import decode as decode_module
from tests.helpers.contract import Pair
from tests.helpers.rollouts import force, make_records, picture, record, rng, teacher_forced

MakePair = Callable[[str], Pair]
THOUGHT = "<think>\n\n</think>\n\n"


@pytest.fixture(params=["qwen3_5", "qwen3_5_moe"])
def pair(request: pytest.FixtureRequest, make_pair: MakePair) -> Pair:
    return make_pair(request.param)


def dialogue(*answers: str) -> Record:
    """A question about a picture, its answers, and more questions between them."""
    asked = record("d", "Where is it?", (picture(84, 56, 1),))
    said = [
        [{"role": "assistant", "content": answer}, {"role": "user", "content": f"And the {n}th?"}]
        for n, answer in enumerate(answers)
    ]
    messages = (*asked.messages, *(turn for pair in said for turn in pair))
    return replace(asked, messages=messages[:-1] if answers else messages)


# Dialogues


def test_every_turn_stays_as_it_was_generated(pair: Pair) -> None:
    """The template alone drops the thoughts of earlier turns, strips answers and cuts what looks like a thought."""
    policy, answers = pair.policy, (" left ", "no </think> right\n", "up")
    prompt, completion, _ = policy.encode_dialogue(dialogue(*answers))
    text = policy.tokenizer.decode([*prompt.token_ids.tolist(), *completion.token_ids.tolist()])
    for answer in answers:
        assert f"<|im_start|>assistant\n{THOUGHT}{answer}<|im_end|>" in text
    assert policy.tokenizer.decode(prompt.token_ids).endswith(f"<|im_start|>assistant\n{THOUGHT}")
    released = policy.tokenizer.apply_chat_template(
        list(dialogue(*answers).messages), tokenize=False, enable_thinking=False
    )
    assert released.count(THOUGHT) == 1
    assert answers[1] not in released
    answered = completion.token_ids[completion.per_token["turn"] == 0]
    assert policy.tokenizer.decode(answered) == " left <|im_end|>"


def test_a_continued_session_has_the_ids_of_the_whole_dialogue(pair: Pair) -> None:
    policy, answers = pair.policy, ("left", "right ")
    told = dialogue(*answers)
    asked = replace(told, messages=(*told.messages, {"role": "user", "content": "Sure?"}))
    ids = policy.encode(record("d", "Where is it?", asked.images))[0].token_ids
    for turns in (3, 5):
        ids = torch.cat([ids, policy.encode_continuation(replace(asked, messages=asked.messages[:turns]))])
    assert ids.tolist() == policy.encode(asked)[0].token_ids.tolist()


def test_log_probs_of_a_dialogue_are_transformers_own(pair: Pair) -> None:
    """Read as one completion behind its first question, in a row with others."""
    policy = pair.policy
    told = dialogue("left", "right", "up")
    prompt, completion, _ = policy.encode_dialogue(told)
    completion.per_token = {}
    other = PromptGroup(pair.asked(2)[0], [Completion(torch.arange(n)) for n in (3, 9)])
    with torch.no_grad():
        got = policy.logprob(pack_row([other, PromptGroup(prompt, [completion])])).logp
        text = "".join(piece for piece, _ in policy.encoder._pieces(record("d", "Where is it?", told.images), True))
        want = pair.oracle.logp(text, told.images, completion.token_ids)  # type: ignore[arg-type]
    torch.testing.assert_close(got[-len(want) :], want, rtol=pair.tolerance, atol=pair.tolerance)


# Rollouts


@pytest.mark.parametrize("decode", ["eager", "static"])
def test_a_session_goes_on_from_its_states(pair: Pair, decode: str) -> None:
    """Texts of one token and more, after answers that were sampled in between and not appended."""
    policy = pair.policy
    prompts = [policy.encode(one)[0] for one in make_records()]
    added = [torch.randint(0, 250, (n,), generator=rng(n)) for n in (3, 9, 0, 1, 70)]
    generator = Generator(policy, decode=decode)
    session = generator.session(prompts)
    for _ in range(2):
        session.generate(Sampling(3, 6), rng())
        session.extend(added)
        prompts = [
            replace(
                p,
                token_ids=torch.cat([p.token_ids, more]),
                positions=torch.cat(
                    [p.positions, torch.arange(p.next_position, p.next_position + len(more)).expand(3, -1)], 1
                ),
            )
            for p, more in zip(prompts, added, strict=True)
        ]
    got = session.generate(Sampling(2, 8), rng(1))
    want = generator.generate(prompts, Sampling(2, 8), rng(1))
    for some, others in zip(got, want, strict=True):
        for one, other in zip(some, others, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            torch.testing.assert_close(one.sampler_logp, other.sampler_logp, rtol=0, atol=10 * pair.tolerance)


@pytest.mark.parametrize("decode", ["eager", "static"])
def test_states_stay_with_their_rows_when_answers_end_early(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch, decode: str
) -> None:
    pair = make_pair("qwen3_5")
    policy = pair.policy
    monkeypatch.setattr(decode_module, "SMALLEST_BUCKET", 2)
    kept: list[int] = []
    real = decode_module.RowCache.keep
    monkeypatch.setattr(decode_module.RowCache, "keep", lambda self, *x: kept.append(x[1]) or real(self, *x))
    prompts = [policy.encode(one)[0] for one in make_records()]
    hook = force(policy, policy.eos_token_ids[0], 3.0)
    answers = Generator(policy, decode=decode).generate(prompts, Sampling(6, 20), rng())
    assert len({len(answer.token_ids) for some in answers for answer in some}) > 4
    assert len(kept) > 1, "the batch shrank several times"
    hook.remove()
    for prompt, some in zip(prompts, answers, strict=True):
        for answer in some:  # the hook raised one logit, which is taken back here
            with torch.no_grad():
                batch = pack_row([PromptGroup(prompt, [answer])])
                logits = policy.core.lm_head(policy.hidden(batch))
            logits[:, policy.eos_token_ids[0]] += 3.0
            want = logits.log_softmax(-1).gather(1, answer.token_ids[:, None])[:, 0]
            torch.testing.assert_close(answer.sampler_logp, want, rtol=0, atol=10 * pair.tolerance)


def test_a_prompt_of_many_chunks(make_pair: MakePair) -> None:
    """Longer than a chunk of the delta rule, padded beside a short one, and an answer of several chunks."""
    policy = make_pair("qwen3_5").policy
    long = policy.encode(record("l", "How many? " * 30, (picture(112, 112, 3),)))[0]
    short = policy.encode(record("s", "Hi"))[0]
    assert len(long.token_ids) > 300
    (first,), (second,) = Generator(policy).generate([long, short], Sampling(1, 150, temperature=0))
    for prompt, answer in ((long, first), (short, second)):
        torch.testing.assert_close(answer.sampler_logp, teacher_forced(policy, prompt, answer), rtol=0, atol=1e-4)


# Attention maps


def test_attention_maps_are_of_the_layers_that_attend(make_pair: MakePair) -> None:
    policy = make_pair("qwen3_5").policy
    prompt, completion, _ = policy.encode_dialogue(dialogue("left", "right"))
    batch = pack_row([PromptGroup(prompt, [completion])])
    with torch.no_grad(), readout._eager(policy):
        eager = packed_states(policy.core, batch, fastrl_probe=readout._Probe(batch.image_rows, [batch.predict_rows]))
    with torch.no_grad():
        torch.testing.assert_close(eager[0, batch.predict_rows], policy.hidden(batch), rtol=1e-4, atol=1e-4)
    found = read_attention(policy, dialogue("left", "right"))
    attending = policy.core.config.text_config.layer_types.count("full_attention")
    assert [len(turn.by_layer) for turn in found] == [attending] * 2


# Refused


def test_other_activations_and_texts_without_attention_are_refused(make_pair: MakePair, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_pair("qwen3_5").folder, tmp_path / "model"))
    values = json.loads((folder / "config.json").read_text())
    for changes, reason in (
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; supported: silu"),
        ({"layer_types": ["linear_attention"] * 3}, "without layers of kind full_attention"),
        ({"layer_types": ["linear_attention", "sliding_attention", "full_attention"]}, "sliding_attention"),
    ):
        changed = {**values, "text_config": {**values["text_config"], **changes}}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=reason):
            load_policy(folder, device="cpu")


def test_a_delta_net_with_further_parts_is_refused(make_pair: MakePair) -> None:
    """Adapters on its convolution would not be read."""
    folder = make_pair("qwen3_5").folder
    lora = {"rank": 80, "targets": r".*linear_attn\.(in_proj_qkv|conv1d)"}
    with pytest.raises(ValueError, match="further parts"):
        load_policy(folder, device="cpu", lora=lora)


def test_a_family_of_texts_alone_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="'qwen3_next' is not supported: it reads no pictures"):
        family_of({"model_type": "qwen3_next"})


def test_an_answer_of_no_tokens_takes_no_rows(make_pair: MakePair) -> None:
    policy = make_pair("qwen3_5").policy
    prompt = policy.encode(record("q", "Hi"))[0]
    some = [Completion(torch.tensor(ids, dtype=torch.int64)) for ids in ([5, 9], [], [7])]
    with torch.no_grad():
        got = policy.logprob(pack_row([PromptGroup(prompt, some)])).logp
        want = torch.cat([policy.logprob(pack_row([PromptGroup(prompt, [one])])).logp for one in (some[0], some[2])])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
