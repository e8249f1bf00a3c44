"""``fastrl recipes``: list recipes, show one with every key, and explain keys."""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer

from fastrl.cli.terminal import Json, print_json

WIDTH = 100


def recipes(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="Recipe to show with every key: a name or a YAML file."),
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="Every key with its default, range and meaning.")] = False,
    match: Annotated[str, typer.Option(metavar="TEXT", help="Only recipes, or keys, whose name contains this.")] = "",
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Set a recipe key.")] = None,
    as_json: Json = False,
) -> None:
    """List the shipped recipes, show one with every key filled in, or explain the keys."""
    if recipe is not None and (keys or match):
        raise ValueError(
            "RECIPE shows one recipe, --keys explains keys and --match filters a list: give only one of them"
        )
    if overrides and recipe is None:
        raise ValueError("--set changes a recipe: give its name too")
    if recipe is not None:
        _show(recipe, overrides or [], as_json)
    elif keys:
        _explain(match, as_json)
    else:
        _list(match, as_json)


def _list(match: str, as_json: bool) -> None:
    from fastrl.config.shipped import described, shipped_recipes  # does not import torch, so it is fast

    found = {name: described(name) for name in shipped_recipes() if match in name}
    if as_json:
        print_json({"recipes": found})
        return
    width = max(map(len, found), default=0)
    for name, description in found.items():
        print(f"{name:<{width}}  {description}")


def _show(recipe: str, overrides: list[str], as_json: bool) -> None:
    from fastrl.recipe import load_recipe

    chosen = load_recipe(recipe, overrides)
    if as_json:
        print_json(chosen.model_dump(mode="json"))
    else:
        print(chosen.dump(), end="")


def _explain(match: str, as_json: bool) -> None:
    from fastrl.recipe import key_tables

    tables = {name: [key for key in keys if match in key.path] for name, keys in key_tables().items()}
    if as_json:
        print_json({"keys": {name: [key._asdict() for key in keys] for name, keys in tables.items() if keys}})
        return
    for name, keys in tables.items():
        if keys:
            print(f"{name}\n")
        for key in keys:
            print(f"  {key.path} = {key.default.strip('`')}    ({key.allowed.replace('`', '')})")
            print(textwrap.indent(textwrap.fill(key.meaning.replace("`", ""), WIDTH - 6), "      ") + "\n")
