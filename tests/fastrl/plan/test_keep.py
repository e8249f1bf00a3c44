"""Prompts kept from rollout to update: bytes planned and counted, work saved, and when a run keeps them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.versus.model import build_folder as build_small
from fastrl.batch import PromptGroup, pack_row
from fastrl.models import load_policy
from fastrl.models.families import family_of
from fastrl.models.kept import KeptPrompts
from fastrl.plan import advise, gpu_named, make_plan, plan_text, plan_values
from fastrl.plan.estimate import Plan, memory_of, room_of
from fastrl.plan.estimate import count_model as sizes_of
from fastrl.plan.hardware import GIB, Gpu
from fastrl.plan.keep import decide_keep
from fastrl.plan.running import choose_keep, memory_bytes
from fastrl.plan.trace import RolloutTrace, meta_model, trace_batch, trace_kept, trace_prompt, trace_rollout
from fastrl.plan.workload import Workload, blank_groups
from fastrl.recipe import LoraRecipe, ModelRecipe, RecipeError, load_recipe
from fastrl.rollout import Generator, Sampling
from tests.fastrl.conftest import build_config, build_folder, build_tokenizer
from tests.helpers.planned import counted_peak

FAMILY = family_of(build_config("qwen2_5", build_tokenizer()))
WITHIN = 0.10
GIVEN = {"model.freeze": [], "optim.token_budget": 800}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which a layer weighs more than an index table."""
    size = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 3000}
    return build_folder(tmp_path_factory.mktemp("model"), "qwen2_5", num_attention_heads=8, **size)


def work_of(answer_tokens: int, side: int = 16) -> Workload:
    return Workload(
        prompts=4,
        group=8,
        answer_tokens=answer_tokens,
        text_tokens=60,
        images=1,
        family=FAMILY,
        image=FAMILY.blank((14 * side) ** 2),
        token_budget=600,
        sampling=Sampling(n=8, max_new_tokens=answer_tokens),
    )


def filled(groups: list[PromptGroup]) -> list[PromptGroup]:
    """The same with pixels."""

    def prompt(group: PromptGroup) -> Any:
        images = tuple(replace(i, pixel_values=torch.rand(i.pixel_values.shape)) for i in group.prompt.images)
        return replace(group.prompt, images=images)

    return [PromptGroup(prompt(group), group.completions) for group in groups]


OPTIONS = [
    {},
    *(
        pytest.param(options, marks=pytest.mark.gate)
        for options in ({"gradient_checkpointing": True}, {"lora": True}, {"freeze": ["vision", "projector"]})
    ),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("phase", ["update", "rollout"])
def test_bytes_of_a_real_step(folder: Path, options: dict[str, Any], phase: str) -> None:
    options = {k: LoraRecipe(rank=8) if k == "lora" else v for k, v in options.items()}  # type: ignore[call-arg]
    loading: dict[str, Any] = {k: v.spec() if isinstance(v, LoraRecipe) else v for k, v in options.items()}
    work = work_of(16 if phase == "update" else 90)
    sizes = [(work.answer_tokens,) * work.group] * work.prompts
    groups = filled(blank_groups(FAMILY, work.text_tokens, [work.image], sizes))
    policy = load_policy(folder, device="cpu", **loading)
    policy.eos_token_ids = (10**6,)
    sampling = work.sampling if phase == "rollout" else Sampling(n=8, max_new_tokens=1)
    assert sampling is not None
    features: Any = None if policy.trains_vision else {}

    def step() -> Any:
        kept = KeptPrompts()
        generator = Generator(policy, decode="eager", features=features)
        generator.generate([g.prompt for g in groups], sampling, torch.Generator(), keep=kept)
        if phase == "rollout":
            return kept
        for some in (groups[:2], groups[2:]):
            policy.logprob(pack_row(some), kept=kept.of(g.prompt for g in some)).logp.mean().backward()
        rest = kept.rest()
        assert rest is not None
        rest.backward()
        return None

    counted = counted_peak(step)
    recipe = load_recipe("perception-r1-counting-tiny", {**GIVEN, "model.path": str(folder)})
    recipe = recipe.model_copy(update={"model": ModelRecipe(path=str(folder), **options)})
    core = meta_model(json.loads((folder / "config.json").read_text()), recipe.model, torch.float32)
    blank = blank_groups(FAMILY, work.text_tokens, [work.image], sizes)
    traced = trace_kept(core, blank[:2], gpu=False, accumulates=True)
    chunk = trace_rollout(core, work.chunk(), limits=work.limits, sampling=sampling, gpu=False)
    memory = memory_of(recipe, sizes_of(core), work, traced, chunk, gpu=False)
    state = memory.weights + memory.moments + memory.reference
    planned = (memory.update if phase == "update" else memory.rollout) - state
    assert planned == pytest.approx(counted, rel=WITHIN)
    assert memory.prompts > 0


def test_a_prompt_alone_weighs_what_it_does_in_the_step(folder: Path) -> None:
    work = work_of(16)
    core = meta_model(json.loads((folder / "config.json").read_text()), ModelRecipe(path=""), torch.float32)  # type: ignore[call-arg]
    groups = work.full_groups()
    assert trace_prompt(core, work.prompt(), gpu=True) == trace_kept(core, groups, gpu=True).prompt


def small(*changes: str, **more: Any) -> Any:
    return load_recipe("perception-r1-counting-tiny", {**GIVEN, **dict(c.split("=") for c in changes), **more})


# Text, pixels, answer tokens and prompts of a step; each with 8 answers a prompt
GOALS = {"300/24/8x2": (44, 448 * 448, 24, 2), "1000/64/8": (39, 868 * 868, 64, 1)}


def goal(model: str, keep: str, shape: tuple[int, int, int, int], **more: Any) -> Plan:
    text, pixels, answer, prompts = shape
    keys = {"model.path": model, "model.freeze": [], "model.max_pixels": None, "method.beta": 0.0}
    keys |= {"rollout.max_new_tokens": answer, "rollout.group_size": 8, "data.prompts_per_step": prompts}
    keys |= {"rollout.keep_prompts": keep, "optim.token_budget": 1, **more}
    recipe = load_recipe("perception-r1-counting-tiny", keys)
    return make_plan(recipe, gpu_named("h200"), sizes={"text_tokens": text, "image_pixels": pixels})


@pytest.mark.parametrize("shape", GOALS.values(), ids=GOALS.keys())
@pytest.mark.parametrize("model", ["small", pytest.param("Qwen/Qwen2.5-VL-3B-Instruct", marks=pytest.mark.gate)])
def test_a_whole_step_takes_at_most_83_percent(tmp_path: Path, model: str, shape: tuple[int, int, int, int]) -> None:
    """Counted FLOPs, rollout included, against a step that computes prompts again; ``small``: the model of the
    benchmarks against other trainers."""
    path = str(build_small(model, tmp_path / model, torch.device("cpu"))) if model == "small" else model
    off, on = (goal(path, keep, shape).work.flops for keep in ("off", "on"))
    assert sum(on.values()) <= 0.83 * sum(off.values())
    assert on["vision"] == off["vision"]
    assert on["prefill"] == off["prefill"]
    assert off["forward"] - on["forward"] >= off["vision"] + 0.99 * off["prefill"]


def test_a_reference_still_computes_all(folder: Path) -> None:
    off, on = (
        goal(str(folder), keep, GOALS["300/24/8x2"], **{"method.beta": 0.04}).work.flops for keep in ("off", "on")
    )
    assert on["reference"] == off["reference"] > on["forward"]


@pytest.fixture
def short_prompts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` judges the small models' prompts as if they were long."""
    monkeypatch.setattr("fastrl.plan.keep.FEWEST_TOKENS", 1)


def test_auto_leaves_short_prompts_to_be_read_together(folder: Path) -> None:
    recipe = small(**{"model.path": str(folder)})
    core = meta_model(json.loads((folder / "config.json").read_text()), recipe.model, torch.float32)
    work = work_of(16)
    short, long = (replace(work, text_tokens=n + work.text_tokens - work.prompt_tokens) for n in (255, 256))
    assert (short.prompt_tokens, long.prompt_tokens) == (255, 256)
    found = decide_keep(recipe, core, short, 1e12, gpu=True)
    assert not found.on
    assert "prompts of 255 tokens, as planned, are read faster together" in found.note
    assert decide_keep(recipe, core, long, 1e12, gpu=True).on
    forced = small(**{"model.path": str(folder), "rollout.keep_prompts": "on"})
    assert decide_keep(forced, core, short, 1e12, gpu=True).on


@pytest.mark.usefixtures("short_prompts_too")
def test_auto_keeps_what_takes_at_most_half_of_the_room(folder: Path) -> None:
    recipe = small(**{"model.path": str(folder)})
    core = meta_model(json.loads((folder / "config.json").read_text()), recipe.model, torch.float32)
    work = work_of(16)
    needed = work.prompts * trace_prompt(core, work.prompt(), gpu=True)
    found = decide_keep(recipe, core, work, 2 * needed, gpu=True)
    assert found.on
    assert "once per step" in found.note
    found = decide_keep(recipe, core, work, 2 * needed - 8, gpu=True)
    assert not found.on
    assert "more than half" in found.note
    forced = small(**{"model.path": str(folder), "rollout.keep_prompts": "on"})
    assert decide_keep(forced, core, work, 0, gpu=True).on
    assert not decide_keep(small("rollout.keep_prompts=off"), core, work, 1e12, gpu=True).on
    core.config.get_text_config().layer_types = ["linear_attention"]
    assert "linear_attention" in decide_keep(recipe, core, work, 1e12, gpu=True).reason
    with pytest.raises(ValueError, match=r"rollout\.keep_prompts: on .* linear_attention"):
        decide_keep(forced, core, work, 1e12, gpu=True)


OBSTACLES = {
    "optim.updates_per_batch is above 1": {"optim.updates_per_batch": 2},
    "rollout.backend: vllm": {"rollout.backend": "vllm", "rollout.server": "http://localhost:8000"},
    "engine.kind: deepspeed": {"engine.kind": "deepspeed"},
    "optim.gradient_release": {"optim.gradient_release": True, "optim.clip_norm": None},
    "model.lora.dropout": {"model.lora": {"rank": 4, "dropout": 0.1}},
}


@pytest.mark.parametrize(("reason", "keys"), OBSTACLES.items(), ids=OBSTACLES.keys())
def test_where_the_update_would_not_be_exact_it_is_off_and_says_why(reason: str, keys: dict[str, Any]) -> None:
    recipe = small(**keys)
    assert reason in str(recipe.keep_obstacle)
    found = decide_keep(recipe, None, work_of(16), 1e12, gpu=True)
    assert found == (False, recipe.keep_obstacle)
    with pytest.raises(RecipeError, match=reason.split(":")[0]):
        small(**keys, **{"rollout.keep_prompts": "on"})


@pytest.mark.parametrize("name", ["perpo-grounding-tiny", "reper-caption-tiny", "utr-tiny", "utr-grpo-tiny"])
def test_methods_say_themselves_whether_they_train_on_what_they_sampled(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.keep_obstacle is None) == (recipe.method.kind == "perception-r1")
    if recipe.method.kind != "perception-r1":
        assert f"method.kind: {recipe.method.kind}" in str(recipe.keep_obstacle)


def test_the_switch_is_read_as_yaml_reads_it() -> None:
    found = [small(**{"rollout.keep_prompts": value}).rollout.keep_prompts for value in (True, False, "auto", "on")]
    assert found == ["on", "off", "auto", "on"]
    with pytest.raises(RecipeError, match="keep_prompts"):
        small(**{"rollout.keep_prompts": "maybe"})


@pytest.mark.usefixtures("short_prompts_too")
def test_a_run_decides_by_all_memory_of_its_device(folder: Path) -> None:
    policy = load_policy(folder, device="cpu")
    recipe = small(**{"model.path": str(folder)})
    found = choose_keep(recipe, policy)
    assert found.on
    assert found == choose_keep(recipe, policy)
    assert memory_bytes(torch.device("cpu")) > 2**28
    core = meta_model(json.loads((folder / "config.json").read_text()), recipe.model, torch.float32)
    work = work_of(16)
    assert (
        room_of(recipe, core, work, 1e12)
        == 1e12
        - memory_of(
            recipe, sizes_of(core), work, trace_batch(core, pack_row(work.full_groups()), gpu=True), RolloutTrace()
        ).optimizer
    )


@pytest.mark.usefixtures("short_prompts_too")
def test_a_plan_says_which_it_is(folder: Path) -> None:
    keys = {"model.path": str(folder), "rollout.max_new_tokens": 16, "data.prompts_per_step": 2}
    on, off = (make_plan(small(**keys, **{"rollout.keep_prompts": k}), gpu_named("l4")) for k in ("auto", "off"))
    assert plan_values(on, [])["keep_prompts"]["on"] is True
    assert plan_values(off, [])["keep_prompts"] == {"on": False, "reason": "rollout.keep_prompts: off"}
    assert "prompts kept from rollout to update" in plan_text(on, [])
    assert "prompts are computed twice per step: rollout.keep_prompts: off" in plan_text(off, [])
    assert on.memory.rollout > off.memory.rollout


def test_a_plan_that_does_not_fit_drops_what_is_kept_first(folder: Path) -> None:
    keys = {
        "model.path": str(folder),
        "rollout.max_new_tokens": 16,
        "data.prompts_per_step": 4,
        "optim.token_budget": 1,
    }
    on, off = (small(**{**keys, "rollout.keep_prompts": keep}) for keep in ("on", "off"))
    gpu = gpu_named("l4")
    wanted = (make_plan(on, gpu).memory.peak + make_plan(off, gpu).memory.peak) / 2
    plan = make_plan(on, Gpu("toy", memory=(wanted + GIB) / 0.96, bandwidth=1e12, flops=1e14))
    assert not plan.fits
    (change,) = advise(plan)
    assert change.keys == {"rollout.keep_prompts": "off"}
    assert change.plan.fits
