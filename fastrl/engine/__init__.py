"""Engines turn a loss into an update, in one process (``local``) or several (``deepspeed``, ``fsdp2``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fastrl.engine.names import unchanged

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from fastrl.config.sections import EngineRecipe, OptimRecipe
    from fastrl.engine.base import Engine, Shardable


def make_engine(
    model: nn.Module,
    optim: OptimRecipe,
    engine: EngineRecipe,
    folder: Path,
    *,
    alias: Callable[[str], str] = unchanged,
    cores: Sequence[Shardable] = (),
) -> Engine:
    """The engine that a recipe names, for the trainable parameters of ``model``.

    Args:
        model: the policy's, with its adapters.
        optim, engine: sections of the recipe.
        folder: all ranks must have access to it.
        alias: see ``parameter_groups``.
        cores: what may be sharded: the policy's core, then its reference if that is a copy.
    """
    if engine.kind == "fsdp2":
        from fastrl.engine.fsdp2 import Fsdp2Engine

        return Fsdp2Engine(model, optim, engine, folder, alias=alias, cores=cores)
    if engine.kind == "deepspeed" and engine.zero_stage == 3:
        from fastrl.engine.zero3 import Zero3Engine

        return Zero3Engine(model, optim, engine, folder, alias=alias, cores=cores)
    if engine.kind == "deepspeed":
        from fastrl.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, optim, engine, folder, alias=alias)
    from fastrl.engine.local import LocalEngine

    return LocalEngine(model, optim, alias=alias)
