"""The training methods. A new one is a file here with a subclass of ``base.Method``, and an entry in the last lines.

A method outside the package is such a subclass, added with :func:`register`.
"""

from __future__ import annotations

from typing import TypeVar, get_args

from fastrl.config.contract import faults
from fastrl.config.registry import Registry, nearest
from fastrl.methods.base import Clock, Context, Method, MethodOptions, Prepared
from fastrl.methods.perception_r1 import PerceptionR1
from fastrl.methods.perpo import PerPO
from fastrl.methods.reper import RePer
from fastrl.methods.sft import SFT
from fastrl.methods.utr import UTR

METHODS: Registry[type[Method]] = Registry("method")  # by method.kind

__all__ = [
    "METHODS",
    "SFT",
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
    "make_method",
    "method_for",
    "register",
]

M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Register a method for recipes whose ``method.kind`` is one of its kinds. Also usable as a class decorator.

    Raises:
        TypeError: not a subclass of ``Method``, or an attribute or hook is missing, misspelt or of the wrong kind.
        ValueError: another method has one of its kinds.
    """
    found = _faults(method)
    if found:
        raise TypeError(f"{method!r}: " + "; ".join(found))
    for kind in kinds(method):
        METHODS.check(kind, method)
    for kind in kinds(method):
        METHODS.add(kind, method)
    return method


def kinds(method: type[Method]) -> tuple[str, ...]:
    """The values of ``method.kind`` in a recipe that select this class."""
    return get_args(method.Options.model_fields["kind"].annotation)


def method_for(options: MethodOptions) -> type[Method]:
    """The method class of these options. Raises ``ValueError`` if it is not registered."""
    if options.kind not in METHODS:
        raise ValueError(f"method {options.kind!r} is not registered (fastrl.methods.register)")
    return METHODS[options.kind]


def make_method(options: MethodOptions, context: Context) -> Method:
    """Create the method of these options.

    Raises:
        TypeError: it sets a public attribute that methods do not have, which would be ignored (probably misspelt).
    """
    method = method_for(options)(options, context)
    known = {*dir(Method), "options", "context"}
    for name in vars(method):
        if not name.startswith("_") and name not in known:
            near = nearest(name, known, cutoff=0.6)
            hint = f"; did you mean {near}?" if near else ""
            raise TypeError(f"{type(method).__qualname__}.{name} is not part of a method{hint}")
    return method


def _faults(method: type[Method]) -> list[str]:
    """Reasons why a class is not a valid method."""
    found = faults(method, Method)
    if not (isinstance(method, type) and issubclass(method, Method)):
        return found
    options = getattr(method, "Options", None)
    if not (isinstance(options, type) and issubclass(options, MethodOptions)):
        found.append("Options must be a subclass of fastrl.methods.MethodOptions")
    elif not kinds(method) or not all(isinstance(kind, str) for kind in kinds(method)):
        found.append(f"{options.__qualname__}.kind must be a Literal of the names that recipes use")
    if (method.state is Method.state) != (method.load is Method.load):
        found.append("state and load must be implemented together")
    return found


for _method in (PerceptionR1, PerPO, RePer, UTR, SFT):
    register(_method)
