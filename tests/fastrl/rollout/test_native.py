"""Decoding in C++: the tokens and log-probs of eager decoding, which is used wherever the C++ does not apply."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastrl.models.decode_layers import DecodeLayers
from fastrl.models.load import load_policy
from fastrl.models.native_layers import NativeLayers
from fastrl.rollout import Generator, Sampling
from fastrl.rollout import decode as decode_module
from fastrl.rollout.cache import RowCache
from fastrl.rollout.decode import Decode
from fastrl_kernels import _native
from fastrl_kernels.decode_step import DecodeStep
from tests.helpers.rollouts import STYLES, encode, force, reference_generate, rng, same, teacher_forced

LACKS = _native.lacks("fastrl_decode")
pytestmark = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))


@pytest.fixture(params=STYLES)
def policy(request, tiny_folder):
    return load_policy(tiny_folder(request.param), device="cpu")


@pytest.fixture
def qwen2_5(tiny_folder):
    return load_policy(tiny_folder("qwen2_5"), device="cpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Rows of each step with layers in torch, of each step in C++, and steps per call."""
    seen: dict[str, list[int]] = {"torch": [], "layers": [], "whole": []}
    layers, hidden, draw = DecodeLayers.__call__, DecodeStep.hidden, DecodeStep.draw

    def drawn(self: DecodeStep, *args: Any) -> int:
        seen["whole"].append(draw(self, *args))
        return seen["whole"][-1]

    monkeypatch.setattr(
        DecodeLayers, "__call__", lambda self, token, *x: seen["torch"].append(len(token)) or layers(self, token, *x)
    )
    monkeypatch.setattr(
        DecodeStep, "hidden", lambda self, token, *x: seen["layers"].append(len(token)) or hidden(self, token, *x)
    )
    monkeypatch.setattr(DecodeStep, "draw", drawn)
    return seen


def both(policy: Any, sampling: Sampling, prompts: Any = None) -> None:
    """Eager and native decoding give the same result."""
    prompts = encode(policy) if prompts is None else prompts
    want, got = (Generator(policy, decode=mode).generate(prompts, sampling, rng()) for mode in ("eager", "native"))
    assert same(got, want)
    for left, right in zip(got, want, strict=True):
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(a.sampler_logp, b.sampler_logp, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1, 20, 0.0),
        Sampling(8, 20),
        Sampling(3, 9, 0.6),
        Sampling(2, 1),
        Sampling(2, 2, 1.4),
        Sampling(4, 12, 1.2, 0.95, 150),
    ],
    ids=["greedy", "sampled", "cold", "one token", "two tokens", "truncated"],
)
def test_tokens_and_log_probs_are_those_of_eager_decoding(policy, sampling: Sampling, calls) -> None:
    """Prompts of different lengths, with and without pictures. Truncated sampling uses torch on the logits from C++."""
    both(policy, sampling)
    eager = sampling.max_new_tokens - 1
    assert len(calls["torch"]) == eager
    assert len(calls["layers"]) == (eager if sampling.truncated else 0)
    assert sum(calls["whole"]) == (0 if sampling.truncated else eager)
    assert eager < 2 or len(calls["whole"]) < eager


@pytest.mark.parametrize("steps", [1, 3, 100])
def test_rows_that_end_leave_whatever_a_call_does(qwen2_5, monkeypatch, steps: int) -> None:
    """The end-of-turn token is likely (by the head's bias): rows end at different steps, batches shrink."""
    core, eos = qwen2_5.core, qwen2_5.eos_token_ids[0]
    head = nn.Linear(core.lm_head.in_features, core.lm_head.out_features)
    head.weight = core.lm_head.weight
    head.bias = nn.Parameter(torch.zeros(head.out_features).index_fill_(0, torch.tensor([eos]), 4.0))
    core.lm_head = head
    monkeypatch.setattr(decode_module, "STEPS_PER_CALL", steps)
    widths: list[int] = []
    real = DecodeStep.draw
    monkeypatch.setattr(DecodeStep, "draw", lambda self, token, *x: widths.append(len(token)) or real(self, token, *x))
    both(qwen2_5, Sampling(6, 16))
    assert 20 < widths[0] <= 30, "an answer may end with its first token"
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) > 2


def test_greedy_answers_are_transformers_and_log_probs_the_trainers(policy) -> None:
    prompts = encode(policy)
    out = Generator(policy, decode="native").generate(prompts, Sampling(1, 12, temperature=0))
    for prompt, (completion,) in zip(prompts, out, strict=True):
        assert completion.token_ids.tolist() == reference_generate(policy, prompt, 12).tolist()
        want = teacher_forced(policy, prompt, completion)
        torch.testing.assert_close(completion.sampler_logp, want, rtol=1e-4, atol=1e-4)


def test_a_session_goes_on_after_more_was_said(policy) -> None:
    prompts = encode(policy)
    message = [torch.randint(0, 250, (n,), generator=rng(n)) for n in (3, 9, 0, 1, 20)]
    sessions = [Generator(policy, decode=mode).session(prompts) for mode in ("eager", "native")]
    for turn in range(2):
        want, got = (session.generate(Sampling(3, 8), rng(turn)) for session in sessions)
        assert same(got, want)
        for session in sessions:
            session.extend(message)


def test_an_update_in_place_is_seen(qwen2_5) -> None:
    generator, prompts, sampling = Generator(qwen2_5), encode(qwen2_5), Sampling(2, 8)
    before = generator.generate(prompts, sampling, rng())
    with torch.no_grad():
        for parameter in qwen2_5.core.parameters():
            parameter.mul_(1.3)
    assert not same(generator.generate(prompts, sampling, rng()), before)
    both(qwen2_5, sampling)


def test_one_seed_gives_the_same_bits_twice_and_however_prompts_are_portioned(policy) -> None:
    prompts, sampling = encode(policy), Sampling(3, 10)
    first, again = (Generator(policy).generate(prompts, sampling, rng()) for _ in range(2))
    alone = Generator(policy, max_rows=3).generate(prompts, sampling, rng())
    for left, right in zip(first, again, strict=True):
        for a, b in zip(left, right, strict=True):
            assert torch.equal(a.token_ids, b.token_ids)
            assert torch.equal(a.sampler_logp, b.sampler_logp)
    assert same(alone, first)


def test_keys_are_freed_when_generate_returns(qwen2_5) -> None:
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(x, RowCache) for x in gc.get_objects())
        Generator(qwen2_5).generate(encode(qwen2_5), Sampling(2, 8), rng())
        assert sum(isinstance(x, RowCache) for x in gc.get_objects()) == before
    finally:
        gc.enable()


def test_a_step_runs_no_operator_of_torch(qwen2_5) -> None:
    """Counted by the profiler: more tokens take more calls, but no operators per token."""

    def operators(tokens: int) -> int:
        session = Generator(qwen2_5).session(encode(qwen2_5))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            session.generate(Sampling(2, tokens), rng())
        return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))

    per_call = operators(1 + 2 * decode_module.STEPS_PER_CALL) - operators(1 + decode_module.STEPS_PER_CALL)
    assert per_call < 24, "of a call of several steps, where one eager step of two layers has some 300"


# Where the C++ does not apply


def test_a_hook_on_the_head_is_called_and_the_layers_stay_in_cpp(qwen2_5, calls) -> None:
    hook = force(qwen2_5, qwen2_5.eos_token_ids[0], 4.0)
    both(qwen2_5, Sampling(4, 12))
    hook.remove()
    assert calls["layers"]
    assert not calls["whole"]


def change_hook(core: Any) -> None:
    core.model.language_model.layers[1].mlp.down_proj.register_forward_hook(lambda _m, _a, out: 1.01 * out)


def change_pre_hook(core: Any) -> None:
    core.model.language_model.layers[0].self_attn.k_proj.register_forward_pre_hook(lambda _m, x: (1.01 * x[0],))


def change_forward(core: Any) -> None:
    module = core.model.language_model.layers[0].self_attn.o_proj
    real = module.forward
    module.forward = lambda x: 1.01 * real(x)


def change_class(core: Any) -> None:
    class Louder(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 1.01 * super().forward(x)

    core.model.language_model.layers[0].mlp.up_proj.__class__ = Louder


def change_weight_norm(core: Any) -> None:
    nn.utils.parametrizations.weight_norm(core.model.language_model.layers[1].mlp.gate_proj)


def change_embedding(core: Any) -> None:
    core.get_input_embeddings().register_forward_hook(lambda _m, _a, out: 1.01 * out)


def change_dtype(core: Any) -> None:
    core.double()


def change_layout(core: Any) -> None:
    weight = core.model.language_model.layers[1].self_attn.v_proj.weight
    weight.data = weight.data.T.contiguous().T


@pytest.mark.parametrize(
    "change",
    [
        change_hook, change_pre_hook, change_forward, change_class, change_weight_norm, change_embedding, change_dtype,
        change_layout,
    ],
)  # fmt: skip
def test_what_the_cpp_cannot_see_through_decodes_eagerly(qwen2_5, calls, change: Callable[[Any], None]) -> None:
    change(qwen2_5.core)
    both(qwen2_5, Sampling(2, 6))
    assert calls["torch"]
    assert not calls["layers"] + calls["whole"]


def test_adapters_decode_eagerly_and_without_them_the_base_model_too(tiny_folder, calls) -> None:
    policy = load_policy(tiny_folder("qwen2_5"), device="cpu", lora={"rank": 4})
    both(policy, Sampling(2, 6))
    with policy.reference():
        both(policy, Sampling(2, 6))
    assert not calls["layers"] + calls["whole"]


def test_counted_operators_and_global_hooks_decode_eagerly(qwen2_5, calls) -> None:
    prompts, sampling = encode(qwen2_5), Sampling(2, 4)
    generator = Generator(qwen2_5)
    with FlopCounterMode(display=False) as native:
        generator.generate(prompts, sampling, rng())
    with FlopCounterMode(display=False) as eager:
        Generator(qwen2_5, decode="eager").generate(prompts, sampling, rng())
    assert native.get_total_flops() == eager.get_total_flops() > 0
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    generator.generate(prompts, sampling, rng())
    handle.remove()
    assert not calls["layers"] + calls["whole"]
    generator.generate(prompts, sampling, rng())
    assert calls["whole"]


def test_angles_that_depend_on_the_longest_text_are_computed_step_by_step(qwen2_5, calls, monkeypatch) -> None:
    """As of a "dynamic" rotary embedding, whose frequencies change with the longest position of a call."""
    rotary = qwen2_5.core.model.language_model.rotary_emb
    real = rotary.forward
    rotary.forward = lambda x, positions: real(x, positions * (1 + positions.max() / 1000))
    monkeypatch.setattr(rotary, "rope_type", "dynamic")
    both(qwen2_5, Sampling(2, 8))
    assert calls["layers"]
    assert not calls["whole"]


def test_a_vocabulary_larger_than_the_embeddings_is_drawn_from_by_torch(qwen2_5, calls) -> None:
    core = qwen2_5.core
    core.lm_head = nn.Linear(core.lm_head.in_features, core.lm_head.out_features + 4, bias=False)
    qwen2_5.suppressed_token_ids = (*qwen2_5.suppressed_token_ids, *range(core.lm_head.out_features)[-4:])
    both(qwen2_5, Sampling(2, 6))
    assert calls["layers"]
    assert not calls["whole"]


def test_no_bytes_outside_the_answers_change(qwen2_5, monkeypatch) -> None:
    """The filler row and the positions after an answer's end keep their initial values."""
    decodes: list[Decode] = []
    real = Decode.run
    monkeypatch.setattr(Decode, "run", lambda self, **kwargs: decodes.append(self) or real(self, **kwargs))
    Generator(qwen2_5).generate(encode(qwen2_5), Sampling(2, 7), rng())
    (one,) = decodes
    assert not one.all_tokens[-1].any()
    assert not one.all_logp[-1].any()
    assert (one.all_logp[:-1] < 0).all()


def test_native_layers_are_made_of_known_modules_alone(qwen2_5) -> None:
    layers = qwen2_5.family.decode_layers(qwen2_5.core)
    assert layers is not None
    with torch.no_grad():
        assert NativeLayers.of(layers) is not None
    qwen2_5.core.get_input_embeddings().max_norm = 1.0
    assert NativeLayers.of(layers) is None
