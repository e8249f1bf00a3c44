"""Checks that a class fulfils a contract: a base class that declares all attributes and hooks, optional ones with a
default."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from fastrl.config.registry import nearest


def faults(cls: type, base: type, *, own: Collection[str] = ()) -> list[str]:
    """Reasons why ``cls`` is not a valid subclass of ``base``: names that are missing, misspelt or of the wrong kind.

    A public name that the contract does not declare is a fault: otherwise a misspelt hook would be silently ignored.

    Args:
        cls: a subclass of ``base``.
        base: the contract.
        own: additional public names that the class may have.
    """
    if not (isinstance(cls, type) and issubclass(cls, base)):
        return [f"must be a subclass of {base.__module__}.{base.__qualname__}"]
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
        found.append(f"{name} is not part of a {base.__name__}{hint} (names of helpers must begin with an underscore)")
    return found + [f"{name} is missing" for name in sorted(getattr(cls, "__abstractmethods__", ()))]


def _misfits(name: str, declared: Any, given: Any) -> list[str]:
    """Reasons why the attribute ``given`` cannot be called like the declared hook ``name``."""
    if not inspect.isroutine(declared):
        return []
    if not callable(given):
        return [f"{name} must be a function, got {given!r}"]
    wanted, taken = (list(inspect.signature(function).parameters) for function in (declared, given))
    return [] if wanted == taken else [f"{name} takes ({', '.join(taken)}), but is called with ({', '.join(wanted)})"]
