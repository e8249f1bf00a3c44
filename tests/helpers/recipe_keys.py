"""The keys of a recipe as ``docs/recipes.md`` lists them, read from the sections themselves."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fastrl.config.problems import sections_in
from fastrl.methods import METHODS, MethodOptions
from fastrl.recipe import Recipe

SIGNS: dict[type, str] = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}
PLAIN = {str: "text", bool: "`true`, `false`", int: "a whole number", float: "a number"}


def tables() -> dict[str, dict[str, tuple[str, str]]]:
    """Section heading → key → (default, allowed values), each as a cell of a Markdown table."""
    found = {"The run": dict(_rows(Recipe, "", deep=False))}
    for name, field in Recipe.model_fields.items():
        inner = [s for s in sections_in(field.annotation) if not issubclass(s, MethodOptions)]
        if inner:
            found[f"`{name}`"] = dict(_rows(inner[0], f"{name}."))
    methods = [m for m in dict.fromkeys(METHODS.values()) if m.__module__.startswith("fastrl.")]  # not a test's own
    return found | {f"`method`: {m.__name__}": dict(_rows(m.Options, "method.")) for m in methods}


def _rows(section: type[BaseModel], prefix: str, *, deep: bool = True) -> Iterator[tuple[str, tuple[str, str]]]:
    for name, field in section.model_fields.items():
        inner = list(sections_in(field.annotation))
        if not inner or (deep and inner):
            yield f"`{prefix}{name}`", (_default(field), _allowed(field.annotation, field))
        if deep:
            for part in inner:
                yield from _rows(part, f"{prefix}{name}.")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    if field.default is None or field.default == "":
        return "none"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _allowed(annotation: Any, field: FieldInfo) -> str:
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
    return " or ".join(_allowed(a, field) for a in arguments)


def _bounded(kind: str, field: FieldInfo) -> str:
    named = [(SIGNS.get(type(m)), type(m).__name__.lower(), m) for m in field.metadata]
    bounds = [f"{sign} {_number(getattr(m, name))}" for sign, name, m in named if sign is not None]
    return f"{kind}, {', '.join(bounds)}" if bounds else kind


def _number(value: float) -> str:
    return f"2^{value.bit_length() - 1}" if isinstance(value, int) and value > 10**5 else f"{value:g}"
