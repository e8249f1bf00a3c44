"""torch's FSDP2 (``fully_shard``) as an engine: weights, gradients and moments are sharded over all ranks.

Each rank holds a part of every weight: of a trained one in float32, which the optimizer updates, of a frozen one in its
own type. In a micro-batch the language model's layers are gathered one by one, in forward and backward, and everything
else (embedding, head, norms, vision tower, projector) once; gradients are summed in float32. Rollouts, evaluations,
reference passes and the export read whole weights (:meth:`Fsdp2Engine.gathered`), because ranks make different numbers
of calls there, and a layer that is gathered in each call needs all ranks in it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from fastrl.engine.base import NonFiniteError, Shardable, StepInfo, lr_scale, parameter_groups
from fastrl.engine.costs import FLOAT, moment_bytes
from fastrl.engine.names import unchanged
from fastrl.engine.pieces import MOMENTS, Layout, Piece, read_together, write_layout, write_pieces
from fastrl.engine.ranks import OnRanks, Ranks, begin
from fastrl.engine.watch import Watch

if TYPE_CHECKING:
    from fastrl.config.sections import EngineRecipe, OptimRecipe

T = TypeVar("T")
FORWARD = "fastrl_forward"  # the method of a core that FSDP treats as its forward


class Fsdp2Engine(OnRanks):
    """Data-parallel training with sharded weights. Gradients are averaged over ranks.

    Args:
        model: has the parameters to train, by name.
        optim, engine: sections of the recipe.
        folder: accessible to all ranks, in which they record their progress (see ``fastrl.engine.watch``).
        alias: see ``parameter_groups``.
        cores: what is sharded: the policy's core first, then frozen copies of it.

    Raises:
        ValueError: there is no launcher, or nothing is trainable.
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
        if "RANK" not in os.environ and not dist.is_initialized():
            raise ValueError(
                "engine.kind: fsdp2 needs a launcher, one process per GPU: "
                "torchrun --nproc-per-node 8 -m fastrl.cli train ...; or use engine.kind: local"
            )
        self.optim = optim
        self.updates = 0
        self._reduce_last = engine.reduce_gradients == "last"
        groups = parameter_groups(model, optim, alias)
        self._device = groups[0]["params"][0].device
        self._began = begin(self._device, engine.timeout)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._watch = Watch(folder, self.rank, self.world_size, engine.timeout)
        self._watch.forget()
        torch.distributed.barrier()
        self._ranks = Ranks(self._watch, self._device)
        mesh = init_device_mesh(self._device.type, (self.world_size,))
        # the types that the core computes with, before its trained weights become float32
        core = cores[0].module if cores else model
        self._types = {name: parameter.dtype for name, parameter in core.named_parameters(remove_duplicate=False)}
        self._units = {
            core.module: shard(core, mesh, offload=engine.offload_optimizer) for core in cores or [Shardable(model, ())]
        }
        self._depth = dict.fromkeys(self._units, 0)
        self._root: Any = next(iter(self._units))
        named = dict(model.named_parameters())
        self._sharded: dict[str, Any] = {name: named[name] for group in groups for name in group["names"]}
        # The optimizer sees plain tensors, which share their storage with the shards.
        self._local = {name: nn.Parameter(shards.to_local().detach()) for name, shards in self._sharded.items()}
        for group in groups:
            group["params"] = [self._local[name] for name in group.pop("names")]
        fused = next(iter(self._local.values())).is_cuda
        self._optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)
        self._alone = _own_parameters(self._root, self._sharded)
        self._used = dict.fromkeys(self._alone, False)  # whether a parameter had a gradient since the last update
        self._hooked: set[str] = set()
        self._make_forward()

    def _make_forward(self) -> None:
        """Make the policy's core the root of its layers: FSDP takes the module whose forward it sees first."""

        def run(core: nn.Module, work: Callable[[], T]) -> T:
            if torch.is_grad_enabled():
                self._fill_gradients()
            return work()

        for core in self._units:
            setattr(core, FORWARD, MethodType(run, core))
            register_fsdp_forward_method(core, FORWARD)
            with torch.no_grad(), self._ranks.joined("the weights of the model"):
                getattr(core, FORWARD)(lambda: None)
            for unit in self._units[core]:
                unit.reshard()

    def _fill_gradients(self) -> None:
        """Give every parameter that is gathered once per micro-batch a gradient: FSDP reduces those that have one, and
        on another rank it may be another number (a micro-batch without pictures)."""
        for name, (module, leaf) in self._alone.items():
            parameter = getattr(module, leaf)
            if name not in self._hooked:
                self._hooked.add(name)
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._used.update({name: True}))
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def forward(self, work: Callable[[], T]) -> T:
        """Call ``work``, whose result :meth:`backward` will differentiate. All ranks call this equally often."""
        with self._ranks.joined("the weights of a micro-batch", computes=True):
            return getattr(self._root, FORWARD)(work)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of ``loss``, reduced over ranks (``engine.reduce_gradients: last``: only in the ``last``
        one, until which whole gradients stay here)."""
        self._root.set_requires_gradient_sync(last or not self._reduce_last)
        with self._ranks.joined("the gradients of a micro-batch", computes=True):
            loss.backward()

    def step(self) -> StepInfo:
        """Clip, update and clear gradients. A gradient that is not finite on any rank is an error on all."""
        for name, shards in self._sharded.items():
            self._local[name].grad = shards.grad.to_local() if shards.grad is not None else None
        squares, used = self._totals()
        for name in self._alone:
            if name not in used:  # as on one process, where it has no gradient
                self._local[name].grad = None
        norm = math.sqrt(squares) if squares >= 0 else math.nan
        if not math.isfinite(norm):
            self.clear()
            raise NonFiniteError(f"the gradient norm is {norm}")
        if self.optim.clip_norm is not None:
            total = torch.tensor(norm, device=self._shards_device)
            torch.nn.utils.clip_grads_with_norm_(self._local.values(), self.optim.clip_norm, total)
        scale = lr_scale(self.updates, self.optim)
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale
        self._optimizer.step()
        self.clear()
        self.updates += 1
        return StepInfo(grad_norm=norm, lr=float(self._optimizer.param_groups[0]["lr"]))

    @property
    def _shards_device(self) -> torch.device:
        return next(iter(self._local.values())).device

    def _totals(self) -> tuple[float, set[str]]:
        """Squared norm of the gradient over all ranks, and which of the parameters outside layers any rank used."""
        gradients = [local.grad for local in self._local.values() if local.grad is not None and local.grad.numel()]
        norm = torch.nn.utils.get_total_norm(gradients).double() if gradients else torch.zeros((), dtype=torch.float64)
        used = torch.tensor([float(self._used[name]) for name in self._alone], dtype=torch.float64)
        together = torch.cat([norm.square().reshape(1).cpu(), used]).to(self._device)
        with self._ranks.joined("an update"):
            dist.all_reduce(together)
        squares, *counts = together.tolist()
        return squares, {name for name, count in zip(self._alone, counts, strict=True) if count > 0}

    def clear(self) -> None:
        """Drop all gradients."""
        for parameter in (*self._sharded.values(), *self._local.values()):
            parameter.grad = None
        self._used = dict.fromkeys(self._alone, False)

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """A context in which ``module``, one of the cores, has whole weights in the type that it computes with. All
        ranks enter it; inside, calls of the model need no other rank."""
        units = self._units[module]
        self._depth[module] += 1
        if self._depth[module] == 1:
            with self._ranks.joined("the weights of a rollout"):
                for unit in units:
                    unit.set_reshard_after_forward(False, recurse=False)
                    unit.unshard()
        try:
            yield
        finally:
            self._depth[module] -= 1
            if not self._depth[module]:
                for unit in units:
                    unit.reshard()
                    unit.set_reshard_after_forward(unit is not module, recurse=False)

    def whole(self, core: nn.Module, state: Callable[[], Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Each weight of the policy's core, gathered in turn (outside :meth:`gathered`, where they are whole)."""
        for name, value in state().items():
            if isinstance(value, DTensor):
                shards: Any = value.to(self._device)
                with self._ranks.joined("the weights for a server"), torch.no_grad():
                    value = shards.full_tensor().to(self._types[name])
            yield name, value

    def save(self, folder: Path) -> None:
        """Every rank writes its part (see ``fastrl.engine.pieces``)."""
        states = {name: self._optimizer.state.get(local, {}) for name, local in self._local.items()}
        pieces = {
            name: Piece(local, {key: states[name][key] for key in MOMENTS if states[name]})
            for name, local in self._local.items()
        }
        write_pieces(folder, self.rank, pieces)
        if self.rank == 0:
            moments = {name: int(state["step"]) for name, state in states.items() if state}
            write_layout(folder, Layout(self.world_size, self.updates, self._shapes, moments))

    def load(self, folder: Path) -> None:
        """Every rank reads its rows, of a checkpoint by any number of ranks. If one cannot, all raise ``ValueError``
        and nothing has changed."""
        layout, pieces = read_together(folder, self._shapes, self._ranks)
        fused = self._optimizer.defaults["fused"]
        for name, (weight, moments) in pieces.items():
            local = self._local[name]
            with torch.no_grad():
                local.copy_(weight)
            if moments:
                step = torch.tensor(float(layout.moments[name]), device=local.device if fused else "cpu")
                kept = {key: part.to(local.device) for key, part in moments.items()}
                self._optimizer.state[local] = {"step": step, **kept}
        self.updates = layout.updates

    @property
    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(shards.shape) for name, shards in self._sharded.items()}

    def saved_bytes(self) -> int:
        """Weights in float32 and two moments, of all ranks."""
        return int(sum(p.numel() for p in self._sharded.values()) * (FLOAT + moment_bytes(self.optim.states)))

    def gradient_of(self, parameter: Tensor) -> None:
        """A rank only has its part, and only after the backward."""
        return None

    def close(self) -> None:
        self._ranks.barrier()
        self._watch.close()
        if self._began:
            dist.destroy_process_group()


def shard(core: Shardable, mesh: DeviceMesh, *, offload: bool) -> list[FSDPModule]:
    """Shard a core's layers, each on its own, and then the rest of it; returns them, the core first.

    Args:
        core: its trained weights become float32, and are gathered in the type that they had.
        mesh: one dimension, over all ranks.
        offload: keep the shards on the host, where the optimizer updates them.
    """
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    units: list[Any] = []
    owned: set[nn.Parameter] = set()
    for module in (*core.layers, core.module):
        own = [p for p in module.parameters() if p not in owned]
        low = {p.dtype for p in own if p.requires_grad} - {torch.float32}
        for parameter in own:
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        precision = MixedPrecisionPolicy(
            param_dtype=next(iter(low), None), reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=precision,
            offload_policy=policy,
            reshard_after_forward=module is not core.module,
        )
        units.append(module)
        owned |= set(module.parameters())
    return units[::-1]


def _own_parameters(core: nn.Module, trained: dict[str, Any]) -> dict[str, tuple[nn.Module, str]]:
    """Module and attribute of each trained parameter that is outside the layers, by its name in ``trained``."""
    names = {parameter: name for name, parameter in trained.items()}
    layers = [module for module in core.modules() if isinstance(module, FSDPModule) and module is not core]
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    return {
        names[parameter]: (module, leaf)
        for module in core.modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter in names and parameter not in inside
    }
