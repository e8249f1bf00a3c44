"""``fastrl build``: training data from a model's own answers (PerPO, RePer) and from tracked clips (UTR)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fastrl.cli.terminal import Json, SkipBad, print_json, say

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Build training data from a model's own answers.")


@app.command(name="perpo")
def build_perpo(
    task: Annotated[str, typer.Option(help="grounding or ocr")],
    model: Annotated[str, typer.Option(metavar="DIR", help="Folder, tiny:NAME or downloaded hub name.")],
    data: Annotated[str, typer.Option(metavar="SPEC", help="adapter:path[?key=value&…]")],
    out: Annotated[Path, typer.Option(help="JSONL of ranked lists; an unfinished one is continued.")],
    n: Annotated[int | None, typer.Option(help="Answers per prompt [grounding 20, ocr 5].")] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 1.0,
    min_gap: Annotated[float | None, typer.Option(help="Least best − worst reward [grounding 0.8, ocr 0.04].")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer [grounding 128, ocr 2048].")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    min_pixels: Annotated[int | None, typer.Option(min=1, help="Least area of a resized image.")] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Largest area; use the same limits in training.")
    ] = None,
    unreadable: Annotated[
        str, typer.Option(help="Answers that cannot be parsed: drop, or worst (kept as the worst of their list).")
    ] = "drop",
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Sample answers, score them, and keep the lists whose best and worst are far apart (PerPO)."""
    from fastrl.build.perpo import build_lists, make_options

    options = make_options(
        task,
        model,
        data,
        n=n,
        temperature=temperature,
        min_gap=min_gap,
        max_new_tokens=max_new_tokens,
        limit=limit,
        seed=seed,
        skip_bad=skip_bad,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        unreadable=unreadable,
    )
    summary = build_lists(options, out, say=say)
    _show(summary, out, as_json, "lists of {prompts} prompts", ("dropped", "answers"))
    if not as_json:
        print(f"mean reward of the kept lists: best {summary['mean_best']:.3f}, worst {summary['mean_worst']:.3f}")


@app.command(name="reper")
def build_reper(
    model: Annotated[str, typer.Option(metavar="DIR", help="Folder, tiny:NAME or downloaded hub name.")],
    critic: Annotated[str, typer.Option(metavar="SPEC", help="rule, model:DIR or http:URL")],
    data: Annotated[str, typer.Option(metavar="SPEC", help="adapter:path[?key=value&…]")],
    out: Annotated[Path, typer.Option(help="JSONL of dialogues; an unfinished one is continued.")],
    temperatures: Annotated[str, typer.Option(help="Sample one caption at each.")] = "0,0.2,0.4,0.6,0.8,1,1.2,1.4",
    min_best: Annotated[float | None, typer.Option(help="Least best score [0.9; rule 0.55].")] = None,
    min_gap: Annotated[float | None, typer.Option(help="Least best − worst score [0.4; rule 0.2].")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest caption.")] = 512,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first pictures.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling and of the dialogues.")] = 0,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Caption pictures at several temperatures, score the captions, and make dialogues from bad to good (RePer)."""
    from fastrl.build.reper import BuildOptions, build_dialogues, parse_temperatures

    options = BuildOptions(
        model=model,
        data=data,
        critic=critic,
        temperatures=parse_temperatures(temperatures),
        min_best=min_best,
        min_gap=min_gap,
        max_new_tokens=max_new_tokens,
        seed=seed,
        limit=limit,
        skip_bad=skip_bad,
    )
    summary = build_dialogues(options, out, say=say)
    _show(summary, out, as_json, "dialogues of {pictures} pictures", ("turns", "dropped", "captions"))
    if not as_json:
        print(f"mean score of the kept pictures: best {summary['mean_best']:.3f}, worst {summary['mean_worst']:.3f}")


@app.command(name="utr")
def build_utr(
    data: Annotated[str, typer.Option(metavar="SPEC", help="mot:, sav:, tracks: or scenes:trajectory")],
    frames: Annotated[int, typer.Option(min=2, help="Frames of each clip.")],
    out: Annotated[Path, typer.Option(help="JSONL of dialogues; an unfinished one is continued.")],
    queries: Annotated[str, typer.Option(help="Kinds of queries.")] = "spatial,temporal",
    sample: Annotated[str, typer.Option(help="Which frames: uniform, first or random.")] = "uniform",
    min_frames: Annotated[int, typer.Option(min=2, help="Frames a subject's track must cover.")] = 3,
    answers: Annotated[str, typer.Option(help="trajectory, or frame: what one frame shows.")] = "trajectory",
    motion: Annotated[bool, typer.Option("--motion", help="Describe the motion of subjects without actions.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first clips.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of queries and of random frames.")] = 0,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Ask questions about tracked clips that a few frames cannot answer, with the answers (Video-UTR)."""
    from fastrl.build.utr import BuildOptions, build_dialogues, parse_queries

    options = BuildOptions(
        data=data,
        frames=frames,
        sample=sample,
        queries=parse_queries(queries),
        min_frames=min_frames,
        answers=answers,
        motion=motion,
        seed=seed,
        limit=limit,
        skip_bad=skip_bad,
    )
    summary = build_dialogues(options, out, say=say)
    _show(summary, out, as_json, "dialogues of {clips} clips", ("queries", "dropped", "notes"))
    if not as_json:
        print(f"subjects: {summary['subjects']}")


def score(
    model: Annotated[str, typer.Option(metavar="DIR", help="Folder, tiny:NAME or downloaded hub name.")],
    data: Annotated[str, typer.Option(metavar="SPEC", help="adapter:path[?key=value&…]")],
    out: Annotated[Path, typer.Option(help="JSONL of difficulties; an unfinished one is continued.")],
    n: Annotated[int, typer.Option(min=1, help="Answers per prompt.")] = 8,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0: greedy.")] = 1.0,
    component: Annotated[
        str | None, typer.Option(help="Part of the task's reward, such as f1 [all parts, summed].")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer [the protocol's].")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N records.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    min_pixels: Annotated[int | None, typer.Option(min=1, help="Least area of a resized image.")] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Largest area of a resized image.")] = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """How difficult each record is for a model, by the rewards of its answers: for data.curriculum.scores."""
    from fastrl.build.score import ScoreOptions, score_data

    options = ScoreOptions(
        model=model,
        data=data,
        n=n,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        component=component,
        seed=seed,
        limit=limit,
        skip_bad=skip_bad,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
    )
    summary = score_data(options, out, say=say)
    if as_json:
        print_json({**summary, "out": str(out)})
        return
    print(f"{summary['kept']} records in {out} ({summary['seconds']:.0f} s), mean reward {summary['mean_reward']:.3f}")


def _show(summary: Mapping[str, Any], out: Path, as_json: bool, what: str, counts: Sequence[str]) -> None:
    """Print a builder's summary: as JSON, or as text with a line for each of its ``counts``."""
    if as_json:
        print_json({**summary, "out": str(out)})
        return
    print(f"{summary['kept']} {what.format(**summary)} in {out} ({summary['seconds']:.0f} s)")
    for kind in counts:
        print(f"{kind}: " + (", ".join(f"{why} {count}" for why, count in sorted(summary[kind].items())) or "none"))
