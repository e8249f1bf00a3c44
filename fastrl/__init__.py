"""fastrl: RL post-training for perception MLLMs. See README.md.

``from fastrl import train, load_recipe, load_policy, reward_for, Record, StopRun``; each is imported when it is first
asked for, so that ``import fastrl`` loads neither torch nor anything else.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastrl.data.records import Record
    from fastrl.models.load import load_policy
    from fastrl.recipe import load_recipe
    from fastrl.rewards import reward_for
    from fastrl.run.callbacks import StopRun
    from fastrl.trainer import train

__version__ = "0.1.0"

_HOMES = {
    "Record": "fastrl.data.records",
    "StopRun": "fastrl.run.callbacks",
    "load_policy": "fastrl.models.load",
    "load_recipe": "fastrl.recipe",
    "reward_for": "fastrl.rewards",
    "train": "fastrl.trainer",
}

_MOVED = {  # modules by the names that earlier pages showed → where they are now
    "fastrl.models.varlen": "fastrl_kernels.varlen",
    "fastrl.optimizers": "fastrl.engine.optimizers",
    "fastrl.pictures": "fastrl.data.pictures",
}

__all__ = ["Record", "StopRun", "load_policy", "load_recipe", "reward_for", "train"]


def __getattr__(name: str) -> Any:
    """Import a public name from where it is defined (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    """The names of the module, those not imported yet among them."""
    return sorted({*globals(), *__all__})


class _Moved(MetaPathFinder, Loader):
    """Imports a module under its former name: the module of today, when it is asked for."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(_MOVED[module.__name__])


sys.meta_path.append(_Moved())
