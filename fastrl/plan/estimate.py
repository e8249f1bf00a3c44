"""A recipe's memory and work on one GPU, by phase.

Bytes of the update come from running the real forward and backward on the meta device (``trace.py``); those of weights,
gradients and optimizer states from the model's parameters and the engine's bytes per parameter; those of the rollout
from running the generator's own calls. Times are FLOPs and bytes divided by the data sheet's rates times an assumed
efficiency: estimates, not measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastrl.batch import PromptGroup, pack_row
from fastrl.engine.costs import FLOAT, gradients_leave, held, moved, on_host
from fastrl.engine.optimizers import step_scratch
from fastrl.methods import method_for
from fastrl.models.families import family_of
from fastrl.models.load import default_dtype
from fastrl.models.quantize import PACKED
from fastrl.plan.configs import config_of, image_limit
from fastrl.plan.hardware import HOST_BANDWIDTH, Gpu
from fastrl.plan.keep import Keeping, decide_keep
from fastrl.plan.merge import Merging, decide_merge
from fastrl.plan.quantized import Planned4bit, unpacked
from fastrl.plan.recompute import checkpointing_choices
from fastrl.plan.sharded import Network, Unit, network_of, partitions_of, shards_of, units_of
from fastrl.plan.trace import RolloutTrace, Trace, meta_model, trace_batch, trace_kept, trace_rollout
from fastrl.plan.workload import Workload, workload_of
from fastrl.recipe import Recipe
from fastrl.rollout.cache import OWN_BLOCK
from fastrl.rollout.decode import decode_mode, own_keys

EFFICIENCY = 0.4
PHASES: tuple[str, ...] = ("vision", "prefill", "decode", "reference", "forward", "backward")  # those with FLOPs
CUDA = torch.device("cuda")


@dataclass(frozen=True)
class Model:
    """Sizes of a model, in numbers of parameters unless stated otherwise."""

    parameters: int
    trainable: int
    wide: int  # trainable parameters that are already float32 (no copy is needed)
    largest: int  # elements of the largest trainable parameter
    weight_bytes: int
    trained_bytes: int  # bytes of the trainable weights
    language: int  # parameters that a decode step reads: layers (with all experts, as rows use different ones), head
    quantized: int  # those of ``language`` in 4-bit layers
    hidden: int
    vocabulary: int
    itemsize: int
    trains_vision: bool
    units: tuple[Unit, ...]  # what an engine with sharded weights gathers at once


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. ``update``, ``optimizer`` and ``rollout`` are total peaks of these phases."""

    weights: float
    copies: float  # float32 copies of low-precision weights
    moments: float
    reference: float  # copy of the trained weights; frozen ones are shared
    gradients: float
    activations: float  # kept by the forward of one micro-batch for the backward
    head_scratch: float
    kv_cache: float
    merged: float  # adapters merged into a copy of the weights, for sampling
    features: float  # of a step's images, if the tower is frozen and all passes share them
    prompts: float  # graphs of the step's prompts, kept from rollout to update, with their gradients
    pool: float  # temporaries of a decode step, reserved by its CUDA graph
    update: float
    optimizer: float
    rollout: float
    host: float  # on the host, besides the data

    @property
    def peak(self) -> float:
        return max(self.update, self.optimizer, self.rollout)


@dataclass(frozen=True)
class Work:
    """Work of one step on one GPU: FLOPs, bytes and seconds by phase.

    ``traffic`` holds the bytes moved by operators without FLOPs (norms, activations, copies, sampling), those of
    weights and keys that decoding reads, and the optimizer's. ``arithmetic`` and ``movement`` are the seconds of each
    kind, which add up to ``seconds``; decoding waits for the longer of its products and the bytes they read.
    """

    flops: dict[str, float]
    traffic: dict[str, float]
    arithmetic: dict[str, float]
    movement: dict[str, float]
    answer_tokens_per_s: float
    tokens_per_s: float

    @property
    def seconds(self) -> dict[str, float]:
        return {name: self.arithmetic.get(name, 0.0) + self.movement.get(name, 0.0) for name in self.traffic}

    @property
    def dominant(self) -> str:
        """What most of the step waits for: ``arithmetic`` or ``movement``."""
        return "arithmetic" if sum(self.arithmetic.values()) >= sum(self.movement.values()) else "movement"


@dataclass(frozen=True)
class Plan:
    """A recipe's requirements, compared with a GPU."""

    recipe: Recipe
    gpu: Gpu
    gpus: int
    efficiency: float
    model: Model
    workload: Workload
    memory: Memory
    work: Work
    keeping: Keeping
    merging: Merging
    nodes: int = 1

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes

    @property
    def network(self) -> Network:
        """Bytes that each rank receives in a step."""
        work, recipe = self.workload, self.recipe
        updates, copied = recipe.optim.updates_per_batch, reads_reference(recipe)
        return network_of(
            self.model.units,
            recipe.engine,
            self.ranks,
            passes=updates * work.micro_batches,
            updates=updates,
            rollouts=int(work.samples) + int(copied),
        )

    @property
    def one_group_too_large(self) -> bool:
        """Whether a micro-batch of a single group is what does not fit."""
        return not self.fits and self.workload.groups_per_batch == 1 and self.memory.update > self.limit

    @property
    def limit(self) -> float:
        """Usable bytes."""
        return self.gpu.memory - self.gpu.reserve

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.limit


def make_plan(
    recipe: Recipe,
    gpu: Gpu,
    *,
    gpus: int = 1,
    nodes: int = 1,
    efficiency: float = EFFICIENCY,
    sizes: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan a recipe.

    Args:
        recipe: ``model.path`` is read for its config only (see ``config_of``).
        gpu: the device.
        gpus: number of data-parallel GPUs of a node; with more than one in all, what the engine shards is divided.
        nodes: number of nodes.
        efficiency: fraction of the data sheet's FLOP/s and bytes/s that every phase reaches.
        sizes: keyword arguments of ``workload_of``: ``images``, ``image_pixels``, ``text_tokens``, ``answer_tokens``.

    Returns:
        The plan. Where the recipe leaves checkpointing to it (``auto``), its recipe says what was chosen.

    Raises:
        FileNotFoundError: the model does not exist.
        ValueError: sizes, counts or the efficiency are out of range.
    """
    if gpus < 1 or nodes < 1 or not 0 < efficiency <= 1:
        raise ValueError(
            f"need at least one GPU, one node and an efficiency in (0, 1], got {gpus}, {nodes} and {efficiency}"
        )
    asked = _Asked(gpu, gpus, nodes, efficiency, sizes or {})
    if recipe.model.gradient_checkpointing == "auto":
        return first_that_fits(_plan(one, asked) for one in checkpointing_choices(recipe))
    return _plan(recipe, asked)


@dataclass(frozen=True)
class _Asked:
    """The arguments of ``make_plan`` for recipes that differ in checkpointing alone, and what these have in common."""

    gpu: Gpu
    gpus: int
    nodes: int
    efficiency: float
    sizes: Mapping[str, Any]
    rollouts: dict[bool, RolloutTrace] = field(default_factory=dict)

    def rollout(self, core: Any, work: Workload, *, merge: bool) -> RolloutTrace:
        """The trace of a rollout, in which no layer is checkpointed: made once, with merged adapters or without."""
        if work.sampling is None:
            return RolloutTrace()
        if merge not in self.rollouts:
            options = {"limits": work.limits, "sampling": work.sampling, "merge": merge}
            self.rollouts[merge] = trace_rollout(core, work.chunk(), gpu=True, **options)
        return self.rollouts[merge]


def _plan(recipe: Recipe, asked: _Asked) -> Plan:
    """Plan a recipe that says what is checkpointed."""
    gpu, gpus, nodes, efficiency = asked.gpu, asked.gpus, asked.nodes, asked.efficiency
    core = meta_model(config_of(recipe.model.path), recipe.model, dtype_of(recipe))
    family = family_of(core.config)
    work = workload_of(recipe, family, image_limit=image_limit(recipe.model.path, family), **asked.sizes)
    model, release = count_model(core), release_of(recipe, work)
    room = room_of(recipe, core, work, gpu.memory - gpu.reserve)
    keeping = decide_keep(recipe, core, work, room, gpu=True)
    merging = decide_merge(recipe, core, room, keeps=keeping.on)

    def trace(groups: Sequence[PromptGroup], *, keep: bool = keeping.on) -> Trace:
        options: dict[str, Any] = {
            "gpu": True,
            "entropy": method_for(recipe.method).needs_entropy,
            "row_local": recipe.optim.row_local_head,
            "accumulates": work.micro_batches > 1 and release is None,
        }
        if keep:
            return trace_kept(core, groups, **options)
        return trace_batch(core, pack_row(groups), release=release, **options)

    fullest, full = work.fullest_groups(), work.full_groups()
    traced = trace(fullest)
    same = [group.tokens for group in fullest] == [group.tokens for group in full]
    counted = traced if same else trace(full)
    whole = trace(full, keep=False) if keeping.on and reads_reference(recipe) else counted
    rollout = asked.rollout(core, work, merge=merging.on)
    memory = memory_of(recipe, model, work, traced, rollout, gpus=gpus * nodes)
    done = work_of(recipe, model, work, counted, rollout, gpu, efficiency, whole=whole)
    return Plan(recipe, gpu, gpus, efficiency, model, work, memory, done, keeping, merging, nodes)


def first_that_fits(plans: Iterable[Plan]) -> Plan:
    """The first of at least one plan that fits on its GPU, or the last."""
    plan = None
    for plan in plans:
        if plan.fits:
            break
    assert plan is not None
    return plan


def room_of(recipe: Recipe, core: Any, work: Workload, limit: float) -> float:
    """What weights, gradients, optimizer states and a reference leave of ``limit`` bytes."""
    nothing = Trace(0, 0, 0, 0, 0, 0), RolloutTrace()
    return limit - memory_of(recipe, count_model(core), work, *nothing).optimizer


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Type of the weights on a GPU."""
    return default_dtype(CUDA) if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype)


def count_model(core: Any) -> Model:
    """Sizes of a model (on any device)."""
    parameters = list(core.parameters())
    trained = [p for p in parameters if p.requires_grad]
    family = family_of(core.config)
    parts = family.parts(core)
    embedding, head = parts.embedding.weight, parts.head.weight
    tied = head is embedding
    language = sum(p.numel() for p in parts.language.parameters()) - (0 if tied else embedding.numel())
    packed = unpacked(core)
    language += packed
    return Model(
        parameters=sum(p.numel() for p in parameters) + packed,
        trainable=sum(p.numel() for p in trained),
        wide=sum(p.numel() for p in trained if p.dtype == torch.float32),
        largest=max((p.numel() for p in trained), default=0),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        trained_bytes=sum(p.numel() * p.element_size() for p in trained),
        language=language + (0 if tied else head.numel()),
        quantized=sum(layer.numbers for layer in core.modules() if isinstance(layer, Planned4bit)),
        hidden=head.shape[1],
        vocabulary=head.shape[0],
        itemsize=embedding.element_size(),
        trains_vision=family.trains_vision(core),
        units=units_of(core, family.layers(core)),
    )


def reads_reference(recipe: Recipe) -> bool:
    """Whether the loss reads log-probs of a reference."""
    return method_for(recipe.method).reads_reference(recipe.method)


def needs_copy(recipe: Recipe) -> bool:
    """Whether a frozen copy of the weights serves as the reference; never with LoRA."""
    return reads_reference(recipe) and recipe.model.lora is None


def release_of(recipe: Recipe, work: Workload) -> Callable[[int], int] | None:
    """Device bytes needed to apply a gradient with a given number of elements at once; None: all gradients are kept."""
    if not gradients_leave(recipe.optim, micro_batches=work.micro_batches):
        return None
    if on_host(recipe.optim, recipe.engine):
        return lambda numbers: 0
    return lambda numbers: step_scratch(numbers, recipe.optim.states, fused=True)


def memory_of(
    recipe: Recipe,
    model: Model,
    work: Workload,
    traced: Trace,
    rollout: RolloutTrace,
    *,
    gpus: int = 1,
    gpu: bool = True,
) -> Memory:
    """Bytes by kind, and the peaks of the phases (see :class:`Memory`).

    Args:
        traced, rollout: peaks of a micro-batch's training pass and of a rollout's calls. ``traced`` says whether
            prompts are kept.
        gpus: data-parallel ranks that share optimizer states (``engine.zero_stage`` above 0) and gradients (2).
        gpu: count AdamW as on a GPU, else as on a CPU.
    """
    if recipe.engine.shards_weights:
        return sharded_memory(recipe, model, work, traced, rollout, ranks=gpus, gpu=gpu)
    optim = recipe.optim
    each = held(optim, recipe.engine, ranks=gpus, micro_batches=work.micro_batches)
    copies, moments = each.copy * (model.trainable - model.wide), each.moments * model.trainable
    gradients = each.gradient * model.trainable
    whole = 0.0 if gradients_leave(optim, micro_batches=work.micro_batches) else FLOAT * model.trainable
    reference = model.trained_bytes if needs_copy(recipe) else 0
    features = 0 if model.trains_vision else traced.features * work.prompts
    resident = model.weight_bytes + copies + moments + reference + features
    step = 0 if on_host(optim, recipe.engine) else step_scratch(model.largest, optim.states, fused=gpu)
    kept = work.prompts * traced.prompt
    collected = work.prompt_tokens * rollout.token  # the gradients of a kept prompt's keys and values
    others = max(0, work.prompts - traced.groups) * (traced.prompt + collected) if kept else 0
    graph = gpu and work.samples and decode_mode(recipe.rollout.decode, CUDA) == "graph"
    sampled = rollout_bytes(work, rollout, shared=not model.trains_vision, graph=graph)
    if kept:  # the passes' features are in what is kept, or shared; prompts are read one by one
        alone = replace(rollout, features=0, vision=0, language=traced.reading)
        sampled = features + kept + rollout_bytes(work, alone, graph=graph)
    pool = rollout.drawing if graph else 0
    return Memory(
        weights=model.weight_bytes,
        copies=copies,
        moments=moments,
        reference=reference,
        gradients=gradients,
        activations=traced.kept,
        head_scratch=traced.head_scratch,
        kv_cache=kv_bytes(work, rollout),
        merged=rollout.merged,
        features=features,
        prompts=kept + work.prompts * collected if kept else 0,
        pool=pool,
        update=resident + pool + max(traced.peak - whole + gradients, traced.kept) + others,
        optimizer=resident + pool + gradients + step,
        rollout=resident - features + rollout.merged + max(sampled, rollout.merging) if work.samples else 0.0,
        host=each.host * model.trainable,
    )


def sharded_memory(
    recipe: Recipe, model: Model, work: Workload, traced: Trace, rollout: RolloutTrace, *, ranks: int, gpu: bool = True
) -> Memory:
    """:func:`memory_of` with ``fsdp2`` or ZeRO 3, where weights are sharded too."""
    optim, host, zero = recipe.optim, recipe.engine.offload_optimizer, recipe.engine.kind == "deepspeed"
    shards = (partitions_of if zero else shards_of)(model.units, optim, ranks)
    features = 0 if model.trains_vision else traced.features * work.prompts
    reference = model.weight_bytes / ranks if needs_copy(recipe) else 0.0
    states = shards.weights + shards.copies + shards.moments + shards.gradients
    resident = features + (0.0 if host else reference + shards.weights + shards.copies + shards.moments)
    updated = model.trainable if zero else model.largest  # at once; ZeRO's optimizer has one flat tensor
    step = 0 if host else step_scratch(-(-updated // ranks), optim.states, fused=gpu)
    peak = shards.update(
        traced.kept,
        traced.peak - FLOAT * model.trainable,
        traced.head_scratch,
        accumulates=work.micro_batches > 1,
        reduces_last=recipe.engine.reduce_gradients == "last",
        recomputes=bool(recipe.model.gradient_checkpointing) and recipe.model.checkpointed_layers is None,
    )
    graph = gpu and work.samples and decode_mode(recipe.rollout.decode, CUDA) == "graph"
    pool = rollout.drawing if graph else 0
    sampled = rollout_bytes(work, rollout, shared=not model.trains_vision, graph=graph)
    gradients = 0.0 if host else shards.gradients
    return Memory(
        weights=0.0 if host else shards.weights,
        copies=0.0 if host else shards.copies,
        moments=0.0 if host else shards.moments,
        reference=0.0 if host else reference,
        gradients=gradients,
        activations=traced.kept,
        head_scratch=traced.head_scratch,
        kv_cache=kv_bytes(work, rollout),
        merged=rollout.merged,
        features=features,
        prompts=0,
        pool=pool,
        update=resident + pool + peak - (shards.gradients if host else 0.0),
        optimizer=resident + pool + gradients + step,
        rollout=resident - features + shards.whole + sampled if work.samples else 0.0,
        host=states + reference if host else 0.0,
    )


def rollout_bytes(work: Workload, rollout: RolloutTrace, *, shared: bool = False, graph: bool = False) -> int:
    """Peak of a rollout above resident memory, including its images' features. It occurs in the vision tower, during
    prefill, or when the first tokens are sampled (keys and values of all answers are allocated by then).

    ``shared``: features stay for the passes of the update; otherwise each chunk's are freed before it decodes.
    ``graph``: a later chunk is prefilled beside the answers' buffers of the chunk before, which it uses again.
    """
    prompts = work.prompts * work.steps_at_once if shared else work.prompts_at_once
    features = rollout.features * prompts
    held = 0
    if graph and work.prompts * work.steps_at_once > work.prompts_at_once:
        own = min(own_keys(work.answer_tokens), OWN_BLOCK) * rollout.token + rollout.state
        held = work.prompts_at_once * work.group * own
    reading = features + held + max(rollout.vision, kv_bytes(work, rollout, own=False) + rollout.language)
    return max(reading, (features if shared else 0) + kv_bytes(work, rollout) + rollout.first + rollout.drawing)


def kv_bytes(work: Workload, rollout: RolloutTrace, *, own: bool = True) -> int:
    """Bytes of keys, values and recurrent states of the prompts that are answered together, and (``own``) of their
    answers, each with a state of its own."""
    rows = work.group if own else 0
    keys = work.prompt_tokens + rows * own_keys(work.answer_tokens)
    return work.prompts_at_once * (keys * rollout.token + (1 + rows) * rollout.state)


def work_of(
    recipe: Recipe,
    model: Model,
    work: Workload,
    traced: Trace,
    rollout: RolloutTrace,
    gpu: Gpu,
    efficiency: float,
    *,
    whole: Trace,
) -> Work:
    """FLOPs, bytes and seconds of one step (see :class:`Work`). ``traced``: a micro-batch of full groups; ``whole``:
    the same without kept prompts, as the reference computes it."""
    batches = work.prompts / work.groups_per_batch
    flops = dict.fromkeys(PHASES, 0.0)
    traffic = dict.fromkeys((*PHASES, "optimizer"), 0.0)
    read = 0.0
    if work.samples:
        prompt, answer, rows = work.prompt_tokens, work.answer_tokens, work.rows
        layers, head, pair = rollout.token_flops, rollout.head_flops, rollout.pair_flops
        flops["prefill"] = work.prompts * (prompt * (layers + prompt * pair) + head)
        flops["decode"] = rows * answer * (layers + head + (prompt + answer // 2) * pair) + rollout.merge_flops
        traffic["prefill"] = work.prompts * prompt * rollout.token_traffic
        traffic["decode"] = rows * answer * (rollout.token_traffic + rollout.draw_traffic) + rollout.merge_traffic
        read = decode_bytes(model, work, rollout)
    if work.samples or not model.trains_vision:
        flops["vision"], traffic["vision"] = batches * traced.vision_flops, batches * traced.vision_traffic
    # a frozen tower, and one that is kept, runs once for all passes
    again = (traced.vision_flops, traced.vision_traffic) if model.trains_vision else (0, 0)
    forward, moves = traced.forward_flops, traced.forward_traffic
    if not traced.prompt:
        forward, moves = forward + again[0], moves + again[1]
    if reads_reference(recipe):
        flops["reference"] = batches * (whole.forward_flops + again[0])
        traffic["reference"] = batches * (whole.forward_traffic + again[1])
    passes = recipe.optim.updates_per_batch * batches
    flops["forward"], traffic["forward"] = passes * forward, passes * moves
    flops["backward"], traffic["backward"] = passes * traced.backward_flops, passes * traced.backward_traffic
    update = moved(recipe.optim, recipe.engine, itemsize=model.itemsize, micro_batches=work.micro_batches)
    numbers = recipe.optim.updates_per_batch * model.trainable
    arithmetic = {name: value / (gpu.flops * efficiency) for name, value in flops.items()}
    movement = {name: value / (gpu.bandwidth * efficiency) for name, value in traffic.items()}
    reading = read / (gpu.bandwidth * efficiency)
    if reading > arithmetic["decode"]:  # its products wait for what they read
        arithmetic["decode"], movement["decode"] = 0.0, movement["decode"] + reading
    rates = update.device / gpu.bandwidth + update.link / gpu.link + update.host / HOST_BANDWIDTH
    movement["optimizer"] = numbers * rates / efficiency
    traffic["decode"] += read
    traffic["optimizer"] = numbers * (update.device + update.link)
    total = sum(arithmetic.values()) + sum(movement.values())
    answers = work.prompts * work.group * work.answer_tokens
    return Work(
        flops=flops,
        traffic=traffic,
        arithmetic=arithmetic,
        movement=movement,
        answer_tokens_per_s=answers / total,
        tokens_per_s=(answers + work.prompts * work.prompt_tokens) / total,
    )


def decode_bytes(model: Model, work: Workload, rollout: RolloutTrace) -> float:
    """Bytes of weights, keys, values and states that a step's decoding reads; states are also written."""
    keys = work.prompts * work.prompt_tokens + work.rows * work.answer_tokens / 2
    # A product reads packed numbers, writes the unpacked weight and reads it
    weights = (model.language + model.quantized) * model.itemsize + PACKED * model.quantized
    return work.answer_tokens * (weights + keys * rollout.token + 2 * work.rows * rollout.state)
