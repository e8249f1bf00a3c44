"""The training methods. A new one is a file here with a subclass of ``base.Method``, and its name in the last lines.

One of your own is such a class in a file of yours, made known by :func:`register`.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar, get_args

from fastrl.config.registry import Registry, nearest
from fastrl.methods.base import Clock, Context, Method, MethodOptions, Prepared
from fastrl.methods.perception_r1 import PerceptionR1
from fastrl.methods.perpo import PerPO
from fastrl.methods.reper import RePer
from fastrl.methods.utr import UTR

METHODS: Registry[type[Method]] = Registry("method")  # by method.kind

__all__ = [
    "METHODS",
    "UTR",
    "Clock",
    "Context",
    "Method",
    "MethodOptions",
    "PerPO",
    "PerceptionR1",
    "Prepared",
    "RePer",
    "kinds",
    "method_for",
    "register",
]

M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Make a method known: recipes whose ``method.kind`` is one of its kinds are then valid. Also a class decorator.

    Raises:
        TypeError: no subclass of ``Method``, or one with a part missing, misspelt or of the wrong kind.
        ValueError: a kind that another method has.
    """
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise TypeError(f"a method is a subclass of fastrl.methods.Method, got {method!r}")
    for fault in _faults(method):
        raise TypeError(f"{method.__qualname__}: {fault}")
    for kind in kinds(method):
        METHODS.check(kind, method)
    for kind in kinds(method):
        METHODS.add(kind, method)
    return method


def kinds(method: type[Method]) -> tuple[str, ...]:
    """The values of ``method.kind`` in a recipe that select this class."""
    return get_args(method.Options.model_fields["kind"].annotation)


def method_for(options: MethodOptions) -> type[Method]:
    """The class whose options these are. Raises ``ValueError``: it is not registered."""
    if options.kind not in METHODS:
        raise ValueError(f"method {options.kind!r} is not registered (fastrl.methods.register)")
    return METHODS[options.kind]


def _faults(method: type[Method]) -> list[str]:
    """What keeps a class from being a method."""
    options = getattr(method, "Options", None)
    if not (isinstance(options, type) and issubclass(options, MethodOptions)):
        return ["Options has to be a subclass of MethodOptions"]
    if not kinds(method) or not all(isinstance(kind, str) for kind in kinds(method)):
        return [f"{options.__qualname__}.kind has to be a Literal of the names recipes use"]
    contract = {name for name in dir(Method) if not name.startswith("_")} | {"Options"}
    faults = []
    for name in dict.fromkeys(name for cls in method.__mro__ if cls not in Method.__mro__ for name in vars(cls)):
        if name.startswith("_"):
            continue
        if name not in contract:
            near = nearest(name, contract, cutoff=0.6)
            hint = f"; did you mean {near}?" if near else ""
            faults.append(f"{name} is no part of a method{hint} (a helper of its own begins with an underscore)")
        else:
            faults += _misfits(name, getattr(method, name))
    if (method.state is Method.state) != (method.load is Method.load):
        faults.append("state and load go together")
    missing = sorted(method.__abstractmethods__)
    return faults + [f"{name} is missing" for name in missing]


def _misfits(name: str, given: Any) -> list[str]:
    """Whether what a class has under a hook's name can be called as the hook is."""
    declared = getattr(Method, name, None)
    if not inspect.isroutine(declared):
        return []
    if not callable(given):
        return [f"{name} has to be a function, got {given!r}"]
    wanted, found = (list(inspect.signature(function).parameters) for function in (declared, given))
    return [] if wanted == found else [f"{name} takes {', '.join(found)}; it is called with {', '.join(wanted)}"]


for _method in (PerceptionR1, PerPO, RePer, UTR):
    register(_method)
