"""A recipe's memory and work on one GPU, phase by phase.

Bytes of the update come from running the real forward and backward on the meta device (``trace.py``); weights,
gradients and optimizer states from the model's parameters; the rollout's from the sizes of its caches. Times divide
FLOPs and bytes by the data sheet's rates times a stated efficiency: estimates, never measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastrl.batch import PackedBatch
from fastrl.methods import method_for
from fastrl.models.families import family_of
from fastrl.models.flops import segment_attention_flops
from fastrl.plan.configs import config_of, image_limit
from fastrl.plan.hardware import Gpu
from fastrl.plan.trace import Trace, adamw_scratch, meta_model, trace_batch, trace_prompts
from fastrl.plan.workload import Workload, workload_of
from fastrl.recipe import Recipe

EFFICIENCY = 0.4
# Bytes a number of both moments on the GPU: float32, 8 bits each and a scale for every 256, none.
STATES = {"fp32": 8.0, "8bit": 2.0 + 8 / 256, "offload": 0.0}
HOST_BANDWIDTH = 100e9  # bytes/s of a server's memory
MAX_ROWS = 1024  # answers the generator decodes at once
GRAPHS = ("auto", "graph")  # ways of decoding that are graphs on a GPU


@dataclass(frozen=True)
class Model:
    """Counts of a model's numbers, and the shapes its caches have."""

    parameters: int
    trainable: int
    wide: int  # of the trainable ones, those kept in float32 already (no copy is made)
    largest: int  # numbers of the largest trainable parameter
    weight_bytes: int
    trained_bytes: int  # of the weights that are trained
    language: int  # numbers a decode step reads: layers and head
    layers: int
    kv_heads: int
    heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    itemsize: int
    trains_vision: bool


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. ``update``, ``optimizer``, ``rollout``: peaks of those phases, everything included."""

    weights: float
    copies: float  # float32 copies of low-precision weights
    moments: float
    reference: float  # a copy of what is trained; the rest is shared
    gradients: float
    activations: float  # kept by the forward of one micro-batch
    head_scratch: float
    kv_cache: float
    features: float  # of a step's images, where the tower is frozen and all passes share them
    pool: float  # temporaries of a decode step, which its CUDA graph keeps reserved
    update: float
    optimizer: float
    rollout: float
    host: float  # on the host, beside the data

    @property
    def peak(self) -> float:
        return max(self.update, self.optimizer, self.rollout)


@dataclass(frozen=True)
class Work:
    """Of one step on one GPU: FLOPs by phase, bytes the decode reads, bytes the optimizer moves, seconds by phase."""

    flops: dict[str, float]
    decode_bytes: float
    optimizer_bytes: float
    seconds: dict[str, float]
    answer_tokens_per_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class Plan:
    """What a recipe needs, and whether a GPU has it."""

    recipe: Recipe
    gpu: Gpu
    gpus: int
    efficiency: float
    model: Model
    workload: Workload
    memory: Memory
    work: Work

    @property
    def limit(self) -> float:
        """Bytes that may be used."""
        return self.gpu.memory - self.gpu.reserve

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.limit


def make_plan(
    recipe: Recipe, gpu: Gpu, *, gpus: int = 1, efficiency: float = EFFICIENCY, sizes: Mapping[str, Any] | None = None
) -> Plan:
    """Plan a recipe.

    Args:
        recipe: ``model.path`` is read for its config only (see ``config_of``).
        gpu: the device.
        gpus: of this kind, data-parallel; with more than one, optimizer states (and gradients) are sharded as
            ``engine.zero_stage`` says.
        efficiency: share of the data sheet's FLOP/s and bytes/s that is reached, for every phase.
        sizes: keyword arguments of ``workload_of``: ``images``, ``image_pixels``, ``text_tokens``, ``answer_tokens``.

    Raises:
        FileNotFoundError, ValueError: no such model; sizes, counts or an efficiency out of range.
    """
    if gpus < 1 or not 0 < efficiency <= 1:
        raise ValueError(f"need at least one GPU and an efficiency in (0, 1], got {gpus} and {efficiency}")
    core = meta_model(config_of(recipe.model.path), recipe.model, dtype_of(recipe))
    family = family_of(core.config)
    work = workload_of(recipe, family, image_limit=image_limit(recipe.model.path, family), **(sizes or {}))
    model = count_model(core)

    def trace(batch: PackedBatch) -> Trace:
        return trace_batch(
            core,
            batch,
            gpu=True,
            entropy=method_for(recipe.method).needs_entropy,
            row_local=recipe.optim.row_local_head,
            accumulates=work.micro_batches > 1 and recipe.optim.states != "offload",
            release=releases(recipe, work),
        )

    fullest, full = work.fullest_batch(), work.full_batch()
    traced = trace(fullest)
    counted = traced if fullest.segments.spans == full.segments.spans else trace(full)
    prefill = trace_prompts(core, work.prefill_batch(), gpu=True) if work.samples else (0, 0)
    memory = memory_of(recipe, model, work, traced, prefill, gpus=gpus)
    return Plan(
        recipe, gpu, gpus, efficiency, model, work, memory, work_of(recipe, model, work, counted, gpu, efficiency)
    )


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Of the weights on a GPU."""
    return torch.float32 if recipe.model.dtype == "float32" else torch.bfloat16


def count_model(core: Any) -> Model:
    """Sizes of a model (on any device)."""
    parameters = list(core.parameters())
    trained = [p for p in parameters if p.requires_grad]
    text, family = core.config.get_text_config(), family_of(core.config)
    parts = family.parts(core)
    embedding, head = parts.embedding.weight, parts.head.weight
    tied = head is embedding
    language = sum(p.numel() for p in parts.language.parameters()) - (0 if tied else embedding.numel())
    return Model(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in trained),
        wide=sum(p.numel() for p in trained if p.dtype == torch.float32),
        largest=max((p.numel() for p in trained), default=0),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        trained_bytes=sum(p.numel() * p.element_size() for p in trained),
        language=language + (0 if tied else head.numel()),
        layers=text.num_hidden_layers,
        kv_heads=text.num_key_value_heads,
        heads=text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        hidden=head.shape[1],
        vocabulary=head.shape[0],
        itemsize=embedding.element_size(),
        trains_vision=family.trains_vision(core),
    )


def reads_reference(recipe: Recipe) -> bool:
    """Whether the loss reads log-probs of a reference."""
    return method_for(recipe.method).reads_reference(recipe.method)


def needs_copy(recipe: Recipe) -> bool:
    """Whether a frozen copy of the weights is kept as the reference: never under LoRA."""
    return reads_reference(recipe) and recipe.model.lora is None


def releases(recipe: Recipe, work: Workload) -> bool:
    """Whether the update never has all gradients on the device: each is used, or moved, as it is completed."""
    offload = recipe.optim.states == "offload"
    return offload or (recipe.optim.gradient_release and work.micro_batches == 1)


def memory_of(
    recipe: Recipe,
    model: Model,
    work: Workload,
    traced: Trace,
    prefill: tuple[int, int],
    *,
    gpus: int = 1,
    gpu: bool = True,
) -> Memory:
    """Bytes by kind, and the peaks of the phases (see :class:`Memory`).

    Args:
        traced, prefill: what a micro-batch's training pass, the vision tower and a call over prompts need at their
            peaks.
        gpus: data-parallel ranks that share optimizer states (``engine.zero_stage`` above 0) and gradients (2).
        gpu: count AdamW as on a GPU, else as on a CPU.
    """
    stage = recipe.engine.zero_stage if gpus > 1 else 0
    shared = gpus if stage > 0 else 1
    states = recipe.optim.states
    copies = 4.0 * (model.trainable - model.wide) / shared
    moments = STATES[states] * model.trainable / shared
    whole = 0.0 if releases(recipe, work) else 4.0 * model.trainable
    gradients = whole / gpus if stage == 2 else whole
    host = 0.0
    on_host = states == "offload" or recipe.engine.offload_optimizer
    if on_host:  # float32 weights, moments, gradients: this rank's
        host, copies, moments = 16.0 * model.trainable / shared, 0.0, 0.0
    reference = model.trained_bytes if needs_copy(recipe) else 0
    features = (
        0 if model.trains_vision else work.prompts * work.images * work.image_tokens * model.hidden * model.itemsize
    )
    resident = model.weight_bytes + copies + moments + reference + features
    step = 0 if on_host else adamw_scratch(model.largest, gpu=gpu, states=states)
    sampled = rollout_bytes(model, work, prefill)
    pool = sampling_bytes(model, work) if gpu and work.samples and recipe.rollout.decode in GRAPHS else 0
    return Memory(
        weights=model.weight_bytes,
        copies=copies,
        moments=moments,
        reference=reference,
        gradients=gradients,
        activations=traced.kept,
        head_scratch=traced.head_scratch,
        kv_cache=kv_bytes(model, work),
        features=features,
        pool=pool,
        update=resident + pool + max(traced.peak - whole + gradients, traced.kept),
        optimizer=resident + pool + gradients + step,
        rollout=resident + features * (work.steps_at_once - 1) + sampled if work.samples else 0.0,
        host=host,
    )


def rollout_bytes(model: Model, work: Workload, prefill: tuple[int, int]) -> int:
    """Peak of a rollout above what is resident: in the vision tower, while prompts are read, or in the last step of
    the decode."""
    if not work.samples:
        return 0
    vision, language = prefill
    decode = kv_bytes(model, work) + sampling_bytes(model, work)
    return max(vision, kv_bytes(model, work, own=False) + language, decode)


def kv_bytes(model: Model, work: Workload, *, own: bool = True) -> int:
    """Keys and values of the rollout: each prompt's once, and (``own``) each answer's, for the rows that decode at
    once."""
    if not work.samples:
        return 0
    prompts = prompts_at_once(work)
    answers = work.group * max(work.answer_tokens - 1, 1) if own else 0
    return prompts * (work.prompt_tokens + answers) * kv_token_bytes(model)


def prompts_at_once(work: Workload) -> int:
    """Prompts whose answers decode together."""
    return min(work.prompts * work.steps_at_once, max(1, MAX_ROWS // work.group))


def kv_token_bytes(model: Model) -> int:
    """Of one token in all layers."""
    return 2 * model.layers * model.kv_heads * model.head_dim * model.itemsize


def sampling_bytes(model: Model, work: Workload) -> int:
    """Logits of the rows that decode at once, and what drawing from them makes: float32 scores and probabilities (once
    more where they do not fall into whole blocks); under top-p alone, the whole vocabulary sorted, with its ids."""
    rows = work.group * prompts_at_once(work)
    drawing = 34 if work.sorts else 12 if model.vocabulary % 128 else 8
    return rows * model.vocabulary * (model.itemsize + drawing)


def work_of(recipe: Recipe, model: Model, work: Workload, traced: Trace, gpu: Gpu, efficiency: float) -> Work:
    """FLOPs, bytes and seconds of one step (see :class:`Work`). ``traced``: a micro-batch of full groups."""
    batches = work.prompts / work.groups_per_batch
    linear = 2 * (model.language - model.vocabulary * model.hidden)
    head = 2 * model.vocabulary * model.hidden
    heads, dim = model.heads, model.head_dim
    flops = {"vision": 0.0, "prefill": 0.0, "decode": 0.0, "reference": 0.0}
    decode_bytes = 0.0
    if work.samples:
        prompt, answer, rows = work.prompt_tokens, work.answer_tokens, work.rows
        attention = model.layers * segment_attention_flops([(prompt, prompt)], heads, dim)
        flops["prefill"] = work.prompts * (linear * prompt + attention + head)
        own = model.layers * segment_attention_flops([(answer, prompt + answer // 2)], heads, dim)
        flops["decode"] = rows * (answer * (linear + head) + own)
        read = work.prompts * prompt + rows * answer / 2
        decode_bytes = answer * (model.language * model.itemsize + read * kv_token_bytes(model))
    if work.samples or not model.trains_vision:
        flops["vision"] = batches * traced.vision_flops
    forward = traced.forward_flops + (traced.vision_flops if model.trains_vision else 0)  # frozen: once for all passes
    if reads_reference(recipe):
        flops["reference"] = batches * forward
    passes = recipe.optim.updates_per_batch
    flops["forward"] = passes * batches * forward
    flops["backward"] = passes * batches * traced.backward_flops
    states = recipe.optim.states
    # Norm and clip 12, gradient 4, moments in and out, float32 weight in and out, weight.
    moved = passes * model.trainable * (12 + 4 + 2 * STATES[states] + 8 + model.itemsize)
    seconds = {name: value / (gpu.flops * efficiency) for name, value in flops.items()}
    seconds["decode"] = max(seconds["decode"], decode_bytes / (gpu.bandwidth * efficiency))
    if states == "offload":  # gradients out after each micro-batch, weights back; the host's own memory for the rest
        moved = passes * model.trainable * model.itemsize * (work.micro_batches + 1)
        update = passes * model.trainable * 36 / HOST_BANDWIDTH
        seconds["optimizer"] = (moved / gpu.link + update) / efficiency
    else:
        seconds["optimizer"] = moved / (gpu.bandwidth * efficiency)
    total = sum(seconds.values())
    answers = work.prompts * work.group * work.answer_tokens
    return Work(
        flops=flops,
        decode_bytes=decode_bytes,
        optimizer_bytes=moved,
        seconds=seconds,
        answer_tokens_per_s=answers / total,
        tokens_per_s=(answers + work.prompts * work.prompt_tokens) / total,
    )
