"""``Generator`` and ``Session`` on tiny random models, against transformers' ``generate`` and teacher forcing."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor

from fastrl.batch import Prompt
from fastrl.models.decode_layers import DecodeLayers
from fastrl.models.load import load_policy
from fastrl.rollout import Generator, Sampling, Session
from tests.helpers.rollouts import STYLES, encode, force, reference_generate, rng, same, teacher_forced


@pytest.fixture(params=STYLES)
def policy(request, tiny_folder):
    return load_policy(tiny_folder(request.param), device="cpu")


@pytest.fixture
def qwen2_5(tiny_folder):
    return load_policy(tiny_folder("qwen2_5"), device="cpu")


def test_greedy_equals_transformers_generate(policy) -> None:
    """Many prompts at once, token for token: VLMs need no second engine."""
    prompts = encode(policy)
    out = Generator(policy, prefill_tokens=120).generate(prompts, Sampling(1, 24, temperature=0))
    for prompt, (completion,) in zip(prompts, out, strict=True):
        expected = reference_generate(policy, prompt, 24)
        assert completion.token_ids.tolist() == expected.tolist()
        assert completion.finished == (expected[-1].item() in policy.eos_token_ids)


def test_greedy_with_lora_equals_transformers_generate(tiny_folder) -> None:
    policy = load_policy(tiny_folder("qwen2_5"), device="cpu", lora={"rank": 4, "dropout": 0.5})
    with torch.no_grad():
        for name, parameter in policy.core.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    prompts = encode(policy)
    out = Generator(policy).generate(prompts, Sampling(1, 12, temperature=0))
    for prompt, (completion,) in zip(prompts, out, strict=True):
        assert completion.token_ids.tolist() == reference_generate(policy, prompt, 12).tolist()
    with policy.reference():
        plain = Generator(policy).generate(prompts, Sampling(1, 12, temperature=0))
    assert not same(out, plain)


def test_positions_explicit_and_no_rope_deltas(policy, monkeypatch) -> None:
    """Multimodal RoPE positions come with the prompt: no state of the model is read, written or left behind."""
    prompts = encode(policy)
    generator = Generator(policy, decode="eager")
    truth = generator.generate(prompts, Sampling(1, 10, temperature=0))
    assert policy.core.model.rope_deltas is None
    policy.core.model.rope_deltas = torch.full((1, 1), 1000)  # as another call might have left it
    seen: list[Tensor] = []
    real = DecodeLayers.__call__
    monkeypatch.setattr(DecodeLayers, "__call__", lambda self, *x: seen.append(x[1]) or real(self, *x))
    again = generator.generate(prompts, Sampling(1, 10, temperature=0))
    assert same(truth, again)
    assert same(truth, Generator(policy).generate(prompts, Sampling(1, 10, temperature=0)))
    assert policy.core.model.rope_deltas.item() == 1000
    # one position for all three axes, right after the prompt's largest
    assert sorted(seen[0].tolist()) == sorted(p.next_position for p in prompts)


def test_packed_prefill_and_decode_paths_agree(policy) -> None:
    """One answer's log-probs by decoding, by one padded prefill of the whole text, and by the trainer's packed row."""
    for prompt in encode(policy):
        ((completion,),) = Generator(policy).generate([prompt], Sampling(1, 12), rng())
        packed = teacher_forced(policy, prompt, completion)
        torch.testing.assert_close(completion.sampler_logp, packed, rtol=1e-4, atol=1e-4)
        session = Generator(policy).session(prompt)
        stepwise = []
        for token in completion.token_ids:
            hidden = session._hidden[0]
            stepwise.append(torch.log_softmax(policy.core.lm_head(hidden).float(), -1)[token])
            session.extend(token[None])
        torch.testing.assert_close(torch.stack(stepwise), packed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampling", [Sampling(3, 10), Sampling(2, 8, 0.6), Sampling(2, 8, 1.3, top_p=0.7, top_k=40)])
def test_sampler_logp_equals_trainer_logp(policy, sampling: Sampling) -> None:
    """Both sides give full-vocabulary log-probs at the sampling temperature, also where sampling was truncated."""
    prompts = encode(policy)
    for prompt, completions in zip(prompts, Generator(policy).generate(prompts, sampling, rng()), strict=True):
        for completion in completions:
            trained = teacher_forced(policy, prompt, completion, sampling.temperature)
            assert completion.sampler_logp is not None
            assert completion.sampler_logp.shape == completion.token_ids.shape
            torch.testing.assert_close(completion.sampler_logp, trained, rtol=1e-4, atol=2e-4)


def test_greedy_logp_is_at_temperature_one_and_copies_are_distinct(qwen2_5) -> None:
    prompt = encode(qwen2_5)[0]
    ((one, two),) = Generator(qwen2_5).generate([prompt], Sampling(2, 6, temperature=0))
    torch.testing.assert_close(one.sampler_logp, teacher_forced(qwen2_5, prompt, one), rtol=1e-4, atol=1e-4)
    assert torch.equal(one.token_ids, two.token_ids)
    one.rewards["x"] = 1.0
    one.token_ids[0] = 0
    assert not two.rewards
    assert two.token_ids[0] != 0


def test_one_seed_gives_the_same_however_prompts_are_portioned(policy) -> None:
    prompts, sampling = encode(policy), Sampling(3, 10)
    truth = Generator(policy).generate(prompts, sampling, rng())
    assert same(truth, Generator(policy).generate(prompts, sampling, rng()))
    assert same(truth, Generator(policy, max_rows=1, prefill_tokens=1).generate(prompts, sampling, rng()))
    assert same(truth, Generator(policy, max_rows=7, prefill_tokens=100).generate(prompts, sampling, rng()))
    assert not same(truth, Generator(policy).generate(prompts, sampling, rng(1)))
    assert len({tuple(c.token_ids.tolist()) for c in truth[0]}) > 1


def test_vision_once_per_image_and_prefill_once_per_prompt(policy) -> None:
    prompts, calls = encode(policy), Counter()
    embedded: list[tuple[int, ...]] = []
    core = policy.core
    hooks = [
        core.model.visual.register_forward_pre_hook(lambda _m, a: calls.update(patches=len(a[0]), vision=1)),
        core.model.language_model.register_forward_pre_hook(
            lambda _m, _a, kw: embedded.append(tuple(kw["inputs_embeds"].shape[:2])), with_kwargs=True
        ),
    ]
    Generator(policy).generate(prompts, Sampling(4, 6), rng())
    for hook in hooks:
        hook.remove()
    images = {image.key: image for prompt in prompts for image in prompt.images}
    assert len(images) == 3
    assert calls["vision"] == 1
    assert calls["patches"] == sum(len(image.pixel_values) for image in images.values())
    longest = max(len(p.token_ids) for p in prompts)
    assert embedded[0] == (len(prompts), longest)  # the prompts, not their four rows
    assert all(tokens == 1 for _, tokens in embedded[1:])
    calls.clear()
    core.model.visual.register_forward_pre_hook(lambda _m, a: calls.update(patches=len(a[0]), vision=1))
    Generator(policy, max_rows=1, vision_patches=1).generate(prompts, Sampling(2, 2), rng())
    assert calls["patches"] == sum(len(image.pixel_values) for image in images.values())


def test_features_that_no_later_prompt_shows_are_freed_before_the_decode(qwen2_5, monkeypatch) -> None:
    """Unless the caller keeps them."""
    prompts = encode(qwen2_5)
    shown = [{image.key for image in prompt.images} for prompt in prompts]
    alive: dict[str, weakref.ref] = {}
    left: list[set[str]] = []
    features, sample = qwen2_5.features, Session.sample

    def seen(images):
        found = features(images)
        alive.update({key: weakref.ref(f.tokens) for key, f in found.items()})
        return found

    def spy(self, *args):
        left.append({key for key, ref in alive.items() if ref() is not None})
        return sample(self, *args)

    monkeypatch.setattr(qwen2_5, "features", seen)
    monkeypatch.setattr(Session, "sample", spy)
    Generator(qwen2_5, max_rows=1, vision_patches=1).generate(prompts, Sampling(2, 2), rng())
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
    assert left[-1] == set()
    for number, kept in enumerate(left):
        assert kept <= set().union(*(shown[i] for i in order[number + 1 :]))
    left.clear()
    Generator(qwen2_5, max_rows=1, features={}).generate(prompts, Sampling(2, 2), rng())
    assert left[-1] == set().union(*shown)


def test_prompt_keys_are_stored_once(qwen2_5, monkeypatch) -> None:
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    from fastrl.rollout import cache

    real = cache.decode_attention

    def spy(q, prefix_k, prefix_v, own_k, own_v, **given):
        shapes.append((tuple(prefix_k.shape), tuple(own_k.shape)))
        return real(q, prefix_k, prefix_v, own_k, own_v, **given)

    monkeypatch.setattr(cache, "decode_attention", spy)
    prompts = encode(qwen2_5)
    Generator(qwen2_5, decode="eager").generate(prompts, Sampling(8, 3), rng())
    longest = max(len(p.token_ids) for p in prompts)
    assert shapes[0] == ((5, 2, longest, 16), (40, 2, 1, 16))


def test_suppressed_tokens_are_never_sampled_however_likely(policy) -> None:
    prompts = encode(policy)
    for token in policy.suppressed_token_ids:
        hook = force(policy, token, 1000.0)
        for sampling in (Sampling(2, 2), Sampling(1, 2, temperature=0), Sampling(2, 2, top_p=0.5, top_k=5)):
            for completions in Generator(policy).generate(prompts[:1], sampling, rng()):
                assert not any(token in c.token_ids for c in completions)
        hook.remove()


def test_eos_ends_a_completion_and_length_cuts_it(qwen2_5) -> None:
    prompts = encode(qwen2_5)
    eos = qwen2_5.eos_token_ids
    hook = force(qwen2_5, eos[-1], 1000.0)
    for completions in Generator(qwen2_5).generate(prompts, Sampling(2, 5), rng()):
        for c in completions:
            assert (c.token_ids.tolist(), c.finished, c.text) == ([eos[-1]], True, "")
    hook.remove()
    hooks = [force(qwen2_5, token, -1000.0) for token in eos]
    for completions in Generator(qwen2_5).generate(prompts, Sampling(2, 5), rng()):
        for c in completions:
            assert (len(c.token_ids), c.finished) == (5, False)
            assert c.text == qwen2_5.decode(c.token_ids)
    for hook in hooks:
        hook.remove()


def test_modes_are_put_back(tiny_folder) -> None:
    """Even with gradient checkpointing and in training mode: the cache is used, dropout is off, the mode is
    restored."""
    plain = load_policy(tiny_folder("qwen2_5"), device="cpu")
    policy = load_policy(tiny_folder("qwen2_5"), device="cpu", gradient_checkpointing=True)
    prompts = encode(policy)
    core = policy.core
    core.train()
    core.model.visual.eval()
    before = [module.training for module in core.modules()]
    attention = core.model.language_model.config._attn_implementation
    widths: list[int] = []
    core.model.language_model.register_forward_pre_hook(
        lambda _m, _a, kw: widths.append(kw["inputs_embeds"].shape[1]), with_kwargs=True
    )
    out = Generator(policy).generate(prompts, Sampling(2, 5), rng())
    assert same(out, Generator(plain).generate(prompts, Sampling(2, 5), rng()))
    assert widths[1:] == [1] * (len(widths) - 1)
    assert [module.training for module in core.modules()] == before
    assert core.model.language_model.config._attn_implementation == attention
    assert torch.is_grad_enabled()
    assert not out[0][0].sampler_logp.requires_grad
    hook = core.lm_head.register_forward_hook(lambda _m, _a, _o: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Generator(policy).generate(prompts, Sampling(2, 5), rng())
    hook.remove()
    assert [module.training for module in core.modules()] == before
    assert core.model.language_model.config._attn_implementation == attention


def whole(policy, prompt: Prompt, added: Tensor) -> Prompt:
    """``prompt`` with ``added`` tokens as one prompt."""
    positions = torch.arange(prompt.next_position, prompt.next_position + len(added)).expand(3, -1)
    return Prompt(
        torch.cat([prompt.token_ids, added]),
        torch.cat([prompt.positions, positions], 1),
        prompt.images,
        prompt.image_slots,
    )


def test_session_continues_dialogues_of_different_lengths(policy) -> None:
    """Turns appended to a session give the samples of one long prompt; images and history are computed once."""
    prompts = encode(policy)
    message = [torch.randint(0, 250, (n,), generator=rng(n)) for n in (3, 9, 0, 1, 20)]
    more = [torch.randint(0, 250, (n,), generator=rng(n + 50)) for n in (5, 0, 2, 17, 1)]
    calls = Counter()
    generator = Generator(policy, prefill_tokens=40)
    session = generator.session(prompts)
    policy.core.model.visual.register_forward_pre_hook(lambda _m, _a: calls.update(vision=1))
    assert isinstance(session, Session)
    first = session.generate(Sampling(2, 6), rng(3))
    assert same(first, Generator(policy).generate(prompts, Sampling(2, 6), rng(3)))
    before = calls["vision"]
    for added in (message, more):
        session.extend(added)
    second = session.generate(Sampling(2, 6), rng(4))
    third = session.generate(Sampling(2, 6), rng(4))
    assert calls["vision"] == before
    long = [whole(policy, p, torch.cat([a, b])) for p, a, b in zip(prompts, message, more, strict=True)]
    assert session.next_position == [p.next_position for p in long]
    assert same(second, Generator(policy).generate(long, Sampling(2, 6), rng(4)))
    assert same(second, third)


def test_session_of_one_and_wrong_number_of_turns(qwen2_5) -> None:
    prompts = encode(qwen2_5)
    session = Generator(qwen2_5).session(prompts[0])
    session.extend(qwen2_5.encode_text("yes"))
    ((completion,),) = session.generate(Sampling(1, 4, temperature=0))
    assert len(completion.token_ids) > 0
    with pytest.raises(ValueError, match="expected one tensor for each of 1 dialogues"):
        session.extend([torch.tensor([1]), torch.tensor([2])])


def test_edges(qwen2_5) -> None:
    generator, prompt = Generator(qwen2_5), encode(qwen2_5)[1]
    assert generator.generate([], Sampling(2, 3), rng()) == []
    ((one,),) = generator.generate([prompt], Sampling(1, 1), rng())
    assert len(one.token_ids) == 1
    with pytest.raises(ValueError, match=r"rng: a torch\.Generator is needed"):
        generator.generate([prompt], Sampling(1, 1))
    empty = Prompt(torch.tensor([], dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"prompts\[0\]: no tokens"):
        generator.generate([empty], Sampling(1, 1), rng())
    with pytest.raises(ValueError, match="max_rows: expected 1 or more, got 0"):
        Generator(qwen2_5, max_rows=0)
    hook = qwen2_5.core.lm_head.register_forward_hook(lambda _m, _a, out: out * float("nan"))
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        generator.generate([prompt], Sampling(1, 2), rng())
    hook.remove()
