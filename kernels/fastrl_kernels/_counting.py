"""What operators cost beside their results: floating-point operations, and bytes that they allocate and free again.

A formula stands in the file of its operator and is handed the operator's arguments by name, as its schema calls them:
a schema whose arguments change places changes no count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch.utils.flop_counter import register_flop_formula


class Scratch(NamedTuple):
    """Bytes alive within a call at its peak, its arguments and results left out."""

    bounded: int = 0  # under the call's ``scratch_bytes``
    beside: int = 0  # what that budget does not bound


Formula = Callable[..., Any]
_SCRATCH: dict[Any, Callable[..., Scratch]] = {}


def named_arguments(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``op`` (an ``OpOverload``) by the names of its schema, those left out by default."""
    told = op._schema.arguments
    named = {argument.name: argument.default_value for argument in told if argument.has_default_value()}
    named |= {argument.name: value for argument, value in zip(told, args, strict=False)}
    return named | dict(kwargs)


def flops_of(op: Any) -> Callable[[Formula], Formula]:
    """Register a formula of an operator (``torch.ops.fastrl.NAME``) with torch's counter; tensors come as shapes."""

    def register(formula: Formula) -> Formula:
        @register_flop_formula(op)
        def _(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
            return formula(**named_arguments(op.default, args, kwargs))

        return formula

    return register


def scratch_of(op: Any) -> Callable[[Formula], Formula]:
    """Register what an operator allocates inside: a formula that also takes ``triton``, the path the call takes."""

    def register(formula: Formula) -> Formula:
        _SCRATCH[op] = formula
        return formula

    return register


def scratch(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], *, triton: bool) -> Scratch:
    """What a call of ``op`` (an ``OpOverload``) allocates inside; none where its file registers nothing.

    Args:
        args, kwargs: of the call; of tensors only shapes, dtypes and strides are read, so that they may be on the
            meta device.
        triton: count the Triton path, else torch's.
    """
    formula = _SCRATCH.get(op._overloadpacket)
    return Scratch() if formula is None else formula(**named_arguments(op, args, kwargs), triton=triton)
