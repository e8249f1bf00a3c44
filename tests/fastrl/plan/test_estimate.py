"""``fastrl plan``: verdicts on shipped recipes, models from a config alone, suggested changes, and invalid input."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.cli.main import main
from fastrl.models.families import family_of, published
from fastrl.plan import advise, estimate, gpu_named, make_plan, plan_text, plan_values
from fastrl.plan.configs import config_of
from fastrl.plan.hardware import GIB, Gpu
from fastrl.plan.recompute import checkpointing_choices
from fastrl.plan.trace import RolloutTrace, meta_model, trace_rollout
from fastrl.plan.workload import workload_of
from fastrl.recipe import ModelRecipe, load_recipe, shipped_recipes

# Parameters in billions, from the models' cards or the sizes of their files.
STATED = {
    "Qwen/Qwen2-VL-2B-Instruct": 2.21,
    "Qwen/Qwen2-VL-7B-Instruct": 8.29,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3.75,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8.29,
    "Qwen/Qwen2.5-VL-32B-Instruct": 33.45,
    "Qwen/Qwen3-VL-2B-Instruct": 2.13,
    "Qwen/Qwen3-VL-4B-Instruct": 4.44,
    "Qwen/Qwen3-VL-8B-Instruct": 8.77,
    "Qwen/Qwen3.5-0.8B": 0.853,  # Qwen3.5: without the layer that predicts several tokens at once, which is not loaded
    "Qwen/Qwen3.5-4B": 4.54,
    "Qwen/Qwen3.5-9B": 9.41,
    "Qwen/Qwen3.5-27B": 27.36,
    "Qwen/Qwen3.5-35B-A3B": 35.11,
    "llava-hf/llava-1.5-7b-hf": 7.06,
    "llava-hf/llava-1.5-13b-hf": 13.35,
    "llava-hf/llava-v1.6-mistral-7b-hf": 7.57,
    "llava-hf/llava-v1.6-vicuna-13b-hf": 13.35,
    "llava-hf/LLaVA-NeXT-Video-7B-hf": 7.06,
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": 8.03,
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": 0.256,
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": 0.507,
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": 2.247,
}


@pytest.mark.parametrize("name", published())
def test_published_sizes_make_models_of_the_stated_size(name: str) -> None:
    core = meta_model(config_of(name), ModelRecipe(path=name), torch.bfloat16)  # type: ignore[call-arg]
    assert sum(p.numel() for p in core.parameters()) / 1e9 == pytest.approx(STATED[name], abs=0.006)
    assert all(p.is_meta for p in core.parameters())


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if not name.endswith("-tiny")])
def test_every_shipped_recipe_names_a_model_that_can_be_planned(name: str) -> None:
    assert config_of(load_recipe(name).model.path)["text_config"]["hidden_size"]


@pytest.mark.gate
@pytest.mark.parametrize("name", [n for n in shipped_recipes() if re.search("-llava-(?!tiny)|-qwen3-", n)])
def test_recipes_of_the_papers_own_models_and_of_todays_are_planned(name: str) -> None:
    plan = make_plan(load_recipe(name), gpu_named("h100-80"))
    assert plan.memory.peak > plan.memory.weights > 0
    assert plan.work.flops["backward"] > 0


def test_frames_of_onevision_are_one_square_each() -> None:
    """A single picture is tiled; if clips were planned as tiles, 32 frames would take seven times the tokens."""
    recipe = load_recipe("utr-llava-qwen-7b")
    family = family_of(config_of(recipe.model.path))
    frames = workload_of(recipe, family, image_limit=None)
    assert (frames.images, frames.image_tokens) == (32, 730)
    assert workload_of(recipe, family, image_limit=None, images=1).image_tokens > 730


FAMILY = family_of(config_of("Qwen/Qwen2.5-VL-3B-Instruct"))


def small(*changes: str) -> Any:
    return load_recipe("perception-r1-counting-tiny", ["model.freeze=[]", "rollout.keep_prompts=off", *changes])


@pytest.mark.gate
def test_lora_of_3b_fits_in_24_gb() -> None:
    recipe = load_recipe("perception-r1-grounding-3b", ["model.lora.rank=16"])
    assert recipe.rollout.group_size == 8
    plan = make_plan(recipe, gpu_named("rtx4090"))
    assert plan.fits
    assert plan.memory.reference == 0  # instead, the adapter is switched off
    assert plan.memory.peak < 22 * GIB


@pytest.mark.gate
@pytest.mark.parametrize("task", ["grounding", "counting", "detection", "ocr"])
def test_all_weights_of_3b_fit_in_80_gb(task: str) -> None:
    recipe = load_recipe(f"perception-r1-{task}-3b")
    assert (recipe.rollout.group_size, recipe.model.lora, recipe.model.freeze) == (8, None, [])
    assert make_plan(recipe, gpu_named("h100-80")).fits


def test_config_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("tiny:perception")))
    at = make_plan(small(f"model.path={tmp_path}", "model.max_pixels=40000"), gpu_named("l4"))
    shipped = make_plan(small("model.max_pixels=40000"), gpu_named("l4"))
    assert at.memory == shipped.memory


@pytest.mark.gate
def test_each_key_moves_what_it_should() -> None:
    gpu = gpu_named("l4")
    base = make_plan(small(), gpu).memory
    checkpointed = make_plan(small("model.gradient_checkpointing=true"), gpu)
    assert checkpointed.memory.activations < 0.5 * base.activations
    assert checkpointed.work.flops["backward"] > 1.2 * make_plan(small(), gpu).work.flops["backward"]
    assert make_plan(small("optim.token_budget=1024"), gpu).memory.activations < base.activations
    assert make_plan(small("method.beta=0.04"), gpu).memory.reference == base.weights
    longer = make_plan(small("rollout.max_new_tokens=256"), gpu).memory
    assert 1.4 < longer.kv_cache / base.kv_cache < 2
    shared = make_plan(small("engine.kind=deepspeed"), gpu, gpus=4).memory
    assert (shared.moments, shared.gradients) == (base.moments / 4, base.gradients / 4)
    hosted = make_plan(small("engine.kind=deepspeed", "engine.offload_optimizer=true"), gpu, gpus=4).memory
    assert (hosted.moments, hosted.copies, hosted.host) == (0, 0, 2 * base.moments / 4)
    assert hosted.peak < shared.peak


@pytest.mark.gate
def test_products_are_kept_between_nothing_and_everything() -> None:
    gpu = gpu_named("l4")
    nothing, products, everything = (
        make_plan(small(f"model.gradient_checkpointing={kind}"), gpu) for kind in ("false", "products", "true")
    )
    assert everything.memory.activations < 0.5 * products.memory.activations
    assert products.memory.activations < 0.95 * nothing.memory.activations
    assert products.work.flops == nothing.work.flops  # on a GPU, where products alone have FLOPs
    assert nothing.work.traffic["backward"] < products.work.traffic["backward"]
    half = make_plan(small("model.gradient_checkpointing=true", "model.checkpointed_layers=2"), gpu)
    assert everything.memory.activations < half.memory.activations < nothing.memory.activations
    assert "all but products and attention is recomputed" in plan_text(products, [])
    assert "in the first 2 layers of the language model" in plan_text(half, [])
    assert plan_values(half, [])["checkpointed_layers"] == 2


@pytest.mark.gate
def test_auto_traces_the_rollout_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all six choices on a GPU that holds none of them; the numbers are those of a plan of the last alone."""
    traced: list[bool] = []

    def counting(*args: Any, merge: bool, **kwargs: Any) -> RolloutTrace:
        traced.append(merge)
        return trace_rollout(*args, merge=merge, **kwargs)

    monkeypatch.setattr(estimate, "trace_rollout", counting)
    auto, tight = small("model.gradient_checkpointing=auto"), Gpu("tight", 1.05 * GIB, bandwidth=1e12, flops=1e14)
    chosen = make_plan(auto, tight)
    assert not chosen.fits
    assert traced == [False]
    (*_, last) = checkpointing_choices(auto)
    alone = make_plan(last, tight)
    assert traced == [False, False]  # the plan of another call traces anew
    assert (chosen.memory, chosen.work) == (alone.memory, alone.work)


@pytest.mark.gate
def test_auto_is_the_fastest_that_fits() -> None:
    """On GPUs of just the room for each choice; with a byte less, the next one."""
    choices = list(checkpointing_choices(small("model.gradient_checkpointing=auto")))
    keys = [(one.model.gradient_checkpointing, one.model.checkpointed_layers) for one in choices]
    assert keys == [(False, None), ("products", None), (True, 1), (True, 2), (True, 3), (True, None)]
    peaks = [make_plan(one, gpu_named("b200")).memory.peak for one in choices]
    for room in (peaks[0], peaks[0] - 1, min(peaks[:2]) - 1, min(peaks), min(peaks) - 1):
        gpu = Gpu("of that room", (room + GIB) / 0.96 + 1, bandwidth=1e12, flops=1e14)
        chosen = make_plan(small("model.gradient_checkpointing=auto"), gpu)
        first = next((i for i, peak in enumerate(peaks) if peak <= gpu.memory - gpu.reserve), len(peaks) - 1)
        model = chosen.recipe.model
        assert (model.gradient_checkpointing, model.checkpointed_layers) == keys[first]
        assert chosen.fits == (room >= min(peaks))
    given = small("model.gradient_checkpointing=auto", "model.checkpointed_layers=3")
    assert [one.model.checkpointed_layers for one in checkpointing_choices(given)] == [None, 3, 3]


@pytest.mark.gate
def test_top_p_alone_sorts_the_vocabulary() -> None:
    biased = "rollout.allow_truncated_sampling=true"
    plain, nucleus, few = (
        make_plan(small(biased, *more), gpu_named("l4")).memory.pool
        for more in ((), ("rollout.top_p=0.9",), ("rollout.top_p=0.9", "rollout.top_k=50"))
    )
    assert nucleus > 2 * plain > 2 * few  # of few tokens, the cumulative sum is short


def test_the_reference_copies_what_is_trained() -> None:
    whole = make_plan(small("method.beta=0.04"), gpu_named("l4"))
    part = make_plan(small("method.beta=0.04", "model.freeze=[visual]"), gpu_named("l4"))
    assert whole.memory.reference == whole.memory.weights
    assert part.memory.reference == part.model.trainable * 2 < part.memory.weights


def test_ready_answers_are_not_sampled_and_baselines_learn_from_few() -> None:
    sizes = {"text_tokens": 20, "answer_tokens": 10}
    for spec in ("lists:l.jsonl", "reflection:d.jsonl"):
        for kind, group in (("perpo", 5), ("dpo", 2), ("sft", 1)):
            recipe = load_recipe("perpo-ocr-tiny", [f"data.spec={spec}", f"method.kind={kind}", "rollout.group_size=5"])
            work = workload_of(recipe, FAMILY, image_limit=None, **sizes)
            assert (work.group, work.samples) == (group, False)
    online = load_recipe("perpo-ocr-tiny", ["data.spec=scenes:ocr", "method.kind=sft", "rollout.group_size=5"])
    assert workload_of(online, FAMILY, image_limit=None, **sizes).samples


def test_frames_of_a_recipe_are_images_of_a_prompt() -> None:
    recipe = load_recipe("utr-7b")
    assert workload_of(recipe, FAMILY, image_limit=None).images == 32
    assert workload_of(recipe, FAMILY, image_limit=None, images=1).images == 1


def test_a_row_local_head_saves_a_product_over_the_vocabulary() -> None:
    plain, fused = (make_plan(small(*more), gpu_named("l4")) for more in ((), ("optim.row_local_head=true",)))
    answers = plain.workload.prompts * plain.workload.group * plain.workload.answer_tokens
    product = 2 * answers * plain.model.vocabulary * plain.model.hidden
    saved = sum(plain.work.flops.values()) - sum(fused.work.flops.values())
    assert saved == pytest.approx(product, rel=0.01)


def test_work_does_not_depend_on_how_a_step_is_cut() -> None:
    """A budget with room for part of a group takes memory for that part, and adds no work."""
    whole, cut = (make_plan(small(f"optim.token_budget={n}"), gpu_named("l4")) for n in (100_000, 2500))
    assert len(cut.workload.fullest_groups()) > cut.workload.groups_per_batch
    for name, flops in whole.work.flops.items():
        assert cut.work.flops[name] == pytest.approx(flops, rel=1e-6), name


def test_a_frozen_tower_sees_pictures_once() -> None:
    """In the rollout, the reference and each update; a trained tower runs in every one of them."""
    keys = ("method.beta=0.04", "optim.updates_per_batch=2", "model.freeze=[visual]")
    trained, frozen = (make_plan(small(*more), gpu_named("l4")) for more in (keys[:2], keys))
    assert frozen.work.flops["vision"] == trained.work.flops["vision"] > 0
    for name, times in (("reference", 1), ("forward", 2)):
        assert trained.work.flops[name] - frozen.work.flops[name] == times * frozen.work.flops["vision"]
    work = frozen.workload
    assert frozen.memory.features == work.prompts * work.image_tokens * frozen.model.hidden * frozen.model.itemsize
    assert trained.memory.features == 0


@pytest.mark.gate
def test_answers_of_a_server_cost_nothing_here() -> None:
    served = make_plan(small("rollout.backend=vllm", "rollout.server=http://localhost:8000"), gpu_named("l4"))
    local = make_plan(small(), gpu_named("l4"))
    assert served.memory.kv_cache == served.memory.rollout == served.work.flops["decode"] == 0
    assert served.memory.update == local.memory.update - local.memory.pool
    assert make_plan(small("rollout.decode=eager"), gpu_named("l4")).memory.pool == 0
    assert "on the vLLM server" in plan_text(served, [])
    assert "vLLM" not in plan_text(local, [])


@pytest.mark.gate
def test_gradients_are_released_before_the_host_is_asked() -> None:
    """One micro-batch without clipping needs no gradients at once; if that is not enough, more is offloaded."""
    recipe = small("optim.token_budget=100000", "optim.states=8bit", "rollout.group_size=2", "data.prompts_per_step=1")
    plan = make_plan(recipe, gpu_named("l4"))

    def on(share: float) -> list[dict[str, Any]]:
        gpu = Gpu("toy", memory=1.0, bandwidth=1e12, flops=1e14)
        wanted = share * plan.memory.peak
        gpu = replace(gpu, memory=(wanted + GIB) / 0.96)
        return [change.keys for change in advise(make_plan(recipe, gpu))]

    released = {"optim.gradient_release": True, "optim.clip_norm": None}
    assert on(0.97)[-1] == released
    keys = on(0.3)
    assert released in keys
    assert {"optim.states": "offload", "optim.gradient_release": False, "optim.clip_norm": 1.0} in keys


@pytest.mark.gate
def test_what_does_not_fit_comes_with_changes_until_it_does() -> None:
    recipe = small("method.beta=0.04", "model.max_pixels=200000")
    needed = make_plan(recipe, gpu_named("l4")).memory.peak
    gpu = Gpu("toy", memory=0.8 * needed, bandwidth=1e12, flops=1e14)
    gpu = replace(gpu, memory=gpu.memory + gpu.reserve)
    plan = make_plan(recipe, gpu)
    assert not plan.fits
    changes = advise(plan)
    assert changes[-1].plan.fits
    peaks = [plan.memory.peak, *(change.plan.memory.peak for change in changes)]
    assert peaks == sorted(peaks, reverse=True)
    text = plan_text(plan, changes)
    assert "does not fit" in text
    assert "--set 'optim.token_budget=" in text
    values = plan_values(plan, changes)
    assert (values["fits"], values["changes"][-1]["fits"]) == (False, True)
    json.dumps(values)


@pytest.mark.gate
def test_more_efficiency_is_less_time_and_nothing_else() -> None:
    slow, fast = (make_plan(small(), gpu_named("h100-80"), efficiency=e) for e in (0.2, 0.4))
    assert fast.work.tokens_per_s == pytest.approx(2 * slow.work.tokens_per_s)
    assert (slow.memory, slow.work.flops) == (fast.memory, fast.work.flops)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--gpu", "h100"], "did you mean h100-80"),
        (["--gpu", "a100-80", "--image-pixels", "9000000", "--set", "model.max_pixels=50000"], "max_pixels"),
        (["--efficiency", "1.5"], "efficiency"),
        (["--model", "Qwen/Qwen9"], "Qwen/Qwen2.5-VL-3B-Instruct"),
        (["--set", "optim.token_bugdet=5"], "did you mean optim.token_budget?"),
    ],
)
def test_wrong_input_names_what_is_allowed(
    wrong: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fastrl", "plan", "perception-r1-counting-tiny", *wrong])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_command_prints_one_json_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fastrl", "plan", "perception-r1-counting-tiny", "--gpu", "l4", "--json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["fits"] is True
    assert {"vision", "prefill", "decode", "forward", "backward"} <= values["flops"].keys()
    assert values["peak"] <= values["limit"]


@pytest.mark.gate
def test_4bit_weights_take_a_quarter_and_are_read_unpacked() -> None:
    """Same numbers, FLOPs and adapters; the language model's layers in 4 bits with their scales."""
    plain, packed = (
        make_plan(load_recipe("perception-r1-grounding-3b", changes), gpu_named("rtx4090"))
        for changes in (
            {"model.lora": {"rank": 16}},
            {"model.lora": {"rank": 16}, "model.quantize": "4bit"},
        )
    )
    numbers = packed.model.quantized
    assert packed.model.parameters == plain.model.parameters
    assert packed.model.trainable == plain.model.trainable
    assert packed.model.language == plain.model.language
    assert packed.work.flops == plain.work.flops
    assert numbers > 0.8 * (plain.model.language - plain.model.vocabulary * plain.model.hidden)
    saved = plain.model.weight_bytes - packed.model.weight_bytes
    assert saved == pytest.approx(numbers * (2 - 0.5 - 1 / 64), rel=1e-3)
    assert plain.memory.peak - packed.memory.peak > 0.9 * saved  # one layer's weight is dequantized at a time
    assert packed.work.traffic["decode"] > plain.work.traffic["decode"]


@pytest.mark.gate
def test_time_adds_bytes_to_flops_and_says_which_dominates() -> None:
    """Doubling the arithmetic rate halves one term, doubling the bandwidth the other; each phase is their sum."""
    gpu = gpu_named("h200")
    base = make_plan(small(), gpu)
    faster = make_plan(small(), replace(gpu, flops=2 * gpu.flops))
    wider = make_plan(small(), replace(gpu, bandwidth=2 * gpu.bandwidth))
    for name in ("vision", "prefill", "forward", "backward"):
        arithmetic, movement = base.work.arithmetic[name], base.work.movement[name]
        assert base.work.seconds[name] == arithmetic + movement
        assert min(arithmetic, movement) > 0
        assert faster.work.seconds[name] == pytest.approx(arithmetic / 2 + movement)
        assert wider.work.seconds[name] == pytest.approx(arithmetic + movement / 2)
    assert base.work.dominant == "movement"  # a model of 3 M parameters has little arithmetic
    slow = make_plan(small(), replace(gpu, flops=gpu.flops / 1e4))
    assert slow.work.dominant == "arithmetic"
    for plan, message in ((base, "movement of bytes"), (slow, "arithmetic")):
        assert f"most of it is {message}" in plan_text(plan, [])
        assert plan_values(plan, [])["dominant"] == plan.work.dominant
