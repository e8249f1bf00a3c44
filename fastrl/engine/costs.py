"""What an update holds and moves for each number that is trained: asked by the engines and by ``fastrl plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from fastrl.engine.optimizers import adamw_state

if TYPE_CHECKING:
    from fastrl.config.sections import EngineRecipe, OptimRecipe

FLOAT = torch.float32.itemsize  # of weights as the optimizer holds them, and of gradients
CLIPPING = 3 * FLOAT  # a gradient read for its norm, read and written to be clipped


class Held(NamedTuple):
    """Bytes of one number on one rank, beside the weights. A float32 weight is its own copy."""

    copy: float  # the float32 copy of a weight of another dtype
    moments: float
    gradient: float  # of the whole gradient, when the optimizer steps
    host: float


class Moved(NamedTuple):
    """Bytes of one number that an update moves: in the device's memory, between device and host, in the host's."""

    device: float
    link: float = 0.0
    host: float = 0.0


def moment_bytes(states: str) -> float:
    """Of both moments of one number, as the optimizer of ``optim.states`` keeps them."""
    like = torch.empty(1 << 16, device="meta")
    kept = [tensor for tensor in adamw_state(like, states).values() if tensor.ndim]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept) / like.numel()


def on_host(optim: OptimRecipe, engine: EngineRecipe) -> bool:
    """Whether the optimizer steps on the host, where it keeps its float32 weights, gradients and moments."""
    return optim.states == "offload" or engine.offload_optimizer


def gradients_leave(optim: OptimRecipe, *, micro_batches: int) -> bool:
    """Whether the device never has all gradients at once: each is used, or moved away, as soon as it is complete."""
    return optim.states == "offload" or (optim.gradient_release and micro_batches == 1)


def held(optim: OptimRecipe, engine: EngineRecipe, *, ranks: int = 1, micro_batches: int = 1) -> Held:
    """What lives between updates, and the gradient at the end of one.

    Args:
        optim, engine: of the recipe.
        ranks: data-parallel, among which ``engine.zero_stage`` divides states (1) and gradients (2).
        micro_batches: of an update.
    """
    stage = engine.zero_stage if ranks > 1 else 0
    among = ranks if stage > 0 else 1
    moments = moment_bytes(optim.states) / among
    gradient = 0.0 if gradients_leave(optim, micro_batches=micro_batches) else FLOAT / (ranks if stage == 2 else 1)
    if on_host(optim, engine):
        return Held(0.0, 0.0, gradient, host=2 * FLOAT / among + moments)
    return Held(FLOAT / among, moments, gradient, host=0.0)


def moved(optim: OptimRecipe, engine: EngineRecipe, *, itemsize: int, micro_batches: int = 1) -> Moved:
    """What one update moves: clipping, gradient, moments and float32 weights in and out, the weight.

    ``itemsize``: bytes of the weight.
    """
    update = CLIPPING + FLOAT + 2 * moment_bytes(optim.states) + 2 * FLOAT
    if not on_host(optim, engine):
        return Moved(update + itemsize)
    crossing = itemsize * (micro_batches + 1)  # each micro-batch's gradient out, the weight back
    return Moved(0.0, link=crossing, host=update)
