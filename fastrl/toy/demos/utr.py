"""UTR's demo: the same training on two kinds of questions about the same clips, compared on whole trajectories.

A hack-prone set (what does the clip show? answerable from any frame) and a UTR set of equal size (where is this subject
in all frames, and what does it do?) are made from the same scene clips. A copy of the small video model is trained on
each for the same steps, at the learning rate that was chosen for it (``RATES``). Both are measured on UTR questions
about unseen clips: by the overlap of the whole trajectory, and by temporal perplexity, which is how much better the
model predicts the true answer from all frames than from one. The clips are longer than those the small model was
trained on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fastrl.build.utr import BuildOptions, build_dialogues
from fastrl.data import load_data
from fastrl.evaluate.run import sample_records
from fastrl.evaluate.tpl import temporal_perplexity
from fastrl.evaluate.trajectory import evaluate_trajectory, trajectory_ious
from fastrl.recipe import load_recipe
from fastrl.rewards.base import unknown
from fastrl.run.setup import load_model
from fastrl.toy.demos.claims import Claim, Result, gains
from fastrl.toy.demos.evidence import Compared, Scores, change, print_evidence, report
from fastrl.toy.demos.families import DEFAULT, rates_of, recipe_for
from fastrl.toy.demos.scenes import REPORTED_SEED, scenes_like
from fastrl.toy.demos.table import print_rows
from fastrl.trainer import train

if TYPE_CHECKING:
    from fastrl.data.records import Record
    from fastrl.models.load import Policy

CLIPS, HELD_OUT, REPORTED, MAX_NEW_TOKENS = 256, 64, 256, 160
SETS = {"hack": "what one frame tells", "utr": "UTR"}
# Learning rate of each set by family: what ``fastrl study hacking`` chose for the same model on four times the clips,
# each set's by the likelihood of its own texts (benchmarks/results/studies/hacking.json: ``tried``)
RATES: Mapping[str, Mapping[str, float]] = {DEFAULT: {"hack": 5e-4, "utr": 1e-3}}
COLORS = {"start": "#999999", "hack": "#d73027", "utr": "#1a9850"}

CLAIM = Claim(
    "on every seed the UTR set beats the hack-prone one in trajectory IoU (sampled and greedy) and in temporal "
    "perplexity, and gains IoU on the start (greedy: more than 0.05)",
    (
        *(gains(f"UTR against one frame{kind}") for kind in ("", ", greedy", ", TPL")),
        gains("UTR"),
        gains("UTR, greedy", above=0.05),
    ),
)
COMPARED: tuple[Compared, ...] = (
    change("UTR", "sampled", "start", "utr"),
    change("UTR, greedy", "greedy", "start", "utr"),
    change("UTR, TPL", "tpl", "start", "utr"),
    change("UTR against one frame", "sampled", "hack", "utr"),
    change("UTR against one frame, greedy", "greedy", "hack", "utr"),
    change("UTR against one frame, TPL", "tpl", "hack", "utr"),
)


@dataclass
class Measured:
    """Held-out numbers of a policy."""

    sampled: dict[str, float]  # trajectory metrics of answers sampled at temperature 1
    greedy: dict[str, float]
    tpl: float  # mean over the held-out answers
    scores: Scores  # of each clip: ``sampled`` and ``greedy`` IoU, ``tpl``

    def numbers(self) -> dict[str, float]:
        """The numbers in the table."""
        return {
            "mean_iou": self.sampled["mean_iou"],
            "greedy_mean_iou": self.greedy["mean_iou"],
            "greedy_recall@0.5": self.greedy["recall@0.5"],
            "tpl": self.tpl,
        }


def run(
    *,
    task: str | None,
    out: Path,
    seed: int,
    say: Callable[[str], None],
    family: str | None = None,
    clips: int = CLIPS,
    held_out: int = HELD_OUT,
    reported: int = REPORTED,
    steps: int | None = None,
) -> dict[str, Any]:
    """Measure, build both sets, train a copy on each, measure each; writes both sets, a run folder for each,
    ``comparison.png`` and ``scores.jsonl`` in ``out``.

    Raises:
        ValueError: an unknown task.
    """
    if task not in (None, "trajectory"):
        raise ValueError(unknown("demo task", str(task), ("trajectory",)))
    started = time.perf_counter()
    named = recipe_for("utr", family)
    base = load_recipe(named)
    rates = rates_of(RATES, family, SETS, base.optim.lr)
    records = load_data(scenes_like(base.data_spec, n=held_out))
    others = load_data(scenes_like(base.data_spec, n=reported, seed=REPORTED_SEED))
    say(f"measuring two sets of {held_out} and {reported} held-out clips before training …")
    start = load_model(base)
    found, unseen = {"start": measure(start, records)}, {"start": measure(start, others).scores}
    source = scenes_like(base.data_spec, n=clips, seed=seed + 1)
    sets = build_sets(source, base.data.frames or 6, seed, out)
    size = len(sets["utr"])
    say(f"made two sets of {size} about the same {clips} clips")
    for name, title in SETS.items():
        recipe = load_recipe(named, _changes(source, out / name, seed, steps) | {"optim.lr": rates[name]})
        shown = f"{recipe.optim.steps} steps of {recipe.data.prompts_per_step}, learning rate {rates[name]:g}"
        say(f"training on {title}: {shown} …")
        policy = load_model(recipe)
        train(recipe, records=sets[name], policy=policy)
        found[name], unseen[name] = measure(policy, records), measure(policy, others).scores
    models = {name: measured.numbers() for name, measured in found.items()}
    draw_comparison(models, out / "comparison.png")
    result = {
        "method": "utr",
        "task": "trajectory",
        "metric": "mean_iou",
        "before": models["start"]["mean_iou"],
        "after": models["utr"]["mean_iou"],
        "greedy_before": models["start"]["greedy_mean_iou"],
        "greedy_after": models["utr"]["greedy_mean_iou"],
        "models": models,
        "unseen": report(out / "scores.jsonl", others, unseen, COMPARED),
        "rates": dict(rates),
        "dialogues": size,
        "held_out": held_out,
        "steps": recipe.optim.steps,
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "out": str(out),
    }
    print_table(result)
    return result


def build_sets(spec: str, frames: int, seed: int, out: Path) -> dict[str, Sequence[Record]]:
    """Records of both sets, equally many, about the clips of ``spec``; the UTR set is built in ``out``."""
    build_dialogues(BuildOptions(spec, frames=frames, seed=seed), out / "utr.jsonl")
    return read_sets(spec, seed, out)


def read_sets(spec: str, seed: int, out: Path) -> dict[str, Sequence[Record]]:
    """What :func:`build_sets` built in ``out`` before."""
    from fastrl.data.scenes import Scenes
    from fastrl.data.scenes.tasks import shown_in

    scenes = load_data(spec).records
    assert isinstance(scenes, Scenes)
    size = len(scenes)  # one question about each clip; of the dialogues as many, drawn from all clips
    hack = [shown_in(scenes.clip(number)) for number in range(size)]
    utr = load_data(f"utr:{out / 'utr.jsonl'}?seed={seed}&limit={size}")
    return {"hack": hack[: len(utr)], "utr": utr}


def measure(policy: Policy, records: Sequence[Record]) -> Measured:
    """Trajectory metrics of sampled and of greedy answers, and mean temporal perplexity of the true ones."""
    from fastrl.rollout import Sampling

    found: dict[float, dict[str, float]] = {}
    each: dict[str, list[float]] = {}
    for temperature, name in ((1.0, "sampled"), (0.0, "greedy")):
        sampling = Sampling(n=1, max_new_tokens=MAX_NEW_TOKENS, temperature=temperature)
        answered = [(r, c[0].text) for r, c in sample_records(policy, records, sampling, seed=0, portion=128)]
        found[temperature] = evaluate_trajectory([r for r, _ in answered], [text for _, text in answered])
        each[name] = trajectory_ious([r for r, _ in answered], [text for _, text in answered])
    each["tpl"] = [value.tpl for value in temporal_perplexity(policy, records, samples=2, seed=0)]
    return Measured(found[1.0], found[0.0], fmean(each["tpl"]), each)


def _changes(spec: str, out: Path, seed: int, steps: int | None) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "data.spec": spec,
        "checkpoint.every": 0,
        "log.samples_every": 0,
        "log.every": 10,
        "out": str(out),
        "seed": seed,
    }
    return changes if steps is None else changes | {"optim.steps": steps}


def draw_comparison(models: dict[str, dict[str, float]], path: Path) -> None:
    """Greedy trajectory IoU and temporal perplexity of the start and of both trained models."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    titles = (("greedy_mean_iou", "trajectory IoU (greedy)"), ("tpl", "temporal perplexity, nats a token"))
    for axis, (key, title) in zip(figure.subplots(1, 2), titles, strict=True):
        names = list(models)
        bars = axis.bar(names, [models[n][key] for n in names], color=[COLORS[n] for n in names], width=0.6)
        axis.bar_label(bars, fmt="%.3f", fontsize=8)
        axis.set_xticks(range(len(names)), ["start", *SETS.values()], fontsize=8)
        axis.set_title(f"{title}, held-out clips", fontsize=8)
    figure.savefig(path, dpi=120)


def print_table(result: Result) -> None:
    """The comparison, on stdout."""
    title = f"{result['held_out']} held-out clips; {result['dialogues']} dialogues, {result['steps']} steps each"
    start, rows = result["models"]["start"], []
    for name, row in result["models"].items():
        cells = [f"{v:.3f}" if name == "start" else f"{v:.3f} {v - start[k]:+.3f}" for k, v in row.items()]
        rows.append((SETS.get(name, "– (start)"), *cells))
    print_rows(title, ("trained on", "trajectory IoU", "greedy", "greedy recall@0.5", "TPL"), rows)
    print_evidence(result["unseen"], "clips")
    print(f"{result['seconds']:.0f} s; dialogues, curves and figure in {result['out']}")
