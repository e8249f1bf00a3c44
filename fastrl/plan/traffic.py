"""Bytes that an operator reads and writes, from its schema and the shapes of its tensors; nothing is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl_kernels._counting import named_arguments

aten = torch.ops.aten
# Of the first tensor only as much is read as there are results.
GATHERS = {aten.embedding, aten.gather, aten.index, aten.index_select, aten.take}
# Of the tensor that is changed only as much is touched as is brought.
SCATTERS = {aten.index_add_, aten.index_put_, aten.index_copy_, aten.scatter_, aten.scatter_add_, aten.masked_scatter_}
# Views by what they do, though not by their schema.
VIEWS = {aten._unsafe_view}
# What is changed was not read before.
OVERWRITES = {aten.copy_, aten.fill_, aten.zero_, aten.normal_, aten.uniform_}


def traffic(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Bytes read and written by a call of ``func`` (an ``OpOverload``), every tensor once, as by a kernel that keeps
    nothing in a cache from another call. Views and allocations move none.

    Args:
        args, kwargs: of the call; tensors may be on the meta device.
        out: what it returned.
    """
    packet, schema = func._overloadpacket, func._schema
    aliases = [told.alias_info for told in schema.returns if told.alias_info is not None]
    if packet in VIEWS or "empty" in schema.name or (aliases and not any(alias.is_write for alias in aliases)):
        return 0
    named = named_arguments(func, args, kwargs)
    written = {t.name for t in schema.arguments if t.alias_info is not None and t.alias_info.is_write}
    changed = sum(_size(named[name]) for name in written)
    given = [_size(value) for name, value in named.items() if name not in written]
    made = 0 if aliases else _size(out)
    if packet in GATHERS:
        source = _size(named[schema.arguments[0].name])
        return sum(given) - source + min(source, made) + made
    if packet in SCATTERS:
        return sum(given) + 2 * min(changed, max(given, default=0))
    return sum(given) + made + changed * (1 if packet in OVERWRITES else 2)


def _size(value: Any) -> int:
    """Bytes of the tensors in an argument; an expanded one holds only those of its storage."""
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
