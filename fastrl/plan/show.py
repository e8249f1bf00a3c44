"""A plan as text, and as values for ``--json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastrl.plan.advice import Change
from fastrl.plan.configs import is_published
from fastrl.plan.estimate import Plan, Work
from fastrl.plan.hardware import GIB
from fastrl.recipe import ModelRecipe

KINDS = {
    "weights": "weights",
    "copies": "float32 copies of trained weights",
    "moments": "optimizer states",
    "reference": "reference (copy of trained weights)",
    "gradients": "gradients",
    "activations": "activations kept by one forward",
    "head_scratch": "scratch of the head",
    "kv_cache": "keys and values of the rollout",
    "merged": "merged copy of adapted weights",
    "features": "shared vision features",
    "prompts": "prompts kept from rollout to update",
    "pool": "reserved for decode graphs",
}
DOMINANT = {
    "arithmetic": "arithmetic: fewer FLOPs or a faster chip make it shorter",
    "movement": "movement of bytes: fewer or fused element-wise operators, or more bandwidth, make it shorter",
}
RECOMPUTED = {
    False: "activations are kept (model.gradient_checkpointing: false)",
    "products": "all but products and attention is recomputed (model.gradient_checkpointing: products)",
    True: "layers are recomputed in the backward (model.gradient_checkpointing: true)",
}
PHASES = {"rollout": "rollout", "update": "forward and backward", "optimizer": "optimizer step"}


def plan_text(plan: Plan, changes: Sequence[Change]) -> str:
    """The plan as text."""
    parts = [*_head(plan), "", *_memory(plan), "", *_work(plan), *_network(plan), "", *_verdict(plan, changes)]
    return "\n".join(parts)


def plan_values(plan: Plan, changes: Sequence[Change]) -> dict[str, Any]:
    """The plan as plain values; memory in bytes, times in seconds."""
    work, memory = plan.workload, plan.memory
    return {
        "recipe": plan.recipe.name,
        "model": plan.recipe.model.path,
        "gpu": plan.gpu.name,
        "gpus": plan.gpus,
        "nodes": plan.nodes,
        "network_bytes": {name: int(value) for name, value in plan.network._asdict().items()},
        "parameters": plan.model.parameters,
        "trainable": plan.model.trainable,
        "step": {
            "prompts": work.prompts,
            "answers_per_prompt": work.group,
            "prompt_tokens": work.prompt_tokens,
            "image_tokens": work.images * work.image_tokens,
            "answer_tokens": work.answer_tokens,
            "micro_batches": work.micro_batches,
        },
        "gradient_checkpointing": plan.recipe.model.gradient_checkpointing,
        "checkpointed_layers": plan.recipe.model.checkpointed_layers,
        "keep_prompts": plan.keeping._asdict(),
        "merge_lora": plan.merging._asdict(),
        "memory": {name: int(getattr(memory, name)) for name in (*KINDS, "host")},
        "peaks": {name: int(getattr(memory, name)) for name in PHASES},
        "peak": int(memory.peak),
        "limit": int(plan.limit),
        "fits": plan.fits,
        "changes": [
            {"set": change.keys, "cost": change.cost, "peak": int(change.plan.memory.peak), "fits": change.plan.fits}
            for change in changes
        ],
        "flops": dict(plan.work.flops),
        "bytes": dict(plan.work.traffic),
        "efficiency": plan.efficiency,
        "seconds": plan.work.seconds,
        "arithmetic_seconds": dict(plan.work.arithmetic),
        "movement_seconds": dict(plan.work.movement),
        "dominant": plan.work.dominant,
        "tokens_per_s": plan.work.tokens_per_s,
        "answer_tokens_per_s": plan.work.answer_tokens_per_s,
    }


def _head(plan: Plan) -> list[str]:
    work, model = plan.workload, plan.model
    source = " (published sizes)" if is_published(plan.recipe.model.path) else ""
    trained = f"{_count(model.trainable)} of {_count(model.parameters)} parameters trained"
    pictures = f", {work.images * work.image_tokens} of them of images" if work.images else ""
    count = f"{plan.gpus} x " if plan.gpus > 1 else ""
    count = f"{plan.nodes} nodes of {count}" if plan.nodes > 1 else count
    return [
        f"{plan.recipe.name} on {count}{plan.gpu.name} ({_gib(plan.gpu.memory)})",
        f"model      {plan.recipe.model.path}{source}: {trained}",
        f"a step     {work.prompts} prompts of {work.prompt_tokens} tokens{pictures}; "
        f"{work.group} answers each of {work.answer_tokens} tokens, the longest allowed; "
        f"{work.micro_batches} micro-batches",
        *([f"           {plan.keeping.note}"] if work.samples else []),
        *([f"           {plan.merging.note}"] if work.samples and plan.recipe.model.lora is not None else []),
        f"           {_recomputed(plan.recipe.model)}",
    ]


def _recomputed(model: ModelRecipe) -> str:
    assert model.gradient_checkpointing != "auto"  # the plan has chosen
    count = model.checkpointed_layers
    some = "" if count is None else f", in the first {count} layers of the language model"
    return RECOMPUTED[model.gradient_checkpointing] + some


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    lines = ["memory" + (" of each GPU" if plan.ranks > 1 else "")]
    for name, words in KINDS.items():
        value = getattr(memory, name)
        if value:
            lines.append(f"  {words:<36}{_gib(value):>12}")
    lines.append("peak of")
    for name, words in PHASES.items():
        value = getattr(memory, name)
        if value:
            mark = "  <- the most" if value == memory.peak else ""
            lines.append(f"  {words:<36}{_gib(value):>12}{mark}")
    if memory.host:
        lines.append(f"on the host {_gib(memory.host):>38}")
    return lines


def _work(plan: Plan) -> list[str]:
    work = plan.work
    lines = [f"one step, estimated at {plan.efficiency:.0%} of the data sheet's rates (--efficiency)"]
    columns = f"  {'phase':<12}{'TFLOP':>10}{'GB moved':>12}{'arithmetic':>12}{'movement':>10}{'seconds':>9}"
    lines.append(columns)
    for name, seconds in work.seconds.items():
        if seconds:
            lines.append(_phase(name, work.flops.get(name, 0), work.traffic[name], *_terms(work, name), seconds))
    if plan.recipe.rollout.backend == "vllm":
        lines.append("  rollout: on the vLLM server, not counted")
    sums = (sum(each.values()) for each in (work.flops, work.traffic, work.arithmetic, work.movement, work.seconds))
    lines.append(_phase("all", *sums))
    lines.append(f"  most of it is {DOMINANT[work.dominant]}")
    lines.append(f"  about {work.tokens_per_s:,.0f} tokens/s, {work.answer_tokens_per_s:,.0f} of them of answers")
    return lines


def _network(plan: Plan) -> list[str]:
    """What ranks exchange; nothing for one rank."""
    if plan.ranks == 1:
        return []
    weights, gradients = (value / 1e9 for value in plan.network)
    return [
        f"network: each rank receives {weights + gradients:,.2f} GB a step: {weights:,.2f} of weights, "
        f"{gradients:,.2f} of gradients (counted; its time is not in the estimate)"
    ]


def _terms(work: Work, name: str) -> tuple[float, float]:
    return work.arithmetic.get(name, 0.0), work.movement.get(name, 0.0)


def _phase(name: str, flops: float, traffic: float, arithmetic: float, movement: float, seconds: float) -> str:
    counted = f"{flops / 1e12:>10,.1f}{traffic / 1e9:>12,.0f}"
    return f"  {name:<12}{counted}{arithmetic:>12.2f}{movement:>10.2f}{seconds:>9.2f}"


def _verdict(plan: Plan, changes: Sequence[Change]) -> list[str]:
    room = f"{_gib(plan.memory.peak)} of {_gib(plan.limit)} usable ({_gib(plan.gpu.reserve)} left for the driver)"
    if plan.fits:
        return [f"fits: {room}"]
    lines = [f"does not fit: {room}"]
    for change in changes:
        settings = " ".join(f"--set '{key}={_yaml(value)}'" for key, value in change.keys.items())
        verdict = "fits" if change.plan.fits else "not yet"
        lines.append(f"  {settings:<46} {_gib(change.plan.memory.peak)}, {verdict}  ({change.cost})")
    if plan.one_group_too_large:
        lines.append(
            f"  one prompt with its {plan.workload.group} answers ({plan.workload.group_tokens} tokens) is a "
            "micro-batch of its own: more GPUs do not divide it (sequence parallelism is not built)"
        )
    if changes and changes[-1].plan.fits:
        lines[0] += "; with the changes below, each on top of those before it, it does"
    else:
        lines.append("  no known change is sufficient: use more GPUs (--gpus N), a larger GPU or a smaller model")
    return lines


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    return "null" if value is None else str(value)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.01 * GIB else f"{size / 2**20:.2f} MiB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"
