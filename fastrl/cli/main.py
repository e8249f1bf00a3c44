"""The ``fastrl`` command: each command parses its arguments, calls one library function and prints its result."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

MISSING = "the fastrl command needs the training extra: pip install 'fastrl[train]'"

if importlib.util.find_spec("typer") is None:  # the kernel library alone is installed
    raise SystemExit(MISSING)

import typer  # noqa: E402

from fastrl import __version__  # noqa: E402
from fastrl.cli.allocator import use_expandable_segments  # noqa: E402
from fastrl.cli.build import app as build_app  # noqa: E402
from fastrl.cli.build import score as score_command  # noqa: E402
from fastrl.cli.data import data as data_command  # noqa: E402
from fastrl.cli.export import export as export_command  # noqa: E402
from fastrl.cli.recipes import recipes as recipes_command  # noqa: E402
from fastrl.cli.study import study as study_command  # noqa: E402
from fastrl.cli.terminal import Json, SkipBad, print_json, say  # noqa: E402
from fastrl.data.records import PROMPTS  # noqa: E402

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # markup would remove the defaults in brackets from the help
    help="Reinforcement-learning post-training for perception MLLMs.",
)
tiny_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The small models that ship with fastrl.")
app.add_typer(build_app, name="build")
app.add_typer(tiny_app, name="tiny")
app.command(name="data")(data_command)
app.command(name="recipes")(recipes_command)
app.command(name="export")(export_command)
app.command(name="study")(study_command)
app.command(name="score")(score_command)

Data = Annotated[str | None, typer.Option("--data", metavar="SPEC", help="adapter:path[?key=value&…]")]
Model = Annotated[str | None, typer.Option("--model", metavar="DIR", help="Folder, tiny:NAME or downloaded hub name.")]
Blank = Annotated[
    bool, typer.Option("--blank-images", help="Replace the data's pictures by grey ones of the same size.")
]


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"fastrl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that go before a command."""


@app.command()
def demo(
    method: Annotated[str, typer.Option(help="Which method to show.")] = "perception-r1",
    task: Annotated[str | None, typer.Option(help="grounding, counting, detection or ocr (perception-r1).")] = None,
    family: Annotated[
        str | None, typer.Option(help="llava: on a small LLaVA-1.5 (perpo, reper, utr) [qwen2_5_vl].")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for metrics and figure [runs/demo-…].")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps [the recipe's].")] = None,
    seed: Annotated[int, typer.Option(help="Seed of data order and sampling.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a small model on generated scenes and show it before and after, in minutes on two CPU cores."""
    from fastrl.toy.demos import run_demo

    result = run_demo(method, task=task, family=family, out=out, seed=seed, steps=steps, say=say)
    if as_json:
        print_json(result)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a YAML file.")],
    data: Data = None,
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="Run folder [runs/NAME].")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint in the run folder.")
    ] = False,
    from_step: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --resume: from the checkpoint of step N.")
    ] = None,
    accept_changed_data: Annotated[
        bool, typer.Option("--accept-changed-data", help="With --resume: continue although the data changed.")
    ] = False,
    skip_bad: SkipBad = False,
    blank_images: Blank = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write a trace.json of a few steps to the folder.")
    ] = False,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Set a recipe key.")] = None,
) -> None:
    """Train a recipe."""
    from fastrl.recipe import load_recipe
    from fastrl.run.setup import is_first_rank
    from fastrl.trainer import train as run

    changes: dict[str, Any] = {"data.spec": data, "model.path": model, "out": str(out) if out else None}
    if skip_bad:
        changes["data.skip_bad"] = True
    if blank_images:
        changes["data.blank_images"] = True
    named = [f"{key}={json.dumps(value)}" for key, value in changes.items() if value is not None]
    made = load_recipe(recipe, [*named, *(overrides or [])])
    summary = run(
        made,
        resume=resume,
        from_step=from_step,
        accept_changed_data=accept_changed_data,
        profile=profile,
    )
    if is_first_rank(made):
        say(f"step {summary.steps}, {summary.seconds:.0f} s, {summary.out / 'metrics.jsonl'}")
        folders = {"model": summary.model, "best": summary.best and summary.best / "model", "adapter": summary.adapter}
        for name, folder in folders.items():
            if folder is not None:
                say(f"{name}: {folder}")
    if summary.interrupted:
        raise typer.Exit(130)


@app.command(name="eval")
def evaluate(
    task: Annotated[str, typer.Argument(help="grounding, counting, detection, ocr, …")],
    data: Annotated[str, typer.Option("--data", metavar="SPEC", help="adapter:path[?key=value&…]")],
    model: Model = None,
    predictions: Annotated[Path | None, typer.Option(help="JSONL of {id, answer}, or COCO result JSON.")] = None,
    frame: Annotated[
        str,
        typer.Option(
            help="Frame of --predictions' coordinates: auto, original, resized, thousand, unit or padded_unit."
        ),
    ] = "auto",
    family: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="Model family of --predictions: a config.model_type such as qwen3_vl."),
    ] = None,
    min_pixels: Annotated[
        int | None,
        typer.Option(min=1, help="Least area of a resized picture; also for --predictions with --frame resized."),
    ] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Largest area; likewise.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer [the protocol's].")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Evaluate the first N records.")] = None,
    skip_bad: SkipBad = False,
    blank_images: Blank = False,
    reflect: Annotated[int | None, typer.Option(min=1, help="Captions: number of turns with a critic.")] = None,
    critic: Annotated[str, typer.Option(metavar="SPEC", help="With --reflect: rule, model:DIR or http:URL")] = "rule",
    attention: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --reflect: write attention maps here.")
    ] = None,
    soft: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="Captions: match softly by a sentence-embedding model; auto: CAPTURE's, if downloaded; none: rules.",
        ),
    ] = "auto",
    normalise: Annotated[str | None, typer.Option(help="OCR: nfc, or none (texts unchanged) [nfc].")] = None,
    out: Annotated[Path | None, typer.Option(help="Write answers and metrics to this JSONL file.")] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a model, or answers from a file, with the papers' protocols."""
    if reflect is not None:
        from fastrl.evaluate.reflect import evaluate_reflection
        from fastrl.report.figures import heat_maps

        if task != "caption" or model is None or predictions is not None or blank_images:
            raise ValueError("--reflect needs eval caption --model DIR, without --predictions and --blank-images")
        metrics = evaluate_reflection(
            data,
            model=model,
            critic=critic,
            turns=reflect,
            max_new_tokens=max_new_tokens,
            pixels=(min_pixels, max_pixels),
            limit=limit,
            skip_bad=skip_bad,
            soft=soft,
            out=out,
            attention=attention,
            draw=heat_maps,
            say=say,
        )
        _print_metrics(metrics, as_json)
        return
    if attention is not None:
        raise ValueError("--attention needs --reflect")
    from fastrl.evaluate.run import run_evaluation

    metrics = run_evaluation(
        task,
        data,
        model=model,
        predictions=predictions,
        frame=frame,
        family=family,
        pixels=(min_pixels, max_pixels),
        max_new_tokens=max_new_tokens,
        limit=limit,
        skip_bad=skip_bad,
        blank_images=blank_images,
        soft=soft,
        normalise=normalise,
        out=out,
        say=say,
    )
    _print_metrics(metrics, as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    out: Annotated[Path | None, typer.Option(help="The page [RUN/report.html].")] = None,
) -> None:
    """Write a run's curves and sample answers as one self-contained HTML page."""
    from fastrl.report.page import write_report

    print(write_report(run, out))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a YAML file.")],
    gpu: Annotated[str, typer.Option(help="h100-80, h200, a100-80, a100-40, rtx4090, l40s, …")] = "h100-80",
    gpus: Annotated[int, typer.Option(min=1, help="Data-parallel GPUs of a node.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    engine: Annotated[str | None, typer.Option(help="fsdp2, zero0 to zero3 or local [the recipe's].")] = None,
    model: Model = None,
    images: Annotated[int | None, typer.Option(min=0, help="Images a prompt [data.frames, or 1].")] = None,
    image_pixels: Annotated[int | None, typer.Option(min=1, help="Area of each image [the recipe's largest].")] = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt besides its images.")] = 128,
    answer_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each answer [the recipe's longest].")
    ] = None,
    efficiency: Annotated[float, typer.Option(help="Fraction of the GPU's peak rates that is reached.")] = 0.4,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Set a recipe key.")] = None,
    as_json: Json = False,
) -> None:
    """Memory, work and time of a recipe's step on a GPU, and what to change if it does not fit. Loads no weights."""
    from fastrl.plan import advise, engine_settings, gpu_named, make_plan, plan_text, plan_values
    from fastrl.recipe import load_recipe

    named = [f"model.path={json.dumps(model)}"] if model is not None else []
    sizes = {"images": images, "image_pixels": image_pixels, "text_tokens": text_tokens, "answer_tokens": answer_tokens}
    named += engine_settings(engine, gpus * nodes) if engine is not None else []
    chosen, device = load_recipe(recipe, [*named, *(overrides or [])]), gpu_named(gpu)
    made = make_plan(chosen, device, gpus=gpus, nodes=nodes, efficiency=efficiency, sizes=sizes)
    changes = advise(made, sizes)
    if as_json:
        print_json(plan_values(made, changes))
    else:
        print(plan_text(made, changes))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, device, the path every kernel takes here, and which optional libraries are usable."""
    from fastrl.cli.doctor import print_report, report

    found = report()
    if as_json:
        print_json(found)
    else:
        print_report(found)


@app.command(name="tpl")
def tpl_command(
    model: Annotated[str, typer.Option(metavar="DIR", help="Folder, tiny:NAME or downloaded hub name.")],
    data: Annotated[str, typer.Option(metavar="FILE", help="Dialogues (JSONL), or adapter:path[?key=value&…]")],
    samples: Annotated[int, typer.Option(min=1, help="Random single frames per clip.")] = 4,
    single: Annotated[str, typer.Option(help="Which single frame: random, first, middle, last or best.")] = "random",
    form: Annotated[str, typer.Option(help="log: nats per token; ppl: perplexities.")] = "log",
    absent: Annotated[
        str, typer.Option(help='In place of the other frames: "left out" (nothing), or grey pictures (grey).')
    ] = "left out",
    keep_top: Annotated[float | None, typer.Option(help="Keep this fraction (or percentage) of the rows.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the kept rows here, with a tpl field.")] = None,
    curve: Annotated[bool, typer.Option("--curve", help="Score every frame on its own.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Figure [beside --out, else runs/tpl-NAME.png].")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random frames.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N records.")] = None,
    min_pixels: Annotated[int | None, typer.Option(min=1, help="Least area of a resized image.")] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Largest area of a resized image.")] = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Temporal perplexity: how much each answer depends on the whole clip; filter rows by it (Video-UTR)."""
    from fastrl.evaluate.tpl_run import TplOptions, run_tpl
    from fastrl.report.tpl import draw_tpl

    options = TplOptions(
        model=model,
        data=data,
        samples=samples,
        single=single,
        form=form,
        absent=absent,
        seed=seed,
        curve=curve,
        keep_top=keep_top,
        limit=limit,
        skip_bad=skip_bad,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
    )
    result = run_tpl(options, out=out, plot=plot, draw=draw_tpl, say=say)
    if as_json:
        print_json(result)
        return
    for value in result["values"]:
        alone = ", ".join(f"{frame}: {score:.3f}" for frame, score in value["curve"].items())
        print(f"{value['tpl']:+.4f}  {value['id']}  all {value['full']:.3f}; alone {alone}")
    print(f"mean {result['mean_tpl']:.4f}, standard deviation {result['std_tpl']:.4f}, {result['n']} records")
    if out is not None:
        print(f"kept {result['kept']} with tpl of at least {result['threshold']:.4f}: {out}")
    if result["plot"]:
        print(f"figure: {result['plot']}")


@app.command(name="reflect")
def reflect_command(
    model: Annotated[str, typer.Option(metavar="DIR", help="Folder, tiny:NAME or downloaded hub name.")],
    critic: Annotated[str, typer.Option(metavar="SPEC", help="rule, model:DIR or http:URL")],
    image: Annotated[Path, typer.Option(help="The picture.")],
    question: Annotated[str, typer.Option(help="The question about it.")] = PROMPTS["caption"],
    turns: Annotated[int, typer.Option(min=1, help="Number of answers; all are printed.")] = 3,
    stop_at: Annotated[float | None, typer.Option(help="Stop early at an answer of at least this score.")] = None,
    reference: Annotated[list[str] | None, typer.Option(help="A true caption (rule critic; repeatable).")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    attention: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write attention maps of each answer here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Let a model answer, a critic score and explain, and the model answer again (RePer)."""
    from fastrl.evaluate.reflect import reflect_on_image
    from fastrl.report.figures import heat_maps

    result = reflect_on_image(
        image,
        question,
        model=model,
        critic=critic,
        turns=turns,
        references=reference or (),
        max_new_tokens=max_new_tokens,
        stop_at=stop_at,
        attention=attention,
        draw=heat_maps,
        say=say if as_json else print,
    )
    if as_json:
        print_json(result)
    if result["error"]:
        raise typer.Exit(1)


@tiny_app.command(name="build")
def tiny_build(
    name: Annotated[str, typer.Argument(help="perception, language, video, video-narrow, llava, or all")],
    out: Annotated[Path, typer.Option(help="Folder of the stages: the model is the one in it that has its name.")],
) -> None:
    """Build a shipped model from nothing, in all its stages, as it ships. Nothing else is read.

    The same tree gives the same bytes on one machine, in one thread whatever OMP_NUM_THREADS says; docs/tiny.md says
    what another machine gives. CPU minutes (of a busy AMD EPYC): perception 37, language 30, video 30, video-narrow 14,
    llava 20, all 101. Stages that the folder has are not built again, so an interrupted build continues and models
    share the stages that they begin with.
    """
    from fastrl.toy.teach.stages import SHIPPED, build_shipped

    for each in SHIPPED if name == "all" else (name,):
        say(f"tiny:{each} is in {build_shipped(each, out, log=say)}")


@tiny_app.command(name="teach")
def tiny_teach(
    lessons: Annotated[
        str, typer.Argument(help="perception, language, dialogues, reasons, video, llava-pictures or llava")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    steps: Annotated[int, typer.Option(min=1)] = 1500,
    rows: Annotated[int, typer.Option(min=1, help="Scenes per step.")] = 16,
    start: Annotated[
        str | None, typer.Option("--from", metavar="DIR", help="Start from the weights of this small model.")
    ] = None,
    retokenize: Annotated[bool, typer.Option("--retokenize", help="With --from: train a new vocabulary.")] = False,
    width: Annotated[int, typer.Option(help="Hidden size of the text half: 128 or 64.")] = 128,
    seed: Annotated[int, typer.Option()] = 0,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
) -> None:
    """Teach one stage with settings of your own: a small Qwen2.5-VL or LLaVA-1.5, new or from another small model.

    In one thread, whatever OMP_NUM_THREADS says.
    """
    from fastrl.models.open import resolve_model
    from fastrl.toy.teach.build import build

    begin = resolve_model(start) if start is not None else None
    build(
        lessons,
        out,
        steps=steps,
        rows=rows,
        seed=seed,
        lr=lr,
        start=begin,
        retokenize=retokenize,
        width=width,
        log=say,
    )


def main() -> None:
    """Run the command; an error that the user can fix becomes one message on stderr and exit status 2."""
    use_expandable_segments(os.environ)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # the source line does not help users
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not type(error).__module__.startswith("fastrl"):
            raise
        file = error.filename if isinstance(error, OSError) else None
        message = f"{file}: {error.strerror}" if isinstance(error, OSError) and file is not None else str(error)
        sys.stderr.write(f"error: {message}\n")
        _leave(2)
    except ModuleNotFoundError as error:
        sys.stderr.write(f"error: {error.name} is not installed; {MISSING}\n")
        raise SystemExit(2) from None


def _leave(status: int) -> NoReturn:
    """As ``fastrl.engine.ranks.leave``, and without loading torch where no command did."""
    if "torch.distributed" in sys.modules:
        from fastrl.engine.ranks import leave

        leave(status)
    raise SystemExit(status) from None


def _print_metrics(metrics: Mapping[str, float | None], as_json: bool) -> None:
    if as_json:
        print_json(dict(metrics))
        return
    width = max(14, *(len(name) for name in metrics))
    for name, value in metrics.items():
        shown = "not defined" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
        print(f"{name:>{width}}  {shown}")


if __name__ == "__main__":
    main()
