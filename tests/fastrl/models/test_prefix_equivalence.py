"""Prompts computed once give the log-probs and every gradient of the repeated-prompt layout, on both model families.

The oracle is transformers alone: each [prompt, completion] is its own forward with pixels, the model's own positions
and its own attention; nothing of fastrl's packing or attention takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastrl.batch import PackedBatch, PromptGroup, pack, pack_row
from fastrl.models import Policy, load_policy
from tests.helpers.groups import group, picture

STYLES = ("qwen2_5", "qwen2")


def groups_of_every_kind(policy: Policy) -> list[PromptGroup]:
    """Several images of different sizes, one image, text only; ragged, length 1, length 0, a group of 1."""
    a, b, c = picture(120, 90, 1), picture(60, 112, 2), picture(56, 56, 3)
    return [
        group(policy, [a, b], "Compare.", [5, 1, 9, 3], seed=10),
        group(policy, [], "No picture here.", [4, 20, 2], seed=11),
        group(policy, [c], "Count.", [6], seed=12),
        group(policy, [b], "Again.", [3, 0, 3], seed=13),
    ]


def oracle_logps(model: torch.nn.Module, one: PromptGroup) -> list[Tensor]:
    """Log-probs of each completion from one plain forward per completion."""
    out = []
    prompt = one.prompt
    for completion in one.completions:
        if len(completion.token_ids) == 0:
            out.append(torch.zeros(0))
            continue
        ids = torch.cat([prompt.token_ids, completion.token_ids])[None]
        kinds = torch.zeros_like(ids)
        for start, length in prompt.image_slots:
            kinds[:, start : start + length] = 1
        inputs = {}
        if prompt.images:
            inputs["pixel_values"] = torch.cat([image.pixel_values for image in prompt.images])
            inputs["image_grid_thw"] = torch.tensor([image.shape for image in prompt.images])
        model.model.rope_deltas = None  # type: ignore[union-attr]
        logits = model(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **inputs).logits[0]
        logp = logits[len(prompt.token_ids) - 1 : -1].log_softmax(-1)
        out.append(logp.gather(1, completion.token_ids[:, None])[:, 0])
    return out


def plain_model(folder: Path) -> torch.nn.Module:
    """The same weights, in transformers alone."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(policy: Policy, batches: Sequence[PackedBatch]) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss and gradients over batches; the loss weights each token's log-prob."""
    policy.core.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        loss = (policy.logprob(batch).logp * batch.per_token["weight"]).sum()
        loss.backward()
        total = total + loss.detach()
    return total, gradients(policy.core)


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 2e-5) -> None:
    assert got.keys() == want.keys()
    scale = max(float(g.norm()) for g in want.values())
    for name, gradient in want.items():
        # Some gradients are zero up to rounding (the key bias: softmax ignores it); those compare with the whole.
        allowed = rtol * max(float(gradient.norm()), 1e-3 * scale)
        assert float((got[name] - gradient).norm()) <= allowed, name


@pytest.fixture(params=STYLES)
def folder(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder(request.param)


@pytest.fixture
def policy(folder: Path) -> Policy:
    return load_policy(folder, device="cpu")


def test_logprobs_and_every_gradient_equal_the_repeated_layout(policy: Policy, folder: Path) -> None:
    groups = groups_of_every_kind(policy)
    model = plain_model(folder)
    want = torch.cat([logp for one in groups for logp in oracle_logps(model, one)])
    batch = pack_row(groups)
    (want * batch.per_token["weight"]).sum().backward()

    got = policy.logprob(batch).logp
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    _, grads = backward(policy, [batch])
    want_grads = gradients(model)
    assert grads.keys() == {name for name, _ in policy.core.named_parameters()}
    assert_same_gradients(grads, want_grads)


def test_loss_and_gradient_do_not_depend_on_the_micro_batch_split(policy: Policy) -> None:
    groups = groups_of_every_kind(policy)
    whole, whole_grads = backward(policy, pack(groups, 10_000))
    split_batches = pack(groups, 1)
    assert len(split_batches) == len(groups)
    split, split_grads = backward(policy, split_batches)
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)
    assert_same_gradients(split_grads, whole_grads)


def test_gradient_checkpointing_changes_nothing(policy: Policy, folder: Path) -> None:
    batch = pack_row(groups_of_every_kind(policy))
    loss, grads = backward(policy, [batch])
    recomputing = load_policy(folder, device="cpu", gradient_checkpointing=True)
    calls = count_calls(recomputing.core.model.language_model.layers[0].mlp)
    again, again_grads = backward(recomputing, [batch])
    assert len(calls) == 2, "the layer is recomputed in the backward"
    torch.testing.assert_close(again, loss)
    assert_same_gradients(again_grads, grads)


def count_calls(module: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))  # recomputing stops before forward hooks
    return calls


def test_mixed_multi_image_batches_slice_images_by_their_own_grid(policy: Policy) -> None:
    """Any order and subset of groups gives a completion the same log-probs; an image is computed once per batch."""
    groups = groups_of_every_kind(policy)
    with torch.no_grad():
        alone = {id(c): x for g in groups for c, x in zip(g.completions, each(policy, [g]), strict=True)}
        for order in ([3, 1, 0, 2], [2, 0], [1, 3], [1]):
            chosen = [groups[i] for i in order]
            for one, logp in zip([c for g in chosen for c in g.completions], each(policy, chosen), strict=True):
                torch.testing.assert_close(logp, alone[id(one)], rtol=1e-5, atol=2e-5)
    batch = pack_row(groups)
    keys = [image.key for image in batch.images]
    assert len(keys) == len(set(keys)) == 3
    assert len(batch.image_of_slot) == 4, "the picture two groups share is stored once"
    patches: list[int] = []
    policy.core.model.visual.register_forward_pre_hook(lambda _, args: patches.append(len(args[0])))
    policy.logprob(batch)
    assert patches == [sum(t * h * w for t, h, w in (image.shape for image in batch.images))]


def each(policy: Policy, groups: Sequence[PromptGroup]) -> list[Tensor]:
    batch = pack_row(groups)
    return batch.split(policy.logprob(batch).logp)


def test_an_answer_holding_image_tokens_neither_breaks_nor_counts_as_image(policy: Policy) -> None:
    image_id = policy.core.config.image_token_id
    one = group(policy, [picture(60, 60, 5)], "Where?", [6, 4], seed=20)
    one.completions[0].token_ids[1:3] = image_id
    batch = pack_row([one])
    assert len(batch.image_rows) == one.prompt.image_slots[0][1]
    logp = policy.logprob(batch)
    logp.logp.sum().backward()

    # The same tokens as text, through the language model alone, with this prompt's features.
    model, prompt, ids = policy.core, one.prompt, one.completions[0].token_ids
    with torch.no_grad():
        embeds = model.get_input_embeddings()(torch.cat([prompt.token_ids, ids]))
        start, length = prompt.image_slots[0]
        embeds[start : start + length] = policy.features(prompt.images)[prompt.images[0].key].tokens
        steps = torch.arange(len(ids)) + prompt.next_position
        positions = torch.cat([prompt.positions, steps.expand(3, -1)], dim=1)[:, None]
        hidden = model.model.language_model(inputs_embeds=embeds[None], position_ids=positions, use_cache=False)
        logits = model.lm_head(hidden.last_hidden_state[0, len(prompt.token_ids) - 1 : -1])
    want = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(batch.split(logp.logp.detach())[0], want, rtol=1e-5, atol=2e-5)


def test_state_cached_on_the_model_is_never_read(policy: Policy) -> None:
    """``rope_deltas`` left behind by a generation has no effect on positions."""
    batch = pack_row(groups_of_every_kind(policy))
    with torch.no_grad():
        before = policy.logprob(batch).logp
        policy.core.model.rope_deltas = torch.tensor([[1234]])
        after = policy.logprob(batch).logp
    assert torch.equal(before, after)
    assert policy.core.model.rope_deltas.item() == 1234, "and is not written either"


def test_a_batch_without_tokens_has_loss_and_gradient_zero(policy: Policy) -> None:
    one = group(policy, [picture(60, 60, 6)], "Where?", [0, 0], seed=21)
    loss, grads = backward(policy, [pack_row([one])])
    assert loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads.values())


def test_temperature_and_entropy_follow_their_definitions(policy: Policy, folder: Path) -> None:
    one = group(policy, [picture(60, 60, 7)], "Where?", [5], seed=22)
    with torch.no_grad():
        got = policy.logprob(pack_row([one]), temperature=0.7, return_entropy=True)
        hidden = policy.hidden(pack_row([one]))
        logp = (policy.core.lm_head(hidden).double() / 0.7).log_softmax(-1)
    torch.testing.assert_close(got.logp.double(), logp.gather(1, one.completions[0].token_ids[:, None])[:, 0])
    torch.testing.assert_close(got.entropy.double(), -(logp.exp() * logp).sum(-1), rtol=1e-5, atol=1e-5)


def test_features_given_by_the_caller_replace_the_tower(policy: Policy) -> None:
    batch = pack_row(groups_of_every_kind(policy))
    with torch.no_grad():
        want = policy.logprob(batch).logp
        features = policy.features(batch.images)
        policy.core.model.visual.register_forward_pre_hook(lambda *_: pytest.fail("the vision tower ran"))
        assert torch.equal(policy.logprob(batch, features=features).logp, want)
