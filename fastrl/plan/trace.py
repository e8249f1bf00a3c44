"""One micro-batch's forward and backward on the meta device: peak bytes and floating-point operations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.batch import PackedBatch
from fastrl.engine.optimizers import CHUNK
from fastrl.models.attention.prefix import use_prefix_attention
from fastrl.models.families import family_of
from fastrl.models.load import use_checkpointing
from fastrl.models.lora import add_lora, freeze
from fastrl.models.policy import keyed_features, predicted_states
from fastrl.plan.ledger import Ledger, planned_attention
from fastrl.recipe import ModelRecipe
from fastrl_kernels.linear_logprob import linear_logprob
from fastrl_kernels.linear_policy_loss import linear_policy_loss

META = torch.device("meta")


@dataclass(frozen=True)
class Trace:
    """Of one micro-batch. Bytes above what lives between steps (weights, copies, optimizer states); FLOPs.

    ``peak`` counts the gradients that exist at that moment; ``kept`` is what the forward leaves for the backward.
    """

    peak: int
    kept: int
    head_scratch: int
    vision_flops: int
    forward_flops: int  # language model and head
    backward_flops: int  # with what checkpointing computes again


def meta_model(config: dict[str, Any], recipe: ModelRecipe, dtype: torch.dtype) -> Any:
    """The model a recipe trains, as ``load_policy`` would make it, without any data behind its tensors."""
    family = family_of(config)
    with META:
        core = family.empty().to(dtype)
        if recipe.lora is not None:
            add_lora(core, recipe.lora.spec(), family)
    freeze(core, recipe.freeze, family.alias)
    if recipe.gradient_checkpointing:
        use_checkpointing(core, offload=recipe.offload_activations)
    use_prefix_attention(family, core)
    family.prepare(core)
    return core


def trace_batch(
    core: Any,
    batch: PackedBatch,
    *,
    gpu: bool,
    entropy: bool = False,
    row_local: bool = False,
    accumulates: bool = False,
    release: bool = False,
) -> Trace:
    """Run a micro-batch's training pass through ``core`` and count.

    Args:
        core: from :func:`meta_model`; its gradients are cleared.
        batch: on the host; only its shapes are read.
        gpu: count as a GPU would run it, else as a CPU.
        entropy: the head also gives entropies.
        row_local: head and loss make their gradients in the forward (``optim.row_local_head``).
        accumulates: gradients of an earlier micro-batch are there already.
        release: each gradient is used and dropped as soon as it is complete.
    """
    batch = _on_meta(batch)
    ledger = Ledger(_known(core, batch), gpu=gpu)
    gradients: dict[nn.Parameter, Tensor] = {}
    hooks = [_collect(p, gradients, ledger, release) for p in core.parameters() if p.requires_grad]
    vision = forward = kept = before = 0
    try:
        with planned_attention(core, gpu=gpu):
            for _ in range(1 + accumulates):
                ledger.peak, before = ledger.live, ledger.live
                ledger.flops = 0
                with ledger:
                    into = _head_gradient(core, gradients) if row_local and not release else None
                    head = _RowLocal(into) if row_local else _LogProb(entropy)
                    vision, forward, kept = _pass(core, batch, head, ledger)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in core.parameters():
            parameter.grad = None
    return Trace(
        peak=ledger.peak,
        kept=kept - before,
        head_scratch=ledger.head_scratch,
        vision_flops=vision,
        forward_flops=forward - vision,
        backward_flops=ledger.flops - forward,
    )


def trace_prompts(core: Any, batch: PackedBatch, *, gpu: bool) -> tuple[int, int]:
    """Peak bytes of the vision tower over the batch's images, and then of one forward over its prompts, both without
    gradients or a cache."""
    batch = _on_meta(batch)
    ledger = Ledger(_known(core, batch), gpu=gpu)
    with planned_attention(core, gpu=gpu), torch.no_grad(), ledger:
        features = keyed_features(core, batch.images)
        vision, ledger.peak = ledger.peak, ledger.live
        predicted_states(core, batch, features)
    return vision, ledger.peak


def _known(core: Any, batch: PackedBatch) -> list[Tensor]:
    tensors = [batch.input_ids, batch.positions, batch.image_rows, batch.predict_rows, batch.targets]
    return [*core.parameters(), *core.buffers(), *tensors, *(image.pixel_values for image in batch.images)]


def _pass(core: Any, batch: PackedBatch, head: _LogProb | _RowLocal, ledger: Ledger) -> tuple[int, int, int]:
    """Forward and backward; FLOPs after the vision tower and after the head, and the bytes alive between the two."""
    core.train()
    features = keyed_features(core, batch.images)
    vision = ledger.flops
    hidden = predicted_states(core, batch, features)
    del features
    result = head(hidden, core.get_output_embeddings().weight, batch)
    del hidden
    forward, kept = ledger.flops, ledger.live
    result.backward(torch.ones_like(result))
    return vision, forward, kept


@dataclass(frozen=True)
class _LogProb:
    """Log-probs [N], from which the loss makes its gradient."""

    entropy: bool

    def __call__(self, hidden: Tensor, weight: Tensor, batch: PackedBatch) -> Tensor:
        return linear_logprob(hidden, weight, batch.targets, return_entropy=self.entropy).logp


@dataclass(frozen=True)
class _RowLocal:
    """The loss, with the gradients of head and hidden states already made. ``into``: where the head's is summed."""

    into: Tensor | None

    def __call__(self, hidden: Tensor, weight: Tensor, batch: PackedBatch) -> Tensor:
        advantage = torch.empty(len(batch.completions), device=META)
        constant = torch.empty(len(batch.targets), device=META)
        return linear_policy_loss(
            hidden, weight, batch.targets, advantage, batch.completion_of_token, weight=constant, head_grad=self.into
        ).loss


def _head_gradient(core: Any, gradients: dict[nn.Parameter, Tensor]) -> Tensor | None:
    """The float32 sum that the engine keeps of the head's gradient; None where the head is not trained."""
    weight = core.get_output_embeddings().weight
    if not weight.requires_grad:
        return None
    if weight not in gradients:
        gradients[weight] = torch.zeros(weight.shape, device=META)
    return gradients[weight]


def _collect(parameter: nn.Parameter, gradients: dict[nn.Parameter, Tensor], ledger: Ledger, release: bool) -> Any:
    """What the engine does with a complete gradient: kept in float32, or used and dropped."""

    def use(p: nn.Parameter) -> None:
        if p.dtype != torch.float32:
            assert p.grad is not None
            made = gradients[p].add_(p.grad) if p in gradients else p.grad.float()
            p.grad = None
            if not release:
                gradients[p] = made
        if release:
            ledger.transient(adamw_scratch(p.numel(), gpu=ledger.gpu))
            p.grad = None

    return parameter.register_post_accumulate_grad_hook(use)  # type: ignore[arg-type]


def adamw_scratch(largest: int, *, gpu: bool, states: str = "fp32") -> int:
    """Bytes AdamW allocates for a moment, for a largest parameter of so many numbers: the fused kernel none, the plain
    loop the square root of the second moment and its quotient, the 8-bit one some chunks."""
    if states == "8bit":
        return 9 * 4 * min(largest, CHUNK)
    return 0 if gpu else 8 * largest


def _on_meta(batch: PackedBatch) -> PackedBatch:
    images = tuple(replace(image, pixel_values=image.pixel_values.to(META)) for image in batch.images)
    return replace(batch.to(META), images=images)
