"""The keys of a recipe for people to read, from the sections themselves: default, what is allowed, what each means."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fastrl.config.problems import sections_in

SIGNS: dict[type, str] = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}
PLAIN = {str: "text", bool: "`true`, `false`", int: "a whole number", float: "a number"}


class Key(NamedTuple):
    """One key of a recipe, in words; code stands in backquotes."""

    path: str  # dotted
    default: str  # "needed" where there is none
    allowed: str
    meaning: str  # empty where its section has no docstring for it


def keys_of(section: type[BaseModel], prefix: str = "", *, deep: bool = True) -> Iterator[Key]:
    """The keys of a section and (``deep``) of the sections inside it; without, those that are no sections."""
    for name, field in section.model_fields.items():
        inner = list(sections_in(field.annotation))
        if deep or not inner:
            meaning = " ".join((field.description or "").split())
            yield Key(prefix + name, default_of(field), allowed_of(field.annotation, field), meaning)
        for part in inner if deep else ():
            yield from keys_of(part, f"{prefix}{name}.")


def default_of(field: FieldInfo) -> str:
    """A key's default."""
    if field.is_required():
        return "needed"
    if field.default is None or field.default == "":
        return "none"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def allowed_of(annotation: Any, field: FieldInfo) -> str:
    """What a key may be."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if annotation in PLAIN:
        return _bounded(PLAIN[annotation], field)
    arguments = [a for a in get_args(annotation) if a is not NoneType]
    if get_origin(annotation) is list:
        return "a list of sections" if list(sections_in(annotation)) else "a list of texts"
    if get_origin(annotation) is tuple:
        return f"a list of {len(arguments)} numbers"
    if get_origin(annotation) is dict:
        return "a mapping"
    if isinstance(annotation, type):
        return "a section"
    return " or ".join(allowed_of(a, field) for a in arguments)


def _bounded(kind: str, field: FieldInfo) -> str:
    named = [(SIGNS.get(type(m)), type(m).__name__.lower(), m) for m in field.metadata]
    bounds = [f"{sign} {_number(getattr(m, name))}" for sign, name, m in named if sign is not None]
    return f"{kind}, {', '.join(bounds)}" if bounds else kind


def _number(value: float) -> str:
    return f"2^{value.bit_length() - 1}" if isinstance(value, int) and value > 10**5 else f"{value:g}"
