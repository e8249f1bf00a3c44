"""DeepSpeed as an engine: data parallel with ZeRO 0 to 2. Imported only if a recipe names it."""

from __future__ import annotations

import gc
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrl.engine.base import NonFiniteError, StepInfo, T, lr_scale, parameter_groups
from fastrl.engine.costs import FLOAT, moment_bytes
from fastrl.engine.names import unchanged
from fastrl.engine.ranks import LATER, OnRanks, Ranks
from fastrl.engine.shards import Expected, fault
from fastrl.engine.watch import Watch

if TYPE_CHECKING:
    from fastrl.config.sections import EngineRecipe, OptimRecipe

_TAG = "engine"


def deepspeed_available() -> bool:
    """Whether DeepSpeed is installed (it is only imported when used)."""
    return importlib.util.find_spec("deepspeed") is not None


def deepspeed_config(
    optim: OptimRecipe, engine: EngineRecipe, dtype: torch.dtype, device: torch.device, *, trained: int = 0
) -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe. The trainer counts micro-batches, so accumulation is 1 here.

    AdamW is torch's: DeepSpeed's needs a compiler on the machine, which only pays off for the one on the host.
    """
    whole = engine.zero_stage < 3
    fused = {} if engine.offload_optimizer and whole else {"torch_adam": True, "fused": device.type == "cuda"}
    partitioned = {
        "reduce_bucket_size": trained,  # all at once (see ``fastrl.engine.zero3``)
        "stage3_param_persistence_threshold": 0,
        "overlap_comm": False,
        **({"offload_param": {"device": "cpu"}} if engine.offload_optimizer else {}),
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip_norm or 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
        "zero_optimization": {
            "stage": engine.zero_stage,
            **({} if whole else partitioned),
            **({"offload_optimizer": {"device": "cpu"}} if engine.offload_optimizer else {}),
        },
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optim.lr,
                "betas": list(optim.betas),
                "eps": optim.eps,
                "weight_decay": optim.weight_decay,
                **fused,
            },
        },
        "zero_force_ds_cpu_optimizer": whole,
        "steps_per_print": 2**31 - 1,
    }


class DeepSpeedEngine(OnRanks):
    """Data-parallel training through ``deepspeed.initialize``. Gradients are averaged over ranks.

    All ranks must have access to ``folder``, in which they record their progress (see ``fastrl.engine.watch``).
    """

    any_ranks = False

    def __init__(
        self,
        model: nn.Module,
        optim: OptimRecipe,
        engine: EngineRecipe,
        folder: Path,
        *,
        alias: Callable[[str], str] = unchanged,
    ) -> None:
        if not deepspeed_available():
            raise ValueError(
                "engine.kind: deepspeed needs DeepSpeed, which is not installed (pip install 'fastrl[distributed]'); "
                "or use engine.kind: local"
            )
        if "RANK" not in os.environ and not torch.distributed.is_initialized():
            raise ValueError(
                "engine.kind: deepspeed needs a launcher, one process per GPU: "
                "torchrun --nproc-per-node 8 -m fastrl.cli train ...; or use engine.kind: local"
            )
        import deepspeed  # pyright: ignore[reportMissingImports]

        self.optim = optim
        self.updates = 0
        groups = parameter_groups(model, optim, alias)
        self._base_lrs = [group.pop("base_lr") for group in groups]
        for group in groups:
            del group["names"]
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        dtype, self._device = self._parameters[0].dtype, self._parameters[0].device
        # With neither ZeRO nor bf16, torch's optimizer is used directly: it computes no norm and does not stop at NaN.
        self._bare = engine.zero_stage == 0 and dtype != torch.bfloat16
        self._began = not torch.distributed.is_initialized()
        deepspeed.init_distributed(  # pyright: ignore[reportAttributeAccessIssue]
            timeout=timedelta(seconds=engine.timeout + LATER)
        )
        self._engine: Any
        count = sum(parameter.numel() for parameter in self._parameters)
        config = deepspeed_config(optim, engine, dtype, self._device, trained=count)
        self._engine, *_ = deepspeed.initialize(  # pyright: ignore[reportAttributeAccessIssue]
            model=model, model_parameters=groups, config=config
        )
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._watch = Watch(folder, self.rank, self.world_size, engine.timeout)
        self._watch.forget()
        torch.distributed.barrier()
        self._ranks = Ranks(self._watch, self._device)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of ``loss``; ranks reduce theirs in the ``last`` one."""
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        with self._watch.waiting("the gradients of a micro-batch"):
            self._engine.backward(loss)

    def step(self) -> StepInfo:
        """Clip, update and clear gradients. DeepSpeed skips an update with a non-finite gradient; here it is an
        error."""
        scale = lr_scale(self.updates, self.optim)
        for group, lr in zip(self._engine.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * scale
        norm = self._bare_norm() if self._bare else None
        if norm is not None and not math.isfinite(norm):
            self._engine.optimizer.zero_grad()
            raise NonFiniteError(f"the gradient norm is {norm}")
        with self._watch.waiting("an update"):
            self._engine.step()
        if not self._engine.was_step_applied():
            raise NonFiniteError("the gradient holds numbers that are not finite")
        if norm is None:
            norm = float(self._engine.get_global_grad_norm() or 0.0)
        self.updates += 1
        return StepInfo(grad_norm=norm, lr=self._base_lrs[0] * scale)

    def _bare_norm(self) -> float:
        """Norm of the reduced gradients if they are stored in their parameters."""
        return float(torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None]))

    def save(self, folder: Path) -> None:
        """Every rank writes its part."""
        with self._watch.waiting("a checkpoint"):
            self._engine.save_checkpoint(
                str(folder),
                tag=_TAG,
                client_state={"updates": self.updates, "moments": self._with_moments()},
                save_latest=False,
                exclude_frozen_parameters=True,
            )

    def load(self, folder: Path) -> None:
        """Every rank reads its part. If one of them cannot, all raise ``ValueError``."""
        own = fault(folder / _TAG, self.rank, self.world_size, self._expected())
        for found in self.gather(own):
            if found is not None:
                raise ValueError(found)
        try:
            with self._watch.waiting("the checkpoint to resume from"):
                path, client = self._engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)
        except Exception as error:  # DeepSpeed's messages do not name the folder
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{folder / _TAG}: DeepSpeed cannot load it ({type(error).__name__}: {reason})") from error
        if path is None:
            raise ValueError(f"{folder / _TAG}: DeepSpeed found no checkpoint there")
        self.updates = int(client["updates"])

    def _expected(self) -> Expected:
        module = self._engine.module
        pieces = self._engine.optimizer.single_partition_of_fp32_groups if self._engine.zero_optimization() else None
        return Expected(
            {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad},
            frozenset(module.state_dict()),
            [tuple(p.shape) for group in self._engine.optimizer.param_groups for p in group["params"]],
            None if pieces is None else [piece.numel() for piece in pieces],
        )

    def _with_moments(self) -> int:
        """Number of parameters with moments of their own (0 under ZeRO, which partitions them)."""
        inner = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        return 0 if self._engine.zero_optimization() else sum(bool(state) for state in inner.state.values())

    def saved_bytes(self) -> int:
        """The trained weights, in their type and in float32, and two moments."""
        states = FLOAT + moment_bytes(self.optim.states)
        return int(sum(p.numel() * (p.element_size() + states) for p in self._parameters))

    def gradient_of(self, parameter: Tensor) -> None:
        """DeepSpeed keeps gradients in buffers of its own."""
        return None

    def forward(self, work: Callable[[], T]) -> T:
        return work()

    def whole(self, core: nn.Module, state: Callable[[], Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Each weight of a core; all of them are whole at the same time."""
        with self.gathered(core):
            yield from state().items()

    def gathered(self, module: nn.Module) -> AbstractContextManager[None]:
        """Parameters are not sharded up to ZeRO 2."""
        return nullcontext()

    def close(self) -> None:
        """Shut down together: a rank would abort at exit if others are gone or DeepSpeed's threads are still alive."""
        self._ranks.barrier()
        self._watch.close()
        if self._began:
            self._engine, self._parameters = None, []
            gc.collect()
            torch.distributed.destroy_process_group()
            gc.collect()
