"""The interface of an engine for the trainer (backward · step · save · load), and code common to all engines: the
learning-rate schedule and the parameter groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from fastrl.engine.names import matches, unchanged

if TYPE_CHECKING:
    from fastrl.config.sections import OptimRecipe


T = TypeVar("T")


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a finite number."""


class StepInfo(NamedTuple):
    """One optimizer update: the gradient's norm before clipping, and the learning rate of the first group."""

    grad_norm: float
    lr: float


class Shardable(NamedTuple):
    """A model whose weights an engine may shard: ``module``, and those of its modules that are gathered one by one."""

    module: nn.Module
    layers: Sequence[nn.Module]


class Engine(Protocol):
    """The interface of an engine. ``rank`` and ``world_size`` count data-parallel processes, ``updates`` the updates
    made; ``any_ranks``: it loads what another number of ranks has saved."""

    any_ranks: bool
    rank: int
    world_size: int
    updates: int

    def forward(self, work: Callable[[], T]) -> T:
        """Call ``work``, whose result :meth:`backward` will differentiate. All ranks call this equally often."""
        ...

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of ``loss``; ``last``: the next call is :meth:`step`."""
        ...

    def step(self) -> StepInfo:
        """Clip, update and clear gradients. A non-finite gradient raises ``NonFiniteError``; weights are unchanged."""
        ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None:
        """Restore what :meth:`save` wrote. Raises ``ValueError``, which names the file, if it does not fit this
        engine."""
        ...

    def saved_bytes(self) -> int:
        """Approximate number of bytes that :meth:`save` writes, for all ranks together."""
        ...

    def gradient_of(self, parameter: Tensor) -> Tensor | None:
        """The float32 gradient that :meth:`step` will read, zeros if there is none yet; None: not accessible."""
        ...

    def gathered(self, module: nn.Module) -> AbstractContextManager[None]:
        """A context in which ``module``, the policy's core or its reference, has whole weights, without gradients."""
        ...

    def whole(self, core: nn.Module, state: Callable[[], Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Each weight of a core in turn, complete and in the type that it computes with. ``state`` reads those that are
        wanted, by their names in the core. All ranks iterate to the end, over the same names."""
        ...

    def average(self, value: float) -> float: ...

    def maximum(self, value: float) -> float: ...

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of each rank, in the order of ranks."""
        ...

    def barrier(self) -> None: ...

    def abandon(self, error: str) -> None:
        """Called on a rank that ends with ``error``, so that no other waits for it."""
        ...

    def close(self) -> None:
        """Called on every rank at the end of a successful run."""
        ...


def lr_scale(update: int, optim: OptimRecipe) -> float:
    """Factor on the learning rate of update number ``update`` (from 0): linear warm-up, then constant or cosine."""
    total = optim.steps * optim.updates_per_batch
    warmup = math.ceil(optim.warmup * total) if optim.warmup < 1 else int(optim.warmup)
    if update < warmup:
        return (update + 1) / warmup
    if optim.schedule == "constant":
        return 1.0
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(
    model: nn.Module, optim: OptimRecipe, alias: Callable[[str], str] = unchanged
) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and weight decay, with their names, in the order the model lists them.

    ``alias`` replaces a name's prefix by the name of its part of the model (see ``fastrl.engine.names.matches``).

    Raises:
        ValueError: nothing is trainable, or a pattern of ``optim.groups`` names no trainable parameter.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("nothing to train: every parameter is frozen (model.freeze, model.lora)")
    for number, group in enumerate(optim.groups):
        if not any(matches(group.match, name, alias) for name, _ in trainable):
            parts = sorted({part for name, _ in trainable for part in name.split(".") if not part.isdigit()})
            raise ValueError(
                f"optim.groups.{number}.match: {group.match!r} names no trainable parameter; "
                f"parts of names: {', '.join(parts)}"
            )
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in trainable:
        chosen = next((g for g in optim.groups if matches(g.match, name, alias)), None)
        lr = chosen.lr if chosen is not None and chosen.lr is not None else optim.lr
        decay = chosen.weight_decay if chosen is not None and chosen.weight_decay is not None else optim.weight_decay
        decay = decay if parameter.ndim >= 2 else 0.0
        group = groups.setdefault(
            (lr, decay), {"params": [], "names": [], "lr": lr, "weight_decay": decay, "base_lr": lr}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
