"""The training methods. A new one is a file here with a class that follows ``base.Method``, and its line below."""

from __future__ import annotations

from typing import get_args

from fastrl.methods.base import Clock, Context, Method, MethodOptions, Prepared
from fastrl.methods.perception_r1 import PerceptionR1
from fastrl.methods.perpo import PerPO
from fastrl.methods.reper import RePer
from fastrl.methods.utr import UTR

METHODS: tuple[type[Method], ...] = (PerceptionR1, PerPO, RePer, UTR)

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
]


def kinds(method: type[Method]) -> tuple[str, ...]:
    """The values of ``method.kind`` in a recipe that select this class."""
    return get_args(method.Options.model_fields["kind"].annotation)


def method_for(options: MethodOptions) -> type[Method]:
    """The class whose options these are."""
    return next(method for method in METHODS if isinstance(options, method.Options))
