"""Allocations and exchanged bytes of ZeRO 3 on this rank: ``zero3_memory.py MODEL FOLDER LORA CHECKPOINTING``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastrl.config.sections import EngineRecipe, OptimRecipe
from fastrl.engine import make_engine
from fastrl.engine.base import Shardable
from fastrl.engine.ranks import leave
from fastrl.models import load_policy
from fastrl.models.families import family_of
from fastrl.plan.workload import packed
from tests.helpers.planned import counted_peak
from tests.helpers.sharded_memory import uncounted


def received(counts: dict[str, int]) -> None:
    """Add the bytes that this rank receives in DeepSpeed's collectives to ``counts``; see ``sharded_memory``."""
    import deepspeed.comm.comm as comm  # pyright: ignore[reportMissingImports]

    gather: Callable[..., Any] = comm.cdb.all_gather_into_tensor
    reduce: Callable[..., Any] = comm.cdb.reduce_scatter_tensor

    def gathering(output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        counts["weights"] += (output_tensor.numel() - input_tensor.numel()) * output_tensor.element_size()
        whole = uncounted(output_tensor)
        gather(whole, uncounted(input_tensor), group=group)
        output_tensor.copy_(whole)
        return _Done() if async_op else None

    def reducing(output_tensor: Tensor, input_tensor: Tensor, **options: Any) -> Any:
        counts["gradients"] += (input_tensor.numel() - output_tensor.numel()) * input_tensor.element_size()
        sums = uncounted(output_tensor)
        waits = options.pop("async_op", False)
        reduce(sums, uncounted(input_tensor), **options)
        output_tensor.copy_(sums)
        return _Done() if waits else None

    comm.cdb.all_gather_into_tensor, comm.cdb.reduce_scatter_tensor = gathering, reducing


class _Done:
    """A collective that has ended."""

    def wait(self) -> None:
        pass


def main() -> None:
    model, folder, lora, checkpointing = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "1", sys.argv[4] == "1"
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    adapters = {"rank": 8} if lora else None
    policy = load_policy(model, device="cpu", lora=adapters, gradient_checkpointing=checkpointing)
    family = family_of(policy.core.config)
    batch = packed(family, 60, [], [(16,) * 6])
    optim = OptimRecipe(steps=9, lr=1e-4)  # type: ignore[call-arg]
    section = EngineRecipe(kind="deepspeed", zero_stage=3)  # type: ignore[call-arg]
    cores = [Shardable(policy.core, family.layers(policy.core))]
    engine = make_engine(policy.model, optim, section, folder / "ranks", cores=cores)

    def update() -> None:
        engine.backward(engine.forward(lambda: policy.logprob(batch).logp.mean()))

    def whole() -> None:
        with engine.gathered(policy.core):
            pass

    update()
    engine.step()
    counts = {"weights": 0, "gradients": 0}
    received(counts)
    found = {"update": counted_peak(update), "optimizer": counted_peak(engine.step), **counts}
    found["gathered"] = counted_peak(whole)
    found["rollout_weights"] = counts["weights"] - found["weights"]
    found["weight_shards"] = sum(p.ds_tensor.numel() * p.element_size() for p in policy.core.parameters())
    assert not sum(p.numel() for p in policy.core.parameters())
    (folder / f"counted-{dist.get_rank()}.json").write_text(json.dumps(found))
    leave(0)


if __name__ == "__main__":
    main()
