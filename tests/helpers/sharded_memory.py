"""Allocations and exchanged bytes of FSDP2 on this rank: ``sharded_memory.py MODEL FOLDER LORA CHECKPOINTING``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

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


def received(counts: dict[str, int]) -> None:
    """Add the bytes that this rank receives in FSDP's collectives to ``counts``.

    Gloo's thread lets go of a collective's tensors some time after it has ended, so that their frees would be counted
    early or late. It is given memory that torch's allocator does not know instead, and FSDP's buffers live as long as
    FSDP holds them.
    """
    gather: Callable[..., Any] = dist.all_gather_single
    reduce: Callable[..., Any] = dist.reduce_scatter_single

    def gathering(output: Tensor, own: Tensor, **options: Any) -> None:
        counts["weights"] += (output.numel() - own.numel()) * output.element_size()
        whole = uncounted(output)
        gather(whole, uncounted(own), **options)
        output.copy_(whole)

    def reducing(*, output: Tensor, input: Tensor, **options: Any) -> None:
        counts["gradients"] += (input.numel() - output.numel()) * input.element_size()
        sums = uncounted(output)
        reduce(output=sums, input=uncounted(input), **options)
        output.copy_(sums)

    dist.all_gather_single, dist.reduce_scatter_single = gathering, reducing  # type: ignore[assignment]


def uncounted(tensor: Tensor) -> Tensor:
    """A copy in numpy's memory."""
    return torch.from_numpy(tensor.detach().numpy().copy())


class Measured(NamedTuple):
    """An engine of this rank, an update of one micro-batch by it, and what both allocate and exchange."""

    engine: Any
    core: Any
    update: Callable[..., None]
    counts: dict[str, int]
    found: dict[str, int]


def measure(section: EngineRecipe, count: Callable[[dict[str, int]], None]) -> Measured:
    """Of the model, folder and options in ``sys.argv``, with ``section``'s engine; ``count`` as :func:`received`."""
    model, folder, lora, checkpointing = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "1", sys.argv[4] == "1"
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    adapters = {"rank": 8} if lora else None
    policy = load_policy(model, device="cpu", lora=adapters, gradient_checkpointing=checkpointing)
    family = family_of(policy.core.config)
    batch = packed(family, 60, [], [(16,) * 6])
    optim = OptimRecipe(steps=9, lr=1e-4)  # type: ignore[call-arg]
    cores = [Shardable(policy.core, family.layers(policy.core))]
    engine: Any = make_engine(policy.model, optim, section, folder / "ranks", cores=cores)

    def update(last: bool = True) -> None:
        engine.backward(engine.forward(lambda: policy.logprob(batch).logp.mean()), last=last)

    def whole() -> None:
        with engine.gathered(policy.core):
            pass

    update()
    engine.step()
    counts = {"weights": 0, "gradients": 0}
    count(counts)
    found = {"update": counted_peak(update), "optimizer": counted_peak(engine.step), **counts}
    found["gathered"] = counted_peak(whole)
    found["rollout_weights"] = counts["weights"] - found["weights"]
    return Measured(engine, policy.core, update, counts, found)


def report(found: dict[str, int]) -> NoReturn:
    """Write what was found and end the process."""
    (Path(sys.argv[2]) / f"counted-{dist.get_rank()}.json").write_text(json.dumps(found))
    leave(0)


def main() -> None:
    engine, core, update, counts, found = measure(EngineRecipe(kind="fsdp2"), received)  # type: ignore[call-arg]

    def late() -> None:
        engine._reduce_last = True
        update(False)
        update()

    before = counts["gradients"]
    found["late"] = counted_peak(late)
    found["late_gradients"] = counts["gradients"] - before
    found["weight_shards"] = sum(p.to_local().numel() * p.element_size() for p in core.parameters())
    report(found)


if __name__ == "__main__":
    main()
