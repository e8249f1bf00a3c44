"""``fastrl study``: the papers' claims as experiments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastrl.cli.terminal import Json, print_json, say

if TYPE_CHECKING:
    from fastrl.studies.base import Study


def study(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Which study; --list shows them.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show question, design and minutes of every study.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed, smaller, no choice of learning rates: see --list for minutes.")
    ] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds [the study's].")] = None,
    jobs: Annotated[
        int, typer.Option(min=1, metavar="N", help="Processes that run arms side by side, with 1/N of the cores each.")
    ] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder; an interrupted study continues [runs/study-…].")] = None,
    family: Annotated[
        str | None, typer.Option(metavar="TYPE", help="blind: model type of the small model [qwen2_5_vl].")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="blind: a shipped recipe or YAML file instead of the study's.")
    ] = None,
    held_out: Annotated[
        str | None, typer.Option("--held-out", metavar="SPEC", help="With --recipe: data to evaluate on.")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="SPEC", help="With --recipe: adapter:path[?key=value&…]")] = None,
    model: Annotated[str | None, typer.Option(metavar="DIR", help="With --recipe: the model.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --recipe: evaluate the first N records.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="With --recipe: longest answer [the protocol's].")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="a.b=c", help="With --recipe: set a recipe key.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Test a paper's claim: train what it compares, and show the differences with their intervals."""
    if listed:
        _list(as_json)
        return
    if name is None:
        raise ValueError("name a study; fastrl study --list shows them")
    own = {"held_out": held_out, "data": data, "model": model, "limit": limit, "max_new_tokens": max_new_tokens}
    chosen = _make(name, quick, family, recipe, own, overrides or [])
    from fastrl.studies.outcome import print_result
    from fastrl.studies.runner import run_study

    of = recipe_name(recipe) if recipe is not None else chosen.settings().get("family")
    where = out or Path("runs") / "-".join(filter(None, ("study", name, of, "quick" if quick else "")))
    try:
        result = run_study(chosen, where, seeds=seeds, processes=jobs)
    except KeyboardInterrupt:
        say(f"stopped; the same command continues {where}")
        raise typer.Exit(130) from None
    print_result(chosen, result)
    if as_json:
        print_json(result)


def recipe_name(recipe: str) -> str:
    """The name of a recipe, or of its file without folder and ending."""
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe


def _make(
    name: str, quick: bool, family: str | None, recipe: str | None, own: dict[str, Any], overrides: list[str]
) -> Study:
    from fastrl.config.shipped import shipped_recipes
    from fastrl.studies import STUDIES, study_class

    if name not in STUDIES and (name in shipped_recipes() or name.endswith((".yaml", ".yml"))):
        raise ValueError(f"{name} is a recipe: write fastrl study blind --recipe {name} --held-out SPEC")
    kind = study_class(name)
    given = [f"--{key.replace('_', '-')}" for key, value in own.items() if value is not None]
    given += ["--set"] if overrides else []
    if recipe is None and given:
        raise ValueError(f"{given[0]} goes with --recipe: without it, a study has its own recipe and data")
    if name == "blind":
        return _make_blind(quick, family, recipe, own, overrides)
    for option, value in (("--recipe", recipe), ("--family", family)):
        if value is not None:
            raise ValueError(f"{option}: {name} has its own recipes and models; blind takes others")
    return kind(quick=quick, say=say)


def _make_blind(
    quick: bool, family: str | None, recipe: str | None, own: dict[str, Any], overrides: list[str]
) -> Study:
    from fastrl.studies.blind import Experiment, Own

    if recipe is None:
        return Experiment(quick=quick, family=family, say=say)
    if family is not None:
        raise ValueError("--family chooses the small model, a --recipe names its own: leave one of them out")
    if own["held_out"] is None:
        raise ValueError("--recipe needs --held-out SPEC: data to evaluate on")
    if quick:
        raise ValueError("--quick makes the study's own recipe smaller; with --recipe, set optim.steps and --seeds 1")
    from fastrl.recipe import load_recipe

    changes = {"data.spec": own["data"], "model.path": own["model"]}
    named = [f"{key}={json.dumps(value)}" for key, value in changes.items() if value is not None]
    chosen = load_recipe(recipe, [*named, *overrides])
    return Experiment(own=Own(chosen, own["held_out"], own["limit"], own["max_new_tokens"]), say=say)


def _list(as_json: bool) -> None:
    from fastrl.studies import all_studies

    found = [kind.about._asdict() for kind in all_studies()]
    if as_json:
        print_json({"studies": found})
        return
    for about in found:
        print(f"{about['name']}: {about['question']}")
        print(f"  paper     {about['paper']}")
        print(f"  design    {about['design']}")
        print(f"  expected  {about['expected']}")
        print(f"  minutes   {about['minutes']} on two quiet cores with --jobs 2, --quick {about['quick_minutes']}")
