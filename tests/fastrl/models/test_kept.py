"""An update that trains from the rollout's passes against one that computes prompts and answers in one forward."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.batch import PromptGroup, pack, pack_row
from fastrl.models import Policy, load_policy
from fastrl.models.checkpointing import use_checkpointing
from fastrl.models.flops import flop_counter
from fastrl.models.kept import KeptPrompts, answer_states, obstacle
from fastrl.rollout import Generator, Sampling
from fastrl_kernels.linear_policy_loss import linear_policy_loss
from tests.helpers.families import build_family
from tests.helpers.groups import group, picture

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava")
MORE = ("qwen2_vl", "qwen3_vl_moe", "llava_next", "llava_onevision", "internvl", "glm4v", "smolvlm")
LIMITS = {torch.float32: (1e-6, 2e-6), torch.float64: (1e-12, 1e-12)}
IN_FLOAT32 = ("visual.embeddings.position_embedding.weight",)  # GLM's tower interpolates it in float32 at any dtype
SAMPLING = Sampling(2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = build_family(tmp_path_factory.mktemp(model_type), model_type)
        return made[model_type]

    return of


def groups_of(policy: Policy) -> list[PromptGroup]:
    """Two pictures, text only, one picture, a picture of another prompt; ragged, of one token, of none."""
    a, b, c = picture(120, 90, 1), picture(60, 112, 2), picture(56, 56, 3)
    return [
        group(policy, [a, b], "Compare.", [5, 1, 9, 3], seed=10),
        group(policy, [], "No picture here.", [4, 20, 2], seed=11),
        group(policy, [c], "Count.", [6], seed=12),
        group(policy, [b], "Again.", [3, 0, 3], seed=13),
        group(policy, [b], "One token each.", [1, 1], seed=14),
    ]


def gradients(policy: Policy) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in policy.core.named_parameters() if p.grad is not None}


def whole(policy: Policy, groups: Sequence[PromptGroup]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs and gradients of one forward over prompts and answers of all groups."""
    policy.core.zero_grad()
    batch = pack_row(groups)
    logp = policy.logprob(batch).logp
    (logp * batch.per_token["weight"]).sum().backward()
    return logp.detach(), gradients(policy)


def from_rollout(
    policy: Policy, groups: Sequence[PromptGroup], budget: int = 10_000, sampled: Sequence[PromptGroup] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from the passes of a rollout of ``sampled`` (default: these groups), in micro-batches of the budget."""
    policy.core.zero_grad()
    kept, found, at = KeptPrompts(), [], 0
    rng = torch.Generator().manual_seed(0)
    Generator(policy).generate([g.prompt for g in sampled or groups], SAMPLING, rng, keep=kept)
    kept.only(g.prompt for g in groups)
    for batch in pack(groups, budget):
        own = kept.of(g.prompt for g in groups[at : at + batch.n_groups])
        at += batch.n_groups
        logp = policy.logprob(batch, kept=own).logp
        (logp * batch.per_token["weight"]).sum().backward()
        found.append(logp.detach())
    rest = kept.rest()
    assert rest is not None
    assert not len(kept)
    rest.backward()
    return torch.cat(found), gradients(policy)


def assert_same(
    got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], dtype: torch.dtype
) -> None:
    logp, gradient = LIMITS[dtype]
    assert float((got[0] - want[0]).abs().max()) <= logp
    assert got[1].keys() == want[1].keys()
    scale = max(float(g.norm()) for g in want[1].values())
    for name, value in want[1].items():
        limit = LIMITS[torch.float32][1] if name.endswith(IN_FLOAT32) else gradient
        # The gradient of a key bias is zero up to rounding, as softmax ignores the bias: it compares with the whole.
        least = 1.0 if name.endswith("k_proj.bias") else 1e-3
        assert float((got[1][name] - value).norm()) <= limit * max(float(value.norm()), least * scale), name


@pytest.mark.parametrize("budget", [10_000, 1], ids=["one micro-batch", "a group each"])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("model_type", [*FAMILIES, *(pytest.param(m, marks=pytest.mark.gate) for m in MORE)])
def test_logprobs_and_every_gradient_are_those_of_one_forward(
    folder: Callable[[str], Path], model_type: str, dtype: torch.dtype, budget: int
) -> None:
    if "moe" in model_type and dtype == torch.float64:
        pytest.skip("torch multiplies groups of experts in float32 at most")
    policy = load_policy(folder(model_type), device="cpu", dtype=dtype)
    groups = groups_of(policy)
    assert_same(from_rollout(policy, groups, budget), whole(policy, groups), dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "offload_activations": True},
        {"gradient_checkpointing": "products"},
        {"gradient_checkpointing": True, "checkpointed_layers": 1},
        {"lora": {"rank": 4}},
        {"lora": {"rank": 4, "targets": ["q_proj"], "also_train": ["projector"]}, "gradient_checkpointing": True},
        {"freeze": ["vision", "projector"]},
        {"freeze": ["language"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", LIMITS)
def test_so_they_are_with(folder: Callable[[str], Path], options: dict[str, Any], dtype: torch.dtype) -> None:
    policy = load_policy(folder("qwen3_vl"), device="cpu", dtype=dtype, **options)
    with torch.no_grad():
        for name, parameter in policy.core.named_parameters():
            if "lora_B" in name:  # begins at zero, which would hide the gradient of lora_A
                parameter.normal_(std=0.1)
    groups = groups_of(policy)
    assert_same(from_rollout(policy, groups, budget=200), whole(policy, groups), dtype)


def test_the_same_bits_twice_and_the_same_answers_as_without(folder: Callable[[str], Path]) -> None:
    policy = load_policy(folder("qwen2_5_vl"), device="cpu")
    groups = groups_of(policy)
    first, second = from_rollout(policy, groups), from_rollout(policy, groups)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(value, second[1][name]) for name, value in first[1].items())
    prompts = [g.prompt for g in groups]
    answers = [
        Generator(policy).generate(prompts, SAMPLING, torch.Generator().manual_seed(1), keep=keep)
        for keep in (None, KeptPrompts())
    ]
    for plain, kept in zip(*([c for row in found for c in row] for found in answers), strict=True):
        assert plain.token_ids.tolist() == kept.token_ids.tolist()
        torch.testing.assert_close(plain.sampler_logp, kept.sampler_logp, rtol=1e-5, atol=1e-5)


def test_groups_that_are_dropped_leave_nothing_behind(folder: Callable[[str], Path]) -> None:
    """Neither in the gradient nor in memory, although one of them shares a picture with a group that stays."""
    policy = load_policy(folder("qwen2_5_vl"), device="cpu", dtype=torch.float64, gradient_checkpointing=True)
    groups = groups_of(policy)
    some = [groups[1], groups[3]]
    assert_same(from_rollout(policy, some, sampled=groups), whole(policy, some), torch.float64)

    kept = KeptPrompts()
    Generator(policy).generate([g.prompt for g in groups], SAMPLING, torch.Generator(), keep=kept)
    watched = [weakref.ref(held.made[0]) for held in kept.of(g.prompt for g in groups)]
    gc.collect()
    gc.disable()  # nothing may need the collector: it does not see references through a graph
    try:
        kept.only(g.prompt for g in some)
        assert [ref() is not None for ref in watched] == [False, True, False, True, False]
        with pytest.raises(KeyError):
            kept.of([groups[0].prompt])
        kept.clear()
        assert not any(ref() is not None for ref in watched)
    finally:
        gc.enable()


def test_an_update_leaves_nothing_behind(folder: Callable[[str], Path]) -> None:
    policy = load_policy(folder("qwen2_5_vl"), device="cpu", gradient_checkpointing=True)
    groups, kept = groups_of(policy), KeptPrompts()
    Generator(policy).generate([g.prompt for g in groups], SAMPLING, torch.Generator(), keep=kept)
    watched = [weakref.ref(tensor) for held in kept.of(g.prompt for g in groups) for tensor in held.made + held.leaves]
    gc.collect()
    gc.disable()
    try:
        policy.logprob(pack_row(groups), kept=kept.of(g.prompt for g in groups)).logp.sum().backward()
        rest = kept.rest()
        assert rest is not None
        rest.backward()
        del rest
        assert not any(ref() is not None for ref in watched)
    finally:
        gc.enable()


def test_a_head_that_makes_its_gradients_in_the_forward(folder: Callable[[str], Path]) -> None:
    policy = load_policy(folder("llava"), device="cpu", dtype=torch.float64)
    groups, kept = groups_of(policy), KeptPrompts()
    batch = pack_row(groups)

    def loss(hidden: Tensor) -> Tensor:
        advantage = torch.linspace(-1, 1, len(batch.completions), dtype=torch.float64)
        weight = torch.full((len(batch.targets),), 0.1, dtype=torch.float64)
        head = policy.head_weight
        return linear_policy_loss(
            hidden, head, batch.targets, advantage, batch.completion_of_token, weight=weight
        ).loss  # fmt: skip

    loss(policy.hidden(batch)).backward()
    want = gradients(policy)
    policy.core.zero_grad()
    Generator(policy).generate([g.prompt for g in groups], SAMPLING, torch.Generator(), keep=kept)
    loss(policy.hidden(batch, kept=kept.of(g.prompt for g in groups))).backward()
    rest = kept.rest()
    assert rest is not None
    rest.backward()
    nothing = torch.zeros(1)
    assert_same((nothing, gradients(policy)), (nothing, want), torch.float64)


def test_the_update_computes_neither_pictures_nor_prompts(folder: Callable[[str], Path]) -> None:
    """Counted: what is saved is a forward of the tower, of the prompts, and of each answer's last token."""
    policy = load_policy(folder("qwen2_5_vl"), device="cpu")
    groups, kept = groups_of(policy)[:3], KeptPrompts()
    batch = pack_row(groups)
    Generator(policy).generate([g.prompt for g in groups], SAMPLING, torch.Generator(), keep=kept)

    def flops(run: Callable[[], object]) -> int:
        with flop_counter() as counter:
            run()
        return counter.get_total_flops()

    full = flops(lambda: policy.hidden(batch))
    answers = flops(lambda: policy.hidden(batch, kept=kept.of(g.prompt for g in groups)))
    tower = flops(lambda: policy.features(batch.images))
    tokens = sum(len(g.prompt.token_ids) for g in groups)
    rows = batch.segments.answers.length
    linear = sum(p.numel() for n, p in policy.parts.language.named_parameters() if p.ndim == 2 and "embed" not in n)
    assert rows == sum(max(len(c.token_ids) - 1, 0) for g in groups for c in g.completions)
    assert answers < full - tower - 2 * tokens * linear
    assert 2 * rows * linear <= answers < 1.5 * 2 * rows * linear


def test_what_cannot_be_kept_is_named(folder: Callable[[str], Path]) -> None:
    policy = load_policy(folder("qwen2_5_vl"), device="cpu")
    assert obstacle(policy.core) is None
    groups = groups_of(policy)
    with pytest.raises(ValueError, match="expected one for each of 5 groups, got 0"):
        answer_states(policy.core, pack_row(groups), [])
    text = policy.core.config.get_text_config()
    text.layer_types = ["full_attention", "linear_attention"]
    assert "linear_attention" in str(obstacle(policy.core))
    text.layer_types = ["full_attention"] * 2
    text.attention_dropout = 0.1
    assert "dropout" in str(obstacle(policy.core))
    text.attention_dropout = 0.0
    policy.core.add_module("drop", torch.nn.Dropout(0.1))
    assert "dropout" in str(obstacle(policy.core))
    use_checkpointing(policy.core)  # does not matter
    policy.core.drop.p = 0.0
    assert obstacle(policy.core) is None
