"""The plan's bytes against allocations counted in a real training step and a real rollout on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastrl.batch import PackedBatch, Prompt
from fastrl.engine.local import LocalEngine
from fastrl.models import load_policy
from fastrl.models.checkpointing import Kind
from fastrl.models.families import family_of
from fastrl.models.flops import flop_counter
from fastrl.plan.estimate import count_model, memory_of, rollout_bytes
from fastrl.plan.trace import RolloutTrace, Trace, meta_model, trace_batch, trace_rollout
from fastrl.plan.workload import Workload, packed
from fastrl.recipe import LoraRecipe, ModelRecipe, load_recipe
from fastrl.rollout import Generator, Sampling
from fastrl.rollout.limits import Limits
from tests.fastrl.conftest import build_config, build_folder, build_tokenizer
from tests.helpers.families import BUILDS, build_family
from tests.helpers.planned import counted_peak, measured_and_planned

WITHIN = 0.10


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Models whose layers take more memory than index tables."""
    made: dict[str, Path] = {}

    def folder(style: str) -> Path:
        if style not in made:
            size = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 3000}
            size["num_attention_heads"] = 8
            made[style] = build_folder(tmp_path_factory.mktemp(style), style, **size)
        return made[style]

    return folder


FAMILY = family_of(build_config("qwen2_5", build_tokenizer()))


def filled(text: int, side: int, answers: list[tuple[int, ...]]) -> PackedBatch:
    """The batch that ``packed`` describes, with pixels: one image of side x side patches in each prompt."""
    batch = packed(FAMILY, text, [FAMILY.blank((14 * side) ** 2)] * int(side > 0), answers)
    pixels = [replace(image, pixel_values=torch.rand(side * side, 3 * 2 * 14 * 14)) for image in batch.images]
    return replace(batch, images=tuple(pixels))


SHAPES = {
    "image, short answers": (40, 12, [(16,) * 8]),
    "text, two groups": (120, 0, [(40,) * 4, (40,) * 4]),
    "large image": (30, 28, [(24,) * 4]),
    "ragged answers": (64, 8, [(100, 3, 60, 7), (9, 80)]),
}


CASES = [
    *[("qwen2_5", checkpointing, lora, s) for checkpointing in (False, True) for lora in (False, True) for s in SHAPES],
    *[("qwen2", checkpointing, False, "large image") for checkpointing in (False, True)],
    *[("qwen2_5", "products", lora, "ragged answers") for lora in (False, True)],
]


@pytest.mark.parametrize(("style", "checkpointing", "lora", "shape"), CASES)
def test_a_training_step(
    folders: Callable[[str], Path], style: str, checkpointing: Kind, lora: bool, shape: str
) -> None:
    spec = LoraRecipe(rank=8) if lora else None  # type: ignore[call-arg]
    batch = filled(*SHAPES[shape])
    counted, planned = measured_and_planned(
        folders(style), batch, dtype=torch.float32, checkpointing=checkpointing, lora=spec
    )
    assert planned == pytest.approx(counted, rel=WITHIN)


@pytest.mark.parametrize("shape", ["text, two groups", "ragged answers"])
@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.gate)])
def test_a_training_step_with_a_row_local_head(folders: Callable[[str], Path], lora: bool, shape: str) -> None:
    spec = LoraRecipe(rank=8) if lora else None  # type: ignore[call-arg]
    counted, planned = measured_and_planned(
        folders("qwen2_5"), filled(*SHAPES[shape]), dtype=torch.float32, checkpointing=True, lora=spec, row_local=True
    )
    assert planned == pytest.approx(counted, rel=WITHIN)


@pytest.mark.gate
@pytest.mark.parametrize(("dtype", "passes"), [(torch.float32, 2), (torch.bfloat16, 1)])
def test_accumulated_gradients_and_float32_copies(
    folders: Callable[[str], Path], dtype: torch.dtype, passes: int
) -> None:
    batch = filled(*SHAPES["ragged answers"])
    counted, planned = measured_and_planned(
        folders("qwen2_5"), batch, dtype=dtype, checkpointing=True, lora=None, passes=passes
    )
    assert planned == pytest.approx(counted, rel=WITHIN)


@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_the_parts_add_up_to_what_lives_between_steps(folders: Callable[[str], Path], states: str) -> None:
    """Weights, float32 copies and moments, as the engine holds them."""
    folder = folders("qwen2_5")
    policy = load_policy(folder, device="cpu", dtype=torch.bfloat16)
    changes = {"model.freeze": [], "model.path": str(folder), "optim.states": states}
    recipe = load_recipe("perception-r1-counting-tiny", changes)
    engine = LocalEngine(policy.model, recipe.optim)
    engine.backward(policy.logprob(filled(*SHAPES["image, short answers"])).logp.mean())
    engine.step()
    memory = memory_of(recipe, count_model(policy.core), WORK, Trace(0, 0, 0, 0, 0, 0), RolloutTrace())
    copies = sum(t.numel() * t.element_size() for t in engine._masters.values())
    held = [value for state in engine._optimizers[0].state.values() for value in state.values() if value.ndim]
    weights = sum(p.numel() * p.element_size() for p in policy.core.parameters())
    assert (memory.weights, memory.copies) == (weights, copies)
    assert memory.moments == pytest.approx(sum(v.numel() * v.element_size() for v in held), rel=0.01)


WORK = Workload(
    prompts=4,
    group=8,
    answer_tokens=120,
    text_tokens=60,
    images=1,
    family=FAMILY,
    image=FAMILY.blank(224 * 224),
    token_budget=4096,
    sampling=Sampling(n=8, max_new_tokens=120),
)


@pytest.mark.parametrize(
    ("side", "answer_tokens"), [(16, 12), (4, 90)], ids=["prompts are the most", "answers are the most"]
)
def test_a_rollout(folders: Callable[[str], Path], side: int, answer_tokens: int) -> None:
    folder, work = folders("qwen2_5"), replace(WORK, image=FAMILY.blank((14 * side) ** 2), answer_tokens=answer_tokens)
    policy = load_policy(folder, device="cpu")
    policy.eos_token_ids = (10**6,)  # no answer ends early
    ids, slots, positions = FAMILY.lay_out(torch.tensor([FAMILY.image_token, *[0] * work.text_tokens]), [work.image])
    images = [replace(work.image, pixel_values=torch.rand(side * side, 1176), key=str(i)) for i in range(work.prompts)]
    prompts = [Prompt(ids, positions, (image,), slots) for image in images]
    sampling = Sampling(n=work.group, max_new_tokens=answer_tokens, temperature=1.0)
    counted = counted_peak(lambda: Generator(policy).generate(prompts, sampling, torch.Generator()))
    recipe = ModelRecipe(path=str(folder))  # type: ignore[call-arg]
    core = meta_model(json.loads((folder / "config.json").read_text()), recipe, torch.float32)
    traced = trace_rollout(core, work.chunk(), limits=work.limits, sampling=sampling, gpu=False)
    assert rollout_bytes(work, traced) == pytest.approx(counted, rel=WITHIN)


def test_a_later_chunk_is_read_beside_the_answers_buffers_that_its_graphs_use() -> None:
    """At most a block of keys for each answer; nothing where all prompts are answered at once."""
    traced = replace(RolloutTrace(), token=1000, language=10**9)  # prefill is the peak
    assert WORK.sampling is not None
    for limit, held in ((8, 8 * 119), (16, 16 * 119), (32, 0)):
        work = replace(WORK, limits=Limits(max_rows=limit))
        more = rollout_bytes(work, traced, graph=True) - rollout_bytes(work, traced)
        assert more == 1000 * held
    long = replace(WORK, limits=Limits(max_rows=8), answer_tokens=2000)
    assert rollout_bytes(long, traced, graph=True) - rollout_bytes(long, traced) == 1000 * 8 * 256


FAMILIES = [pytest.param(name, marks=[] if name == "qwen3_vl_moe" else pytest.mark.gate) for name in sorted(BUILDS)]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_rollout_of_every_family(tmp_path: Path, model_type: str) -> None:
    """Bytes of the whole rollout, and the FLOPs of its prefill: with experts, those of the active ones."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "vocab_size": 3000}
    sizes["num_attention_heads"] = 8
    policy = load_policy(build_family(tmp_path, model_type, **sizes), device="cpu")
    policy.eos_token_ids = (10**6,)
    family, sampling = policy.family, Sampling(n=8, max_new_tokens=12)
    work = replace(WORK, family=family, image=family.blank(224 * 224), answer_tokens=12, sampling=sampling)
    core = meta_model(json.loads((tmp_path / "config.json").read_text()), ModelRecipe(path=""), torch.float32)  # type: ignore[call-arg]
    traced = trace_rollout(core, work.chunk(), limits=work.limits, sampling=sampling, gpu=False)
    prompts = [
        replace(p, images=tuple(replace(i, pixel_values=torch.rand(i.pixel_values.shape)) for i in p.images))
        for p in work.chunk()
    ]
    counted = counted_peak(lambda: Generator(policy).generate(prompts, sampling, torch.Generator()))
    assert rollout_bytes(work, traced) == pytest.approx(counted, rel=0.02)
    flops = []
    images = [image for prompt in prompts for image in prompt.images]
    for run in (lambda: Generator(policy).session(prompts), lambda: policy.features(images)):
        with torch.no_grad(), flop_counter() as counter:
            run()
        flops.append(counter.get_total_flops())
    length = work.prompt_tokens
    planned = work.prompts * length * (traced.token_flops + length * traced.pair_flops)
    assert planned == pytest.approx(flops[0] - flops[1], rel=1e-12)


EXPERTS = {
    "qwen3_vl_moe": ("num_experts", "num_experts_per_tok", 3),
    "qwen3_5_moe": ("num_experts", "num_experts_per_tok", 3),
    "glm4v_moe": ("n_routed_experts", "num_experts_per_tok", 1),  # the first of its two layers is dense
}


@pytest.mark.parametrize("model_type", list(EXPERTS))
def test_a_token_costs_the_experts_it_goes_to(model_type: str) -> None:
    count, chosen, layers = EXPERTS[model_type]

    def traced(experts: int, active: int) -> RolloutTrace:
        build = BUILDS[model_type]
        config = build.config(build.tokenizer(), **{count: experts, chosen: active}).to_dict()
        core = meta_model(config, ModelRecipe(path=""), torch.bfloat16)  # type: ignore[call-arg]
        family, sampling = family_of(config), Sampling(n=2, max_new_tokens=4)
        work = replace(WORK, prompts=2, group=2, family=family, image=family.blank(56 * 56), sampling=sampling)
        return trace_rollout(core, work.chunk(), limits=work.limits, sampling=sampling, gpu=True)

    few, many, wide = traced(4, 2), traced(8, 2), traced(4, 4)
    hidden, inner = 64, 48
    assert many.token_flops - few.token_flops == layers * 2 * hidden * 4  # only the router
    assert wide.token_flops - few.token_flops == layers * 2 * 2 * 3 * hidden * inner


@pytest.mark.parametrize("checkpointing", [False, True, "products"])
def test_flops_are_those_of_the_real_pass(folders: Callable[[str], Path], checkpointing: Kind) -> None:
    folder = folders("qwen2_5")
    policy = load_policy(folder, device="cpu", gradient_checkpointing=checkpointing)
    batch = filled(*SHAPES["ragged answers"])
    with flop_counter() as counter:
        policy.logprob(batch).logp.mean().backward()
    recipe = ModelRecipe(path="", gradient_checkpointing=checkpointing)  # type: ignore[call-arg]
    core = meta_model(json.loads((folder / "config.json").read_text()), recipe, torch.float32)
    for gpu in (False, True):  # padded blocks of answers on a CPU, none on a GPU
        traced = trace_batch(core, batch, gpu=gpu)
        planned = traced.vision_flops + traced.forward_flops + traced.backward_flops
        assert planned == counter.get_total_flops() if not gpu else 0.9 < planned / counter.get_total_flops() <= 1
