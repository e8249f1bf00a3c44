"""Engines: what turns a loss into an update, on one process (``local``) or several (``deepspeed``)."""

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
    """The engine a recipe names, over the trainable parameters of ``model`` (``alias``: see ``parameter_groups``);
    ``folder`` is seen by all its ranks."""
    if engine.kind == "deepspeed":
        from fastrl.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, optim, engine, folder, alias=alias)
    from fastrl.engine.local import LocalEngine

    return LocalEngine(model, optim, alias=alias)
