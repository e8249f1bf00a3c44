"""The ``fastrl`` command: each command parses its arguments, calls one library function and prints its result."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Annotated, Any

MISSING = "the fastrl command needs the training extra: pip install 'fastrl[train]'"

if importlib.util.find_spec("typer") is None:  # the kernel library alone is installed
    raise SystemExit(MISSING)

import typer  # noqa: E402

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Reinforcement-learning post-training for perception MLLMs.",
)
build_app = typer.Typer(no_args_is_help=True, help="Build training data from a model's own answers.")
tiny_app = typer.Typer(no_args_is_help=True, help="The small models that ship with fastrl.")
app.add_typer(build_app, name="build")
app.add_typer(tiny_app, name="tiny")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Data = Annotated[str | None, typer.Option("--data", metavar="SPEC", help="adapter:path[?key=value&…]")]
Model = Annotated[str | None, typer.Option("--model", metavar="DIR", help="Hugging Face folder, or tiny:NAME.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Count and skip bad rows instead of refusing the data.")]


@app.command()
def demo(
    method: Annotated[str, typer.Option(help="Which method to show.")] = "perception-r1",
    task: Annotated[str | None, typer.Option(help="grounding or counting (perception-r1).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for metrics and figure [runs/demo-…].")] = None,
    seed: Annotated[int, typer.Option(help="Seed of data order and sampling.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a small model on generated scenes and show it before and after, in minutes on two CPU cores."""
    from fastrl.demo import run_demo

    result = run_demo(method, task=task, out=out, seed=seed, say=_say)
    if as_json:
        _print_json(result)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a YAML file.")],
    data: Data = None,
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="Run folder [runs/NAME].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the run folder.")] = False,
    skip_bad: SkipBad = False,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Set a recipe key.")] = None,
) -> None:
    """Train as a recipe says."""
    from fastrl.recipe import load_recipe
    from fastrl.trainer import train as run

    changes: dict[str, Any] = {"data.spec": data, "model.path": model, "out": str(out) if out else None}
    if skip_bad:
        changes["data.skip_bad"] = True
    named = [f"{key}={json.dumps(value)}" for key, value in changes.items() if value is not None]
    summary = run(load_recipe(recipe, [*named, *(overrides or [])]), resume=resume)
    _say(f"step {summary.steps}, {summary.seconds:.0f} s, {summary.out / 'metrics.jsonl'}")
    if summary.model is not None:
        _say(f"model: {summary.model}")
    if summary.interrupted:
        raise typer.Exit(130)


@app.command(name="eval")
def evaluate(
    task: Annotated[str, typer.Argument(help="grounding, counting, detection, ocr, …")],
    data: Annotated[str, typer.Option("--data", metavar="SPEC", help="adapter:path[?key=value&…]")],
    model: Model = None,
    predictions: Annotated[Path | None, typer.Option(help="JSONL of {id, answer}, or COCO result JSON.")] = None,
    frame: Annotated[str, typer.Option(help="auto, thousand, resized, original or unit.")] = "auto",
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer [the protocol's].")] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate the first N records.")] = None,
    skip_bad: SkipBad = False,
    out: Annotated[Path | None, typer.Option(help="Write answers and metrics to this JSONL file.")] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a model, or answers from a file, with the papers' protocols."""
    from fastrl.evaluate.run import run_evaluation

    metrics = run_evaluation(
        task,
        data,
        model=model,
        predictions=predictions,
        frame=frame,
        max_new_tokens=max_new_tokens,
        limit=limit,
        skip_bad=skip_bad,
        out=out,
        say=_say,
    )
    if as_json:
        _print_json(metrics)
    else:
        for name, value in metrics.items():
            print(f"{name:>14}  {value:.4f}" if isinstance(value, float) else f"{name:>14}  {value}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, device, the path every kernel takes here, and which optional libraries are usable."""
    from fastrl.doctor import print_report, report

    found = report()
    if as_json:
        _print_json(found)
    else:
        print_report(found)


@tiny_app.command(name="build")
def tiny_build(
    kind: Annotated[str, typer.Argument(help="perception or video")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    steps: Annotated[int, typer.Option(min=1)] = 1700,
    rows: Annotated[int, typer.Option(min=1, help="Scenes per step.")] = 16,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Build a small Qwen2.5-VL and teach it the scene tasks (about an hour on two CPU cores)."""
    from fastrl.models.tiny.build import build

    build(kind, out, steps=steps, rows=rows, seed=seed, log=_say)


def main() -> None:
    """Run the command; an error the user can mend is one message on stderr and exit status 2."""
    try:
        app()
    except (ValueError, FileNotFoundError, FileExistsError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not type(error).__module__.startswith("fastrl"):
            raise
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        sys.stderr.write(f"error: {error.name} is not installed; {MISSING}\n")
        raise SystemExit(2) from None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
