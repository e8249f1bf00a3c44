"""Memory of a rank whose weights are sharded (``engine.kind: fsdp2``), and the bytes that ranks exchange in a step.

Both follow from the units that the engine gathers: each layer of the language model, and the rest at once. All bytes
are counted from the model's parameters; nothing is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from fastrl.engine.costs import FLOAT, moment_bytes

if TYPE_CHECKING:
    from fastrl.config.sections import EngineRecipe, OptimRecipe


class Unit(NamedTuple):
    """Weights that are gathered together: bytes as gathered of all and of the trained ones, and their number."""

    bytes: int
    trained_bytes: int
    trained: int
    largest: int = 0  # bytes of the largest one


class Shards(NamedTuple):
    """Bytes of one rank: what it keeps, and what is whole for a time.

    ``unreduced``: whole gradients of micro-batches before the last (``engine.reduce_gradients: last``).
    ``whole``: all weights, in a rollout. In a micro-batch, beside its activations: ``rest``, the weights and gradients
    that are gathered once; ``layers``, those of the layer that computes and of the next one. ``reducing``: the rest's
    gradients while they are reduced, when its activations are gone.
    """

    weights: float
    moments: float
    gradients: float
    unreduced: float
    whole: float
    rest: float
    layers: float
    reducing: float
    copies: float = 0.0

    def update(
        self, kept: float, backward: float, scratch: float, *, accumulates: bool, reduces_last: bool = False, **_: bool
    ) -> float:
        """Peak of a micro-batch above what lives between updates.

        Args:
            kept: bytes of activations when the backward begins.
            backward: peak of one process's backward, without gradients.
            scratch: of the head.
            accumulates: an earlier micro-batch has left its gradients.
            reduces_last: they are whole.
        """
        gradients = self.unreduced if accumulates and reduces_last else self.gradients
        begun = gradients if accumulates else 0.0
        head, layer = kept + scratch + self.rest + begun, kept + self.rest + self.layers + begun
        return max(head, layer, backward + self.rest + self.layers + gradients, self.reducing + gradients)


class Partitions(NamedTuple):
    """``Shards`` of DeepSpeed's ZeRO 3: the trained weights are kept in their own type and, once more, in float32.

    ``gradients``: the reduced ones, which live from the first update on. ``rest``: weights that are gathered once in a
    micro-batch; ``layer``, ``layers``: of the largest layer, of all. ``unreduced``: a micro-batch's gradients.
    """

    weights: float
    copies: float
    moments: float
    gradients: float
    unreduced: float
    whole: float
    rest: float
    layer: float
    layers: float

    def update(self, kept: float, backward: float, scratch: float, *, recomputes: bool, **_: bool) -> float:
        """As that of ``Shards``.

        Args:
            kept, backward, scratch: as there.
            recomputes: activations are checkpointed. If not, the backward of a layer's products holds its weights.
        """
        head = kept + scratch + self.rest + (self.layer if recomputes else self.layers)
        return self.gradients + max(
            head,
            backward + self.rest + self.layer + self.unreduced,
            self.rest + self.layer + 2 * self.unreduced,  # they are copied in the order of the ranks
        )


class Network(NamedTuple):
    """Bytes that each rank receives in a step: weights and gradients."""

    weights: float
    gradients: float


def units_of(core: Any, layers: Sequence[nn.Module]) -> tuple[Unit, ...]:
    """The units of a model (on any device): the rest first, then the layers."""
    inside = [list(layer.parameters()) for layer in layers]
    known = {id(parameter) for parameters in inside for parameter in parameters}
    rest = [parameter for parameter in core.parameters() if id(parameter) not in known]
    return tuple(_unit(parameters) for parameters in (rest, *inside))


def _unit(parameters: Sequence[nn.Parameter]) -> Unit:
    trained = [p for p in parameters if p.requires_grad]
    return Unit(
        sum(p.numel() * p.element_size() for p in parameters),
        sum(p.numel() * p.element_size() for p in trained),
        sum(p.numel() for p in trained),
        max((p.numel() * p.element_size() for p in parameters), default=0),
    )


def shards_of(units: Sequence[Unit], optim: OptimRecipe, ranks: int) -> Shards:
    """What FSDP2 holds on one of so many ranks. Two layers are gathered at a time: one computes, the next arrives."""
    rest, *layers = units
    trained = sum(unit.trained for unit in units)
    frozen = sum(unit.bytes - unit.trained_bytes for unit in units)
    layer = max(layers, key=lambda unit: unit.bytes)
    return Shards(
        weights=(frozen + FLOAT * trained) / ranks,
        moments=moment_bytes(optim.states) * trained / ranks,
        gradients=FLOAT * trained / ranks,
        unreduced=FLOAT * trained,
        whole=sum(unit.bytes for unit in units) + max(unit.bytes for unit in layers),  # and a gathering's buffer
        rest=rest.bytes + rest.trained_bytes,
        layers=2 * layer.bytes + layer.trained_bytes,
        reducing=rest.trained_bytes + FLOAT * rest.trained,
    )


def partitions_of(units: Sequence[Unit], optim: OptimRecipe, ranks: int) -> Partitions:
    """What ZeRO 3 holds on one of so many ranks."""
    rest, *layers = units
    trained, low = sum(unit.trained for unit in units), sum(unit.trained_bytes for unit in units)
    whole = sum(unit.bytes for unit in units)
    return Partitions(
        weights=whole / ranks,
        copies=FLOAT * trained / ranks,
        moments=moment_bytes(optim.states) * trained / ranks,
        gradients=low / ranks,
        unreduced=low,
        whole=whole + max(unit.largest for unit in units),  # and the buffer of one
        rest=rest.bytes,
        layer=max(unit.bytes for unit in layers),
        layers=sum(unit.bytes for unit in layers),
    )


def network_of(
    units: Sequence[Unit],
    engine: EngineRecipe,
    ranks: int,
    *,
    passes: int,
    updates: int,
    rollouts: int,
) -> Network:
    """Bytes that each of so many ranks receives in a step, and sends: those of a ring.

    Args:
        units: of the model.
        engine: of the recipe. ``fsdp2`` and ZeRO 3 gather layers twice and the rest once in each pass, and everything
            for a rollout; ZeRO 1 and 2 only send weights after an update.
        passes: micro-batches that are trained in a step, in all its updates.
        updates: of a step.
        rollouts: rollouts and reference passes, which gather everything under ``fsdp2``.
    """
    part = (ranks - 1) / ranks
    rest, *layers = units
    whole, twice = sum(unit.bytes for unit in units), 2 * sum(unit.bytes for unit in layers)
    trained = sum(unit.trained for unit in units)
    low = sum(unit.trained_bytes for unit in units)
    if engine.kind == "fsdp2":
        reductions = updates if engine.reduce_gradients == "last" else passes
        return Network(part * (passes * (twice + rest.bytes) + rollouts * whole), part * reductions * FLOAT * trained)
    if engine.kind == "deepspeed" and engine.zero_stage == 3:
        return Network(part * (passes * (twice + rest.bytes) + rollouts * whole), part * passes * low)
    if engine.kind == "deepspeed" and engine.zero_stage == 2:
        return Network(part * updates * low, part * passes * low)
    if engine.kind == "deepspeed" and engine.zero_stage == 1:
        return Network(part * updates * low, 2 * part * updates * low)
    return Network(0.0, 2 * part * updates * low)


ENGINES = ("fsdp2", "zero0", "zero1", "zero2", "zero3", "local")


def engine_settings(name: str, ranks: int = 1) -> list[str]:
    """The recipe's settings, ``key=value``, for an engine by its name in ``fastrl plan --engine``.

    Raises:
        ValueError: the name is unknown, or that of an engine that fastrl does not have or that cannot have ``ranks``.
    """
    if name not in ENGINES:
        raise ValueError(f"--engine: expected one of {', '.join(ENGINES)}, got {name!r}")
    if name == "local" and ranks > 1:
        raise ValueError(f"--engine local: is one process on one GPU, got {ranks} GPUs; take fsdp2 or zero0 to zero3")
    if name == "local":
        return ["engine.kind=local"]
    several = ["optim.states=fp32", "optim.gradient_release=false"]
    if name == "fsdp2":
        return ["engine.kind=fsdp2", *several]
    return ["engine.kind=deepspeed", f"engine.zero_stage={name[-1]}", *several]
