"""Allocations and exchanged bytes of ZeRO 3 on this rank: ``zero3_memory.py MODEL FOLDER LORA CHECKPOINTING``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastrl.config.sections import EngineRecipe
from tests.helpers.sharded_memory import measure, report, uncounted


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
    section = EngineRecipe(kind="deepspeed", zero_stage=3)  # type: ignore[call-arg]
    _, core, _, _, found = measure(section, received)
    found["weight_shards"] = sum(p.ds_tensor.numel() * p.element_size() for p in core.parameters())
    assert not sum(p.numel() for p in core.parameters())
    report(found)


if __name__ == "__main__":
    main()
