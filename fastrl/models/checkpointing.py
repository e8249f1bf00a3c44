"""Activation checkpointing: what a layer computes again in the backward instead of keeping it.

Of a checkpointed layer (of the language model or the vision tower) only the input is kept, and its backward begins with
a second forward. Where ``products`` are kept, the results of all operators with FLOPs (matrix products, attention) are
kept too, and the second forward is norms, activations, rotary embeddings and sums, which take bytes but no arithmetic.
Either way the second forward makes the numbers of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

from torch import nn
from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from fastrl.models.flops import flop_counter
from fastrl.models.offload import offload_checkpoints

Kind = bool | Literal["products"]
_ATTENTION = ("flash_attn", "flash_attn_3", "torch_attn")  # namespaces of attention whose FLOPs torch does not know


def use_checkpointing(
    core: Any, kind: Kind = True, *, layers: Sequence[nn.Module] = (), count: int | None = None, offload: bool = False
) -> None:
    """Checkpoint a model's layers from now on.

    Args:
        core: the model.
        kind: True: keep only each layer's input; ``products``: and the results of products; False: keep everything.
        layers: the language model's, if ``count`` is given.
        count: how many of these are checkpointed, the first; the others keep everything. None: all. The vision tower's
            always are.
        offload: keep the layers' inputs on the host.
    """
    if kind is False:
        return
    # Renamed in transformers 5.2x; the old name still works there but warns.
    enable = getattr(core, "activation_checkpointing_enable", None) or core.gradient_checkpointing_enable
    enable({"use_reentrant": False, **({"context_fn": _keeping_products} if kind == "products" else {})})
    for layer in layers[count:] if count is not None else ():
        layer.gradient_checkpointing = False  # type: ignore[assignment]
    if offload:
        offload_checkpoints(core)


def _keeping_products() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    known = isinstance(operator, OpOverload) and (
        operator.overloadpacket in _products() or operator.namespace in _ATTENTION
    )
    return CheckpointPolicy.MUST_SAVE if known else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _products() -> frozenset[Any]:
    """Operators with FLOPs, as they are counted."""
    return frozenset(flop_counter().flop_registry)
