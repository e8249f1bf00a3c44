"""The contract of every registered family: agreement with transformers' own model, on tiny random folders. The core
(ids, log-probs, gradients) runs with the fast tests, all cases with ``-m gate``. The second half breaks each part on
purpose and requires that the contract notices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastrl.batch import pack_row
from fastrl.models import decode_layers as decode_module
from fastrl.models import load_policy
from fastrl.models.attention import delta_net
from fastrl.models.attention.delta_net import is_delta_net
from fastrl.models.attention.delta_rule import DeltaState
from fastrl.models.families import families, qwen2_vl
from fastrl.models.families.base import Family
from fastrl.plan.workload import packed
from fastrl.rollout import Generator
from fastrl.rollout import cache as cache_module
from fastrl.run import keeping
from fastrl.trainer import train
from tests.helpers.contract import QUESTIONS, Pair, check_gradients, check_greedy, check_logp, check_sampler
from tests.helpers.families import BUILDS, build_family
from tests.helpers.planned import measured_and_planned
from tests.helpers.rollouts import picture
from tests.helpers.training import make_recipe, make_records, steady_rows

# Every family


def test_every_registered_family_has_a_folder_to_be_held_to_the_contract() -> None:
    assert set(families()) == set(BUILDS)


@pytest.mark.parametrize("images", sorted(QUESTIONS))
def test_prompt_ids_are_the_released_processors_own(pair: Pair, images: int) -> None:
    prompt, rendered, pictures = pair.asked(images)
    assert prompt.token_ids.tolist() == pair.oracle.inputs(rendered, pictures)["input_ids"][0].tolist()
    assert prompt.positions.shape == (pair.policy.family.position_axes, len(prompt.token_ids))


def test_log_probs_are_transformers_own(pair: Pair) -> None:
    check_logp(pair)


def test_every_gradient_is_that_of_the_repeated_layout(pair: Pair) -> None:
    check_gradients(pair)


@pytest.mark.gate
@pytest.mark.parametrize("decode", ["native", "eager", "static"])
def test_a_greedy_rollout_is_generate_token_for_token(pair: Pair, decode: str) -> None:
    check_greedy(pair, decode)


@pytest.mark.gate
@pytest.mark.parametrize("decode", ["native", "eager", "static"])
def test_the_sampler_reports_the_trainers_log_probs(pair: Pair, decode: str) -> None:
    check_sampler(pair, decode)


@pytest.mark.gate
def test_decoding_through_the_models_own_layers_is_the_same(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(pair.policy.family), "decode_layers", lambda self, core: None)
    check_greedy(pair, "static")
    check_sampler(pair)


@pytest.mark.gate
def test_the_whole_models_own_generate_goes_on_with_padding(pair: Pair) -> None:
    """fastrl's attention builds no mask; the model's own forward still builds one."""
    ours, theirs = pair.policy.core, pair.oracle.model
    ids = torch.randint(0, 200, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for model in (ours, theirs):
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = None
    with torch.no_grad():
        got, want = (
            m.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False) for m in (ours, theirs)
        )
    assert torch.equal(got, want)


@pytest.mark.gate
def test_checkpointing_changes_no_gradient(pair: Pair) -> None:
    recomputing = load_policy(pair.folder, device="cpu", gradient_checkpointing=True, offload_activations=True)
    check_gradients(replace(pair, policy=recomputing))


@pytest.mark.gate
def test_a_picture_turned_back_gives_the_same_pixels(pair: Pair) -> None:
    preprocessor = pair.policy.preprocessor
    for images in (1, 2):
        for source in QUESTIONS[images][1]:
            image, view = preprocessor(source, images)
            again, _ = preprocessor(preprocessor.picture(image), images)
            assert torch.equal(again.pixel_values, image.pixel_values)
            assert (view.width, view.height) == source.size


@pytest.mark.gate
def test_a_large_picture_gives_the_same_pixels(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """For families with a cheaper path for it."""
    shapes = ((640, 480), (33, 90), (300, 301))
    read = pair.policy.preprocessor.read
    usual = [read(picture(*shape, 1), "", 1) for shape in shapes]
    monkeypatch.setattr(qwen2_vl, "LARGE", 100)
    for (image, view), (same, seen) in zip(usual, [read(picture(*shape, 1), "", 1) for shape in shapes], strict=True):
        assert (image.shape, view) == (same.shape, seen)
        assert torch.equal(image.pixel_values, same.pixel_values)


@pytest.mark.gate
def test_features_are_as_many_as_tokens_and_a_map_keeps_their_sum(pair: Pair) -> None:
    family = pair.policy.family
    for images in (1, 2):
        prompt = pair.asked(images)[0]
        for image, found in zip(prompt.images, pair.policy.features(prompt.images).values(), strict=True):
            values = torch.rand(family.tokens(image))
            assert len(found.tokens) == len(values)
            torch.testing.assert_close(family.heat(image, values).sum(), values.sum())


@pytest.mark.gate
@pytest.mark.parametrize("part", ["vision", "projector", "language"])
def test_a_part_is_frozen_and_trained_by_its_word(pair: Pair, part: str) -> None:
    family = pair.policy.family
    frozen = load_policy(pair.folder, device="cpu", freeze=[part])
    named = dict(frozen.core.named_parameters())
    still = {name for name, p in named.items() if not p.requires_grad}
    assert still
    assert still == {name for name in named if family.part_of(name) == part}
    assert {family.part_of(name) for name in named} == {"vision", "projector", "language"}
    if part != "language":
        lora = {"rank": 2, "also_train": [part]}
        whole = load_policy(pair.folder, device="cpu", lora=lora)
        trained = {n for n, p in whole.core.named_parameters() if p.requires_grad and ".lora_" not in n}
        assert trained
        assert {family.part_of(name) for name in trained} == {part}


@pytest.mark.gate
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_is_within_two_percent_of_counted_bytes(tmp_path: Path, pair: Pair, checkpointing: bool) -> None:
    model_type = pair.policy.family.model_type
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 3000}
    sizes["num_attention_heads"] = 8
    folder = build_family(tmp_path, model_type, **sizes)
    family = load_policy(folder, device="cpu").family
    batch = packed(family, 40, [family.blank(112 * 112)], [(40,) * 8])
    real = [replace(image, pixel_values=torch.rand(image.pixel_values.shape)) for image in batch.images]
    batch = replace(batch, images=tuple(real))
    counted, planned = measured_and_planned(folder, batch, dtype=torch.float32, checkpointing=checkpointing, lora=None)
    assert planned == pytest.approx(counted, rel=0.02)


class Stop(Exception):
    """Ends a run between two steps."""


def stop_after_six(row: dict[str, Any]) -> None:
    if row["step"] == 6:  # a step after the checkpoint: it is logged, lost and repeated
        raise Stop


SAVING = {"optim__states": "8bit", "model__gradient_checkpointing": True, "model__offload_activations": True}


@pytest.mark.gate
@pytest.mark.parametrize("keys", [{}, SAVING], ids=["plain", "8-bit moments, activations recomputed and offloaded"])
def test_ten_steps_are_finite_and_resume_bit_for_bit(pair: Pair, tmp_path: Path, keys: dict[str, Any]) -> None:
    options = {"optim__steps": 10, "checkpoint__every": 5, "rollout__max_new_tokens": 4, "data__prompts_per_step": 2}
    options |= keys
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(make_recipe(pair.folder, whole, **options), records=make_records(), show=False)
    recipe = make_recipe(pair.folder, parts, **options)
    with pytest.raises(Stop):
        train(recipe, records=make_records(), show=False, on_step=stop_after_six)
    train(recipe, records=make_records(), show=False, resume=True)
    assert len(steady_rows(whole)) == 10
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in steady_rows(whole))
    assert steady_rows(whole) == steady_rows(parts)
    first, second = (load_file(latest(out) / "model" / "model.safetensors") for out in (whole, parts))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def latest(out: Path) -> Path:
    found = keeping.latest_checkpoint(out)
    assert found is not None
    return found


# Broken on purpose: the contract must notice


def shifted(positions: Tensor, slots: Sequence[tuple[int, int]]) -> Tensor:
    """Shifts every position behind the last picture by one."""
    if not slots:
        return positions
    start, length = slots[-1]
    moved = positions.clone()
    moved[:, start + length :] += 1
    return moved


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl", "llava", "llava_onevision"])
def test_a_shifted_position_is_noticed(
    make_pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    pair = make_pair(model_type)
    real = Family.lay_out

    def lay_out(self: Family, ids: Tensor, images: Any) -> Any:
        found = real(self, ids, images)
        return found._replace(positions=shifted(found.positions, found.slots))

    monkeypatch.setattr(Family, "lay_out", lay_out)
    with pytest.raises(AssertionError):
        check_logp(pair)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl", "llava_next"])
def test_a_norm_left_out_of_the_forward_is_noticed(make_pair: Callable[[str], Pair], model_type: str) -> None:
    pair = make_pair(model_type)
    pair.policy.parts.language.layers[1].post_attention_layernorm.forward = lambda hidden: hidden
    with pytest.raises(AssertionError):
        check_logp(pair)
    with pytest.raises(AssertionError):
        check_gradients(pair)


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_a_head_norm_left_out_of_the_decode_step_is_noticed(
    make_pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As in a decode step written for layers without these norms: the trainer's forward is still right."""
    pair = make_pair("qwen3_vl")
    real = decode_module._head_norm
    dropped = {id(getattr(layer.self_attn, name)) for layer in pair.policy.parts.language.layers}
    monkeypatch.setattr(decode_module, "_head_norm", lambda x, norm: x if id(norm) in dropped else real(x, norm))
    check_logp(pair)
    with pytest.raises(AssertionError):
        check_sampler(pair)


@pytest.mark.parametrize("level", [0, 1])
def test_a_feature_level_left_out_is_noticed(
    make_pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    """The sampler gap alone cannot see it, as rollout and training both drop it."""
    pair = make_pair("qwen3_vl")
    family = type(pair.policy.family)
    real = family.features

    def features(self: Any, core: Any, images: Any) -> Any:
        return [
            f._replace(deep=tuple(torch.zeros_like(d) if n == level else d for n, d in enumerate(f.deep)))
            for f in real(self, core, images)
        ]

    monkeypatch.setattr(family, "features", features)
    check_sampler(pair)
    with pytest.raises(AssertionError):
        check_logp(pair)
    with pytest.raises(AssertionError):
        check_gradients(pair)


def test_pictures_in_another_order_are_noticed(
    make_pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair("llava_next")
    family = type(pair.policy.family)
    real = family.features
    monkeypatch.setattr(family, "features", lambda self, core, images: real(self, core, images)[::-1])
    with pytest.raises((AssertionError, RuntimeError)):  # other sizes do not even fit
        check_logp(pair)


def test_only_recurrent_layers_have_scans_and_states(pair: Pair) -> None:
    """Attention alone pays nothing for them."""
    recurrent = any(is_delta_net(module) for module in pair.policy.parts.language.modules())
    assert recurrent == pair.policy.family.model_type.startswith("qwen3_5")
    batch = pack_row([pair.group(images) for images in QUESTIONS])
    with torch.no_grad():
        pair.policy.logprob(batch)
    assert ("scans" in vars(batch.segments)) == recurrent
    session = Generator(pair.policy).session([pair.asked(0)[0]])
    assert bool(session._cache.states) == (session._cache.state_bytes > 0) == recurrent


def dropped(part: int) -> Callable[[Any], Any]:
    """Zeros instead of the prompts' final memory (4 axes) or convolution inputs (3)."""
    return lambda real: lambda x, *rest: torch.zeros_like(real(x, *rest)) if x.dim() == part else real(x, *rest)


@pytest.mark.parametrize("part", [4, 3], ids=["memory", "convolution inputs"])
def test_a_prompts_state_left_out_of_the_answers_is_noticed(
    make_pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    pair = make_pair("qwen3_5")
    monkeypatch.setattr(delta_net, "gather_rows", dropped(part)(delta_net.gather_rows))
    for check in (check_logp, check_gradients, check_sampler):
        with pytest.raises(AssertionError):
            check(pair)


def test_a_delta_net_that_shares_attention_alone_is_noticed(make_pair: Callable[[str], Pair]) -> None:
    """The model's own layer reads a packed row as one text."""
    pair = make_pair("qwen3_5")
    for module in pair.policy.parts.language.modules():
        if is_delta_net(module):
            real = type(module).forward
            module.forward = lambda hidden_states, *_, net=module, real=real, **__: real(net, hidden_states)
    with pytest.raises(AssertionError):
        check_logp(pair)


def no_memory(state: DeltaState) -> None:
    state.memory.zero_()


def no_window(state: DeltaState) -> None:
    state.window.zero_()


def one_for_all(state: DeltaState) -> None:
    for part in state:
        part.copy_(part[:1].expand_as(part).clone())


@pytest.mark.parametrize("decode", ["eager", "static"])
@pytest.mark.parametrize("breaks", [no_memory, no_window, one_for_all])
def test_a_broken_state_of_the_rollout_is_noticed(
    make_pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, decode: str, breaks: Callable[[DeltaState], None]
) -> None:
    """The trainer's own forward stays right."""
    pair = make_pair("qwen3_5")
    real = cache_module.step

    def step(net: Any, x: Any, state: DeltaState) -> Tensor:
        breaks(state)
        return real(net, x, state)

    monkeypatch.setattr(cache_module, "step", step)
    check_logp(pair)
    with pytest.raises(AssertionError):
        check_sampler(pair, decode)


def test_a_layer_of_an_unknown_kind_decodes_through_the_models_own(make_pair: Callable[[str], Pair]) -> None:
    pair = make_pair("qwen2_5_vl")
    family, core = pair.policy.family, pair.policy.core
    assert family.decode_layers(core) is not None
    pair.policy.parts.language.layers[0].extra = torch.nn.Identity()
    assert family.decode_layers(core) is None
    check_greedy(pair)
