"""Whether a class keeps a contract: a base class that declares every fact and hook, optional ones with a default."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from fastrl.config.registry import nearest


def faults(cls: type, base: type, *, own: Collection[str] = ()) -> list[str]:
    """What keeps ``cls`` from being a sound subclass of ``base``: parts missing, misspelt or of the wrong kind.

    A public name that the contract does not have is a fault, so that a misspelt hook is not silently ignored.

    Args:
        cls: a subclass of ``base``.
        base: the contract.
        own: further public names that the class may have.
    """
    if not (isinstance(cls, type) and issubclass(cls, base)):
        return [f"has to be a subclass of {base.__module__}.{base.__qualname__}"]
    contract = {*dir(base), *getattr(base, "__annotations__", ())}
    contract = {name for name in contract if not name.startswith("_")}
    found = []
    for name in dict.fromkeys(name for part in cls.__mro__ if part not in base.__mro__ for name in vars(part)):
        if name.startswith("_") or name in own:
            continue
        if name in contract:
            found += _misfits(name, getattr(base, name, None), getattr(cls, name))
            continue
        near = nearest(name, contract, cutoff=0.6)
        hint = f"; did you mean {near}?" if near else ""
        found.append(f"{name} is no part of a {base.__name__}{hint} (helpers of its own begin with an underscore)")
    return found + [f"{name} is missing" for name in sorted(getattr(cls, "__abstractmethods__", ()))]


def _misfits(name: str, declared: Any, given: Any) -> list[str]:
    """Whether what a class has under a hook's name can be called as the hook is."""
    if not inspect.isroutine(declared):
        return []
    if not callable(given):
        return [f"{name} has to be a function, got {given!r}"]
    wanted, taken = (list(inspect.signature(function).parameters) for function in (declared, given))
    return [] if wanted == taken else [f"{name} takes ({', '.join(taken)}), but is called with ({', '.join(wanted)})"]
