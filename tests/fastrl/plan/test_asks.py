"""The plan asks the owners: if the owner of a size changes, the plan changes; the plan itself has no such numbers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastrl.data
import fastrl.plan
from fastrl.engine import optimizers
from fastrl.methods import PerceptionR1
from fastrl.models.families import VisionFeatures
from fastrl.models.families.qwen2_vl import Qwen2_5VL
from fastrl.plan import gpu_named, make_plan
from fastrl.plan.configs import config_of
from fastrl.plan.estimate import Plan
from fastrl.plan.ledger import Ledger
from fastrl.plan.trace import RolloutTrace, meta_model, trace_rollout
from fastrl.plan.workload import workload_of
from fastrl.recipe import Recipe, load_recipe
from fastrl.rollout import cache, sampler
from fastrl.rollout.limits import Limits
from fastrl_kernels import _counting, _linear_logprob_driver
from fastrl_kernels._counting import Scratch

PLAN = Path(fastrl.plan.__file__).parent
SMALL = [
    *("model.freeze=[vision, projector]", "model.max_pixels=20000", "optim.states=8bit"),
    *("data.prompts_per_step=4", "rollout.group_size=4", "rollout.max_new_tokens=16", "optim.token_budget=100000"),
    "rollout.keep_prompts=off",
]


def plan(*changes: str) -> Plan:
    return make_plan(load_recipe("perception-r1-counting-tiny", [*SMALL, *changes]), gpu_named("l4"))


@pytest.fixture(scope="module")
def whole() -> Plan:
    return plan()


# One owner's code changed in each case


def keys_in_float32(patch: pytest.MonkeyPatch) -> None:
    buffers = cache.PromptCache.buffers
    patch.setattr(cache.PromptCache, "buffers", lambda self, layer, like: buffers(self, layer, like.float()))


def a_scale_for_every_8(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(optimizers, "BLOCK", 8)


def tiles_twice(patch: pytest.MonkeyPatch) -> None:
    size = _linear_logprob_driver.Plan.bytes
    patch.setattr(_linear_logprob_driver.Plan, "bytes", lambda self, *args: 2 * size(self, *args))


def features_of_four_depths(patch: pytest.MonkeyPatch) -> None:
    features = Qwen2_5VL.features

    def deep(self: Any, core: Any, images: Any) -> list[VisionFeatures]:
        return [VisionFeatures(f.tokens, (f.tokens, f.tokens, f.tokens)) for f in features(self, core, images)]

    patch.setattr(Qwen2_5VL, "features", deep)


def a_reference_without_a_penalty(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PerceptionR1, "reads_reference", classmethod(lambda cls, options: True))


def drawing_keeps_its_weights(patch: pytest.MonkeyPatch) -> None:
    draw, kept = sampler._draw, []

    def keep(weight: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        kept.append(weight.double())
        return draw(weight, uniform)

    patch.setattr(sampler, "_draw", keep)


def test_the_plan_moves_with_its_owners(whole: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's dtype, the moments' blocks, the head's tiles, a family's features, a method's reference, the
    sampler."""
    for change in (
        *(keys_in_float32, a_scale_for_every_8, tiles_twice, features_of_four_depths),
        *(a_reference_without_a_penalty, drawing_keeps_its_weights),
    ):
        change(monkeypatch)
    changed = plan()
    before, after = whole.memory, changed.memory
    assert after.kv_cache == 2 * before.kv_cache
    assert after.moments == pytest.approx(3 / 2.03125 * before.moments)
    assert after.head_scratch == 2 * before.head_scratch
    assert after.features == 4 * before.features
    assert (before.reference, after.reference) == (0, 2 * whole.model.trainable)
    assert (whole.work.flops["reference"], changed.work.flops["reference"]) == (0, whole.work.flops["forward"])
    assert after.pool == before.pool + 8 * 4 * 4 * whole.model.vocabulary


def test_one_call_of_the_generator_is_what_is_traced(whole: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything it processes at once."""
    recipe, work = whole.recipe, whole.workload
    core = meta_model(config_of(recipe.model.path), recipe.model, torch.bfloat16)

    def traced() -> RolloutTrace:
        assert work.sampling is not None
        return trace_rollout(core, work.chunk(), limits=work.limits, sampling=work.sampling, gpu=True)

    before = traced()
    with monkeypatch.context() as patch:
        patch.setattr(Limits, "prefill_calls", lambda self, lengths: iter([[0]]))
        assert traced().language == pytest.approx(before.language / 4, rel=0.05)
    with monkeypatch.context() as patch:
        patch.setattr(Limits, "vision_calls", lambda self, patches: iter([[i] for i in range(len(patches))]))
        assert traced().vision < 0.4 * before.vision
    with monkeypatch.context() as patch:
        patch.setattr(Limits, "chunks", lambda self, lengths, rows: [[0, 1], [2, 3]])
        assert (work.prompts_at_once, traced().drawing) == (2, before.drawing // 2)
    few = replace(work, limits=Limits(max_rows=1, prefill_tokens=1, vision_patches=1))
    assert (few.prompts_at_once, len(few.chunk())) == (1, 1)


def test_what_an_adapter_brings_is_its_own_fact(whole: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastrl.data.ADAPTERS, "_entries", dict(fastrl.data.ADAPTERS._entries))
    fastrl.data.register("plain-rows", lambda path, query: [])
    fastrl.data.register("listed-rows", lambda path, query: [], brings="answers")

    def samples(recipe: Recipe) -> bool:
        return workload_of(recipe, whole.workload.family, image_limit=None).samples

    for spec, brought in (("plain-rows:x", None), ("listed-rows:x", "answers"), ("my.py:rows:x", None)):
        assert fastrl.data.brings(spec) == brought
        assert samples(load_recipe("perception-r1-counting-tiny", {"data.spec": spec})) == (brought is None)
    for other, sampled in (("listed-rows:y", False), ("plain-rows:y", True)):
        mix = [{"spec": "listed-rows:x"}, {"spec": other}]
        mixed = load_recipe("perception-r1-counting-tiny", {"data.spec": None, "data.mix": mix})
        assert samples(mixed) == sampled


# Operators, by argument name


@pytest.fixture
def permuted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An operator with the arguments of the head's forward in reverse order."""
    op = torch.ops.fastrl.linear_logprob
    told = [argument.name for argument in op.default._schema.arguments]
    monkeypatch.setattr(_counting, "_SCRATCH", dict(_counting._SCRATCH))
    with torch.library._scoped_library("plan_test", "FRAGMENT") as library:
        schema = str(op.default._schema).split("(", 1)[1]
        arguments, results = schema.split(") -> ")
        given = [argument.split("=")[0] for argument in arguments.split(", ")]  # a default may not stand before others
        library.define(f"permuted({', '.join(reversed(given))}) -> {results}")
        library.impl("permuted", lambda *args: op(**dict(zip(reversed(told), args, strict=True))), "Meta")
        made = torch.ops.plan_test.permuted
        _counting.scratch_of(made)(_counting._SCRATCH[op])
        yield made


def test_an_operators_arguments_may_change_places(permuted: Any) -> None:
    """The bytes that the ledger adds for a call do not depend on the order of arguments."""
    op = torch.ops.fastrl.linear_logprob
    hidden, weight, target = (torch.empty(n, device="meta") for n in ((300, 32), (999, 32), (300,)))
    args = (hidden, weight, target.long(), *(None,) * 5, 1.0, 1.0, None, -100, True, False, 1 << 30, None, False)
    peaks = []
    for called, given in ((op.default, args), (permuted.default, args[::-1])):
        with Ledger([hidden, weight], gpu=True) as ledger:
            called(*given)
        peaks.append((ledger.peak, ledger.head_scratch))
    assert peaks[0] == peaks[1]
    assert peaks[0][1] > 2 * 300 * 999


def test_scratch_beside_a_budget_counts_at_the_peak_alone(permuted: Any) -> None:
    _counting.scratch_of(permuted)(lambda **_: Scratch(bounded=100, beside=10**9))
    hidden = torch.empty(3, 4, device="meta")
    args = (hidden, torch.empty(5, 4, device="meta"), torch.empty(3, dtype=torch.int64, device="meta"))
    with Ledger([hidden, args[1]], gpu=True) as ledger:
        permuted.default(False, None, 1 << 30, False, False, -100, None, 1.0, 1.0, *[None] * 5, *args[::-1])
    assert ledger.head_scratch == 100
    assert 10**9 < ledger.peak < 1.001 * 10**9


# No copied numbers

ASSUMED = {"EFFICIENCY", "TEXT_TOKENS", "DIALOGUE_TOKENS", "DEFAULT_PIXELS"}  # about a step, stated in docs/memory.md
PLAIN = {0, 1, 2}  # first, last and middle elements, and halves


def numbers(path: Path) -> list[tuple[int, float]]:
    """(line, number) of all numbers in a file except those of named assumptions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id in ASSUMED for t in node.targets)
    ]
    skipped = {id(inner) for value in named for inner in ast.walk(value)}
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and type(node.value) in (int, float)
        and id(node) not in skipped
        and node.value not in PLAIN
    ]


@pytest.mark.parametrize("name", ["estimate", "trace", "workload", "configs", "quantized"])
def test_no_number_of_another_room_stands_in_the_plan(name: str) -> None:
    assert numbers(PLAN / f"{name}.py") == []


def test_the_ledgers_only_number_is_of_the_attention_it_stands_in_for() -> None:
    """Five matrix products in the backward for two in the forward, as torch counts its own attention."""
    assert [value for _, value in numbers(PLAN / "ledger.py")] == [5]


def test_the_plan_reads_no_operators_arguments_by_place() -> None:
    """Except ``F.scaled_dot_product_attention``, a function whose first argument is the query."""
    source = (PLAN / "ledger.py").read_text(encoding="utf-8")
    read = [
        ast.get_source_segment(source, node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "args"
    ]
    assert set(read) == {"args[0]"}
    assert source.count("args[0].is_meta") == len(read)
