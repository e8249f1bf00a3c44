"""One micro-batch's forward and backward on the meta device: peak bytes and floating-point operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrl.batch import PackedBatch, Prompt, PromptGroup, pack_row
from fastrl.models.attention.prefix import use_prefix_attention
from fastrl.models.checkpointing import use_checkpointing
from fastrl.models.families import VisionFeatures, family_of
from fastrl.models.kept import KeptPrompts, keep_prompt, trained_features
from fastrl.models.lora import add_lora, freeze
from fastrl.models.merged import Merged
from fastrl.models.policy import keyed_features, predicted_states
from fastrl.plan.ledger import CpuAttention, GpuAttention, Ledger, planned_attention
from fastrl.plan.quantized import plan_quantized
from fastrl.recipe import ModelRecipe
from fastrl.rollout.cache import PromptCache
from fastrl.rollout.generator import prefill, rows_per_prompt, sampling_mode
from fastrl.rollout.limits import Limits
from fastrl.rollout.sampler import Sampling, sample
from fastrl_kernels.linear_logprob import linear_logprob
from fastrl_kernels.linear_policy_loss import linear_policy_loss

META = torch.device("meta")


@dataclass(frozen=True)
class Trace:
    """Bytes and FLOPs of one micro-batch. Bytes are above the state between steps (weights, copies, optimizer states).

    ``peak`` includes gradients that exist at that moment; ``kept`` is what the forward saves for the backward. Where
    prompts are kept from the rollout, the forward is that of the answers alone, the backward that of both, and ``peak``
    includes ``groups`` of the step's prompts.
    """

    peak: int
    kept: int
    head_scratch: int
    vision_flops: int
    forward_flops: int  # language model and head
    backward_flops: int  # including recomputation by checkpointing
    features: int = 0  # bytes of the features of a prompt's images
    vision_traffic: int = 0  # bytes moved by operators without FLOPs, of the same parts
    forward_traffic: int = 0
    backward_traffic: int = 0
    groups: int = 0  # prompts in the micro-batch
    prompt: int = 0  # bytes that are kept of one prompt
    reading: int = 0  # temporary bytes of a kept prompt's pass


@dataclass(frozen=True)
class RolloutTrace:
    """Peak bytes of a rollout's phases, above the state between steps, and FLOPs.

    ``token_flops`` are those of the layers without attention (only the experts that a token is routed to);
    ``pair_flops`` those of attention for one query and one key.
    """

    features: int = 0  # bytes of a prompt's features
    vision: int = 0  # bytes of the vision tower's largest call, without features
    language: int = 0  # bytes of one forward over prompts, without features, keys, values and states
    token: int = 0  # bytes of one token's keys and values
    state: int = 0  # bytes of one text's states in recurrent layers
    first: int = 0  # bytes of the logits after the prompts, without those sampled from first
    drawing: int = 0  # bytes of the logits of all rows that decode together, and temporaries of sampling
    token_flops: float = 0.0
    pair_flops: float = 0.0
    head_flops: float = 0.0  # logits of one row
    token_traffic: float = 0.0  # bytes moved for one token by layers' operators without FLOPs
    merged: int = 0  # bytes of merged weights
    merging: int = 0  # temporary bytes of making them
    merge_traffic: int = 0  # bytes moved by making them
    merge_flops: int = 0
    draw_traffic: float = 0.0  # and by sampling from the logits of one row


def meta_model(config: dict[str, Any], recipe: ModelRecipe, dtype: torch.dtype) -> Any:
    """The model that a recipe trains, as from ``load_policy``, on the meta device."""
    family = family_of(config)
    with META:
        core = family.empty().to(dtype)
        if recipe.lora is not None:
            add_lora(core, recipe.lora.spec(), family)
        if recipe.quantize is not None:
            plan_quantized(core, family)
    freeze(core, recipe.freeze, family.alias)
    checkpoint(core, recipe)
    use_prefix_attention(family, core)
    family.prepare(core)
    return core


def checkpoint(core: Any, recipe: ModelRecipe) -> None:
    """Checkpoint a model's layers as a recipe says; what ``auto`` means is decided before."""
    kind, layers = recipe.gradient_checkpointing, family_of(core.config).layers(core)
    if kind != "auto":
        use_checkpointing(
            core, kind, layers=layers, count=recipe.checkpointed_layers, offload=recipe.offload_activations
        )


def trace_batch(
    core: Any,
    batch: PackedBatch,
    *,
    gpu: bool,
    entropy: bool = False,
    row_local: bool = False,
    accumulates: bool = False,
    release: Callable[[int], int] | None = None,
) -> Trace:
    """Run a micro-batch's training pass through ``core`` and count.

    Args:
        core: from :func:`meta_model`; its gradients are cleared.
        batch: on the host; only its shapes are read.
        gpu: count as on a GPU, otherwise as on a CPU.
        entropy: the head also returns entropies.
        row_local: head and loss compute their gradients in the forward (``optim.row_local_head``).
        accumulates: gradients of an earlier micro-batch already exist.
        release: temporary bytes, by number of elements, to apply and free each gradient as soon as it is complete;
            None: gradients are kept.
    """
    batch = _on_meta(batch)
    ledger = Ledger(_known(core, batch), gpu=gpu)
    passed, before = _Pass(0, 0, 0, 0, 0, 0), 0
    with _collecting(core, ledger, release) as gradients, planned_attention(core, gpu=gpu):
        for _ in range(1 + accumulates):
            ledger.peak, before = ledger.live, ledger.live
            ledger.flops = ledger.traffic = 0
            with ledger:
                into = _head_gradient(core, gradients) if row_local and release is None else None
                head = _RowLocal(into) if row_local else _LogProb(entropy)
                passed = _pass(core, batch, head, ledger)
    return Trace(
        peak=ledger.peak,
        kept=passed.kept - before,
        head_scratch=ledger.head_scratch,
        vision_flops=passed.vision,
        forward_flops=passed.forward - passed.vision,
        backward_flops=ledger.flops - passed.forward,
        features=passed.features // batch.n_groups,
        vision_traffic=passed.vision_traffic,
        forward_traffic=passed.forward_traffic - passed.vision_traffic,
        backward_traffic=ledger.traffic - passed.forward_traffic,
        groups=batch.n_groups,
    )


def trace_kept(
    core: Any,
    groups: Sequence[PromptGroup],
    *,
    gpu: bool,
    entropy: bool = False,
    row_local: bool = False,
    accumulates: bool = False,
) -> Trace:
    """:func:`trace_batch` where the rollout's passes over prompts are kept (``fastrl.models.kept``): these passes, then
    the answers' forward and backward, then the prompts' backward.

    Args:
        groups: the micro-batch, on the host.
        accumulates: another micro-batch has used the gradients before.
    """
    batch = _on_meta(pack_row(groups))
    prompts = [group.prompt for group in groups]
    ledger = Ledger(_known(core, batch), gpu=gpu)
    kept, forward, moved, saved = KeptPrompts(), 0, 0, 0
    with _collecting(core, ledger, None) as gradients, planned_attention(core, gpu=gpu), ledger:
        read = _read(core, prompts, kept, ledger)
        for _ in range(1 + accumulates):
            head = _RowLocal(_head_gradient(core, gradients)) if row_local else _LogProb(entropy)
            before, ledger.flops, ledger.traffic = ledger.live, 0, 0
            hidden = predicted_states(core, batch, kept=kept.of(prompts))
            result = head(hidden, core.get_output_embeddings().weight, batch)
            del hidden
            forward, moved, saved = ledger.flops, ledger.traffic, ledger.live - before
            result.backward(torch.ones_like(result))
            del result
        rest = kept.rest()
        if rest is not None:
            rest.backward(torch.ones_like(rest))
    return Trace(
        peak=ledger.peak,
        kept=saved,
        head_scratch=ledger.head_scratch,
        vision_flops=read.vision,
        forward_flops=forward,
        backward_flops=ledger.flops - forward,
        features=read.features // len(groups),
        vision_traffic=read.vision_traffic,
        forward_traffic=moved,
        backward_traffic=ledger.traffic - moved,
        groups=len(groups),
        prompt=read.kept // len(groups),
        reading=read.temporary,
    )


def trace_prompt(core: Any, prompt: Prompt, *, gpu: bool) -> int:
    """Bytes that are kept of a prompt from rollout to update."""
    pixels = [image.pixel_values for image in prompt.images]
    ledger = Ledger([*core.parameters(), *core.buffers(), *pixels], gpu=gpu)
    with planned_attention(core, gpu=gpu), ledger:
        return _read(core, [prompt], KeptPrompts(), ledger).kept


class _Read(NamedTuple):
    """Of the passes over prompts: FLOPs of the vision tower and bytes it moves; bytes of features, of what is kept, and
    of temporaries."""

    vision: int
    vision_traffic: int
    features: int
    kept: int
    temporary: int


def _read(core: Any, prompts: Sequence[Prompt], kept: KeptPrompts, ledger: Ledger) -> _Read:
    vision = moved = size = temporary = 0
    begin = ledger.live
    for prompt in prompts:
        ledger.peak, before, begun = ledger.live, ledger.flops, ledger.traffic
        features = trained_features(core, prompt.images)
        vision, moved = vision + ledger.flops - before, moved + ledger.traffic - begun
        size += _bytes(features)
        kept.add(prompt, keep_prompt(core, prompt, features, META))
        del features
        temporary = max(temporary, ledger.peak - ledger.live)
    ledger.peak = ledger.live
    return _Read(vision, moved, size, ledger.live - begin, temporary)


def trace_rollout(
    core: Any, prompts: Sequence[Prompt], *, limits: Limits, sampling: Sampling, gpu: bool, merge: bool = False
) -> RolloutTrace:
    """Run the largest calls of a rollout through ``core``, as the generator makes them, and count.

    Args:
        core: from :func:`meta_model`.
        prompts: prompts that are answered together (a chunk of ``limits``), with ``sampling.n`` completions each.
        limits: the generator's limits.
        sampling: sampling options; the length is ignored.
        gpu: count as on a GPU, otherwise as on a CPU.
        merge: sample with merged adapters.
    """
    family, rows = family_of(core.config), len(prompts) * rows_per_prompt(sampling)
    images = [image for prompt in prompts for image in prompt.images]
    first = [prompts[i] for i in next(limits.prefill_calls([len(p.token_ids) for p in prompts]))]
    read = {image.key for prompt in first for image in prompt.images}
    features: dict[str, VisionFeatures] = {}
    ledger = Ledger([*core.parameters(), *core.buffers(), *(image.pixel_values for image in images)], gpu=gpu)
    attention = GpuAttention() if gpu else CpuAttention()
    with ledger:
        copy = Merged(core) if merge else None
    merged, merging = ledger.live, ledger.peak - ledger.live
    merge_traffic, merge_flops, ledger.peak = ledger.traffic, ledger.flops, ledger.live
    with planned_attention(core, gpu=gpu), sampling_mode(core, copy), attention, ledger:
        for call in limits.vision_calls([family.patches(image) for image in images]):
            if features and read <= features.keys():
                break
            features |= keyed_features(core, [images[i] for i in call])
        kept = ledger.live
        vision, ledger.peak = ledger.peak - kept, kept
        ledger.flops = ledger.attention_flops = ledger.traffic = 0
        cache = PromptCache(len(first))
        ends = prefill(core, cache, list(range(len(first))), first, features, META)
        tokens = len(first) * cache.capacity
        linear, attended = ledger.flops - ledger.attention_flops, ledger.attention_flops
        language, moved = ledger.peak - kept - cache.bytes, ledger.traffic
        states = ends.new_empty(rows, ends.shape[1])
        before = ledger.peak = ledger.live
        ledger.flops = ledger.traffic = 0
        logits = family.parts(core).head(states)
        uniform = torch.empty(rows, dtype=torch.float64, device=META)
        sample(logits, sampling, uniform, torch.empty(0, dtype=torch.int64, device=META))
    return RolloutTrace(
        features=_bytes(features) * len(images) // max(1, len(features) * len(prompts)),
        vision=vision,
        language=language,
        token=cache.token_bytes,
        state=cache.state_bytes,
        first=len(prompts) * logits.shape[1] * logits.element_size(),
        drawing=ledger.peak - before,
        token_flops=linear / tokens,
        pair_flops=attended / (tokens * cache.capacity),
        head_flops=ledger.flops / rows,
        token_traffic=moved / tokens,
        draw_traffic=ledger.traffic / rows,
        merged=merged,
        merging=merging,
        merge_traffic=merge_traffic,
        merge_flops=merge_flops,
    )


def _bytes(features: Mapping[str, VisionFeatures]) -> int:
    return sum(level.numel() * level.element_size() for found in features.values() for level in (found[0], *found[1]))


def _known(core: Any, batch: PackedBatch) -> list[Tensor]:
    tensors = [batch.input_ids, batch.positions, batch.image_rows, batch.predict_rows, batch.targets]
    return [*core.parameters(), *core.buffers(), *tensors, *(image.pixel_values for image in batch.images)]


class _Pass(NamedTuple):
    """FLOPs up to the end of the vision tower and of the head, bytes alive after the forward and of features, and
    bytes moved up to the same ends."""

    vision: int
    forward: int
    kept: int
    features: int
    vision_traffic: int
    forward_traffic: int


def _pass(core: Any, batch: PackedBatch, head: _LogProb | _RowLocal, ledger: Ledger) -> _Pass:
    core.train()
    features = keyed_features(core, batch.images)
    vision, vision_traffic = ledger.flops, ledger.traffic
    size = _bytes(features)
    hidden = predicted_states(core, batch, features)
    del features
    result = head(hidden, core.get_output_embeddings().weight, batch)
    del hidden
    forward, kept, moved = ledger.flops, ledger.live, ledger.traffic
    result.backward(torch.ones_like(result))
    return _Pass(vision, forward, kept, size, vision_traffic, moved)


@dataclass(frozen=True)
class _LogProb:
    """Log-probs [N], from which the loss computes its gradient."""

    entropy: bool

    def __call__(self, hidden: Tensor, weight: Tensor, batch: PackedBatch) -> Tensor:
        return linear_logprob(hidden, weight, batch.targets, return_entropy=self.entropy).logp


@dataclass(frozen=True)
class _RowLocal:
    """The loss, with gradients of head and hidden states from the forward; ``into`` accumulates the head's."""

    into: Tensor | None

    def __call__(self, hidden: Tensor, weight: Tensor, batch: PackedBatch) -> Tensor:
        advantage = torch.empty(len(batch.completions), device=META)
        constant = torch.empty(len(batch.targets), device=META)
        return linear_policy_loss(
            hidden, weight, batch.targets, advantage, batch.completion_of_token, weight=constant, head_grad=self.into
        ).loss


def _head_gradient(core: Any, gradients: dict[nn.Parameter, Tensor]) -> Tensor | None:
    """The float32 tensor in which the engine accumulates the head's gradient; None if the head is not trained."""
    weight = core.get_output_embeddings().weight
    if not weight.requires_grad:
        return None
    if weight not in gradients:
        gradients[weight] = torch.zeros(weight.shape, device=META)
    return gradients[weight]


@contextmanager
def _collecting(
    core: Any, ledger: Ledger, release: Callable[[int], int] | None
) -> Iterator[dict[nn.Parameter, Tensor]]:
    """In a block, treat gradients as the engine does; the model's are gone afterwards."""
    gradients: dict[nn.Parameter, Tensor] = {}
    hooks = [_collect(p, gradients, ledger, release) for p in core.parameters() if p.requires_grad]
    try:
        yield gradients
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in core.parameters():
            parameter.grad = None


def _collect(
    parameter: nn.Parameter,
    gradients: dict[nn.Parameter, Tensor],
    ledger: Ledger,
    release: Callable[[int], int] | None,
) -> Any:
    """Treat complete gradients as the engine does: accumulate them in float32, or apply and free them."""

    def use(p: nn.Parameter) -> None:
        if p.dtype != torch.float32:
            assert p.grad is not None
            made = gradients[p].add_(p.grad) if p in gradients else p.grad.float()
            p.grad = None
            if release is None:
                gradients[p] = made
        if release is not None:
            ledger.transient(release(p.numel()))
            p.grad = None

    return parameter.register_post_accumulate_grad_hook(use)  # type: ignore[arg-type]


def _on_meta(batch: PackedBatch) -> PackedBatch:
    images = tuple(replace(image, pixel_values=image.pixel_values.to(META)) for image in batch.images)
    return replace(batch.to(META), images=images)
