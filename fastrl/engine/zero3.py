"""DeepSpeed's ZeRO 3 as an engine: weights are partitioned too, and gathered by layers as ``fsdp2`` does.

DeepSpeed's own hooks gather one module at a time when it is called. Heads and fused layers read weights of modules
that nobody calls, and ranks make different numbers of calls in a rollout. So these hooks are removed, and weights are
gathered here: a layer of the language model while it computes, the rest once in a micro-batch, everything for a
rollout, an evaluation, a reference pass and the export. DeepSpeed keeps what it does with gradients and the update.

Gradients of a micro-batch are reduced when its backward is done, in one operation: on ranks with and without pictures
they become ready in different orders, and DeepSpeed's buckets would then hold different weights on different ranks.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrl.engine.base import NonFiniteError, Shardable, StepInfo, T
from fastrl.engine.costs import FLOAT, moment_bytes
from fastrl.engine.deepspeed import DeepSpeedEngine
from fastrl.engine.names import unchanged
from fastrl.engine.pieces import MOMENTS, Layout, Piece, read_together, rows_of, write_layout, write_pieces

if TYPE_CHECKING:
    from fastrl.config.sections import EngineRecipe, OptimRecipe


class Zero3Engine(DeepSpeedEngine):
    """Data-parallel training with partitioned weights through ``deepspeed.initialize``.

    Args:
        model: has the parameters to train, by name.
        optim, engine: sections of the recipe.
        folder: accessible to all ranks, in which they record their progress (see ``fastrl.engine.watch``).
        alias: see ``parameter_groups``.
        cores: the policy's core first, then frozen copies of it.
    """

    any_ranks = True

    def __init__(
        self,
        model: nn.Module,
        optim: OptimRecipe,
        engine: EngineRecipe,
        folder: Path,
        *,
        alias: Callable[[str], str] = unchanged,
        cores: Sequence[Shardable] = (),
    ) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(model, optim, engine, folder, alias=alias)
        self._trained: dict[str, Any] = trained
        self._engine.optimizer.parameter_offload.destroy()  # its module hooks
        cores = cores or [Shardable(model, ())]
        known: Any = next(cores[0].module.parameters())
        for core in cores[1:]:
            if plain := [p for p in core.module.parameters() if "ds_id" not in vars(p)]:
                known.convert_to_zero_parameters(param_list=plain)
        self._units = {core.module: Units(core) for core in cores}
        self._root = next(iter(self._units.values()))

    def forward(self, work: Callable[[], T]) -> T:
        """Call ``work``, whose result :meth:`backward` will differentiate. All ranks call this equally often."""
        with self._ranks.joined("the weights of a micro-batch", computes=True):
            self._engine.optimizer.clear_backward_seen_flag()  # as DeepSpeed's forward: gradients add up from here
            self._root.begin()
            return work()

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of ``loss``, reduced over ranks."""
        super().backward(self._root.touch(loss), last=last)
        self._root.end()

    def step(self) -> StepInfo:
        """Clip, update and clear gradients. A gradient that is not finite on any rank is an error on all."""
        total = sum(float(self._gradient(p).double().square().sum()) for p in self._trained.values())
        if not math.isfinite(self.average(total)):
            self._engine.optimizer.zero_grad()
            raise NonFiniteError("the gradient holds numbers that are not finite")
        return super().step()

    def _gradient(self, parameter: Any) -> Tensor:
        """This rank's part of a reduced gradient."""
        return self._engine.optimizer.get_local_fp32_grad_for_param(parameter)

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """A context in which ``module``, one of the cores, has whole weights. All ranks enter it; inside, calls of the
        model need no other rank."""
        with self._ranks.joined("the weights of a rollout", computes=True):
            self._units[module].enter()
        try:
            yield
        finally:
            self._units[module].leave()

    def save(self, folder: Path) -> None:
        """Every rank writes its part (see ``fastrl.engine.pieces``)."""
        optimizer = self._engine.optimizer
        moments = self.updates > 0
        write_pieces(
            folder,
            self.rank,
            {
                name: Piece(
                    self._own(p, optimizer.get_local_fp32_param(p)),
                    {key: self._own(p, optimizer.get_local_fp32_param(p, key)) for key in MOMENTS if moments},
                )
                for name, p in self._trained.items()
            },
        )
        if self.rank == 0:
            steps = dict.fromkeys(self._trained, self.updates) if moments else {}
            write_layout(folder, Layout(self.world_size, self.updates, self._shapes, steps))

    def load(self, folder: Path) -> None:
        """Every rank reads its part, of a checkpoint by any number of ranks. If one cannot, all raise ``ValueError``
        and nothing has changed."""
        layout, pieces = read_together(folder, self._shapes, self._ranks)
        optimizer = self._engine.optimizer
        if layout.updates:
            for flat in optimizer.fp32_partitioned_groups_flat:
                zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
                optimizer.optimizer.state[flat] = {"step": torch.tensor(float(layout.updates)), **zeros}
        for name, (weight, moments) in pieces.items():
            parameter = self._trained[name]
            for key, part in [(None, weight), *moments.items()]:
                self._own(parameter, optimizer.get_local_fp32_param(parameter, key)).copy_(part)
            self._own(parameter, parameter.ds_tensor).copy_(weight)
        self.updates = layout.updates

    def _own(self, parameter: Any, part: Tensor) -> Tensor:
        """This rank's numbers of a parameter, without the padding."""
        first, last = rows_of(parameter.ds_numel, self.rank, self.world_size)
        return part.detach().view(-1)[: last - first]

    @property
    def _shapes(self) -> dict[str, list[int]]:
        return {name: [p.ds_numel] for name, p in self._trained.items()}

    def saved_bytes(self) -> int:
        """Weights in float32 and two moments, of all ranks."""
        return int(sum(p.ds_numel for p in self._trained.values()) * (FLOAT + moment_bytes(self.optim.states)))

    def close(self) -> None:
        if self._began:
            self._units, self._trained = {}, {}
            del self._root
            gc.collect()
        super().close()


class Units:
    """The units of one core, whose parameters are partitioned.

    Args:
        core: the model and its layers.
    """

    def __init__(self, core: Shardable) -> None:
        self._depth = 0
        self._parts = [list(layer.parameters()) for layer in core.layers]
        inside = {id(parameter) for part in self._parts for parameter in part}
        self.rest: list[Any] = [p for p in core.module.parameters() if id(p) not in inside]
        self.all: list[Any] = [*self.rest, *(p for part in self._parts for p in part)]
        for layer, part in zip(core.layers, self._parts, strict=True):
            self._watch(layer, part)

    def _watch(self, layer: nn.Module, part: list[Any]) -> None:
        """Gather a layer's weights before its forward and its backward, and free them after."""

        def after(_: nn.Module, __: Any, output: Any) -> None:
            if torch._C._current_graph_task_id() == -1:  # else it is computed again inside its own backward
                self._free(part)
            if torch.is_grad_enabled():
                hidden = output[0] if isinstance(output, tuple) else output
                if hidden.requires_grad:
                    hidden.register_hook(lambda _: self._turn_to(part))

        layer.register_forward_pre_hook(lambda *_: gather(part))
        layer.register_forward_hook(after)

    def _turn_to(self, part: list[Any]) -> None:
        """The backward comes to a layer: those behind it are done."""
        for other in self._parts:
            if other is not part:
                self._free(other)
        gather(part)

    def _free(self, part: Sequence[Any]) -> None:
        if not self._depth:
            free(part)

    def begin(self) -> None:
        """A micro-batch begins."""
        gather(self.rest)

    def touch(self, loss: Tensor) -> Tensor:
        """``loss`` with a gradient of 0 for every trained weight outside the layers, which another rank may use."""
        trained = [p.view(-1)[0] for p in self.rest if p.requires_grad]
        return loss + 0.0 * torch.stack([one.to(loss.dtype) for one in trained]).sum() if trained else loss

    def end(self) -> None:
        """A micro-batch's backward is done."""
        self._free(self.all)

    def enter(self) -> None:
        """Gather everything until :meth:`leave`."""
        self._depth += 1
        gather(self.all)

    def leave(self) -> None:
        self._depth -= 1
        self._free(self.all)


def gather(parameters: Sequence[Any]) -> None:
    """Make partitioned parameters whole; those that are stay so. All ranks call this."""
    missing = [p for p in dict.fromkeys(parameters) if p.ds_status.name == "NOT_AVAILABLE"]
    if missing:
        missing[0].all_gather(param_list=missing)


def free(parameters: Sequence[Any]) -> None:
    """Keep this rank's part of whole parameters."""
    whole = [p for p in dict.fromkeys(parameters) if p.ds_status.name == "AVAILABLE"]
    if whole:
        whole[0].partition(param_list=whole)
