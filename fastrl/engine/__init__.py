"""Engines turn a loss into an update, in one process (``local``) or several (``deepspeed``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fastrl.engine.names import unchanged

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from fastrl.config.sections import EngineRecipe, OptimRecipe
    from fastrl.engine.base import Engine


def make_engine(
    model: nn.Module, optim: OptimRecipe, engine: EngineRecipe, folder: Path, *, alias: Callable[[str], str] = unchanged
) -> Engine:
    """The engine that a recipe names, for the trainable parameters of ``model`` (``alias``: see ``parameter_groups``);
    all ranks must have access to ``folder``."""
    if engine.kind == "deepspeed":
        from fastrl.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, optim, engine, folder, alias=alias)
    from fastrl.engine.local import LocalEngine

    return LocalEngine(model, optim, alias=alias)
