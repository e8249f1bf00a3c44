"""PerPO's demo: three methods trained on one set of ranked lists of scene answers, measured on held-out scenes.

PerPO, DPO (best against worst) and SFT (best only) start from the same model and use the same lists in the same order
for the same number of steps, each at the learning rate that is best for it (``RATES``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.build.perpo import build_lists, make_options
from fastrl.data import load_data
from fastrl.evaluate.refcoco import evaluate_grounding
from fastrl.evaluate.run import sample_records
from fastrl.models.families.llava import Llava
from fastrl.models.open import open_policy
from fastrl.recipe import Recipe, load_recipe
from fastrl.rewards.base import unknown
from fastrl.rewards.grounding import GroundingReward
from fastrl.run.setup import load_model
from fastrl.toy.demos.claims import Claim, beyond_spread, gains
from fastrl.toy.demos.evidence import Compared, Scores, change, per_record, print_evidence, report
from fastrl.toy.demos.families import DEFAULT, rates_of, recipe_for
from fastrl.toy.demos.scenes import REPORTED_SEED, scenes_like
from fastrl.toy.demos.table import print_rows
from fastrl.trainer import train

if TYPE_CHECKING:
    from fastrl.data.records import Record
    from fastrl.models.load import Policy

TASKS = ("grounding",)
METHODS = {"perpo": "PerPO", "dpo": "DPO (best, worst)", "sft": "SFT (best)"}
PROMPTS, ANSWERS, STEPS, PER_STEP = 1024, 12, 64, 16
SHOWN = 6  # scenes in the figure
# Learning rate of each kind by family: what ``fastrl study blind`` chose, which trains the same recipe on such lists
# (benchmarks/results/studies/blind.json and blind-llava.json: ``tried``).
RATES: Mapping[str, Mapping[str, float]] = {
    DEFAULT: {"perpo": 5e-5, "dpo": 1e-4, "sft": 8e-4},
    Llava.model_type: {"perpo": 1e-4, "dpo": 1e-4, "sft": 4e-4},
}
CLAIM = Claim(
    "PerPO beats the starting model in mean IoU on every seed, by more than the spread between seeds",
    (gains("PerPO"), beyond_spread("PerPO")),
)
COMPARED: tuple[Compared, ...] = (
    change("PerPO", "sampled", "start", "perpo"),
    change("PerPO, greedy", "greedy", "start", "perpo"),
    change("PerPO against DPO", "sampled", "dpo", "perpo"),
    change("PerPO against SFT", "sampled", "sft", "perpo"),
)
COLORS = {"start": "#999999", "sft": "#fdae61", "dpo": "#74add1", "perpo": "#1a9850"}


@dataclass
class Measured:
    """Held-out metrics of a policy, and its greedy answers."""

    sampled: dict[str, float]  # of answers sampled at temperature 1
    greedy: dict[str, float]
    answers: list[tuple[Record, str]]
    scores: Scores  # IoU of each record: ``sampled``, ``greedy``


def run(
    *,
    task: str | None,
    out: Path,
    seed: int,
    say: Callable[[str], None],
    family: str | None = None,
    held_out: int = 512,
    prompts: int = PROMPTS,
    steps: int = STEPS,
) -> dict[str, Any]:
    """Measure, build lists, train with three methods, measure each; writes ``lists.jsonl`` with its histogram, a run
    folder per method, ``comparison.png``, ``before_after.png`` and ``scores.jsonl`` in ``out``.

    Raises:
        ValueError: an unknown task or family.
    """
    task = task or "grounding"
    if task not in TASKS:
        raise ValueError(unknown("demo task", task, TASKS))
    started = time.perf_counter()
    name = recipe_for(f"perpo-{task}", family)
    base = load_recipe(name)
    length, rates = base.rollout.max_new_tokens, rates_of(RATES, family, METHODS, base.optim.lr)
    records = load_data(scenes_like(base.data.spec, n=held_out))
    reported = load_data(scenes_like(base.data.spec, n=held_out, seed=REPORTED_SEED))
    policy = open_policy(base.model.path)
    say(f"measuring two sets of {held_out} held-out scenes before training …")
    before, unseen = measure(policy, records, length), {"start": measure(policy, reported, length).scores}
    lists = sample_lists(base, out / "lists.jsonl", prompts, seed, policy, say)
    after: dict[str, Measured] = {}
    for kind, title in METHODS.items():
        say(f"training {title}: {steps} steps of {PER_STEP} lists, learning rate {rates[kind]:g} …")
        trained = train_on(out / "lists.jsonl", name, kind, rates[kind], out / kind, seed, steps)
        after[kind], unseen[kind] = measure(trained, records, length), measure(trained, reported, length).scores
    _draw_comparison(before, after, out / "comparison.png")
    from fastrl.report.figures import before_after

    before_after(before.answers[:SHOWN], after["perpo"].answers[:SHOWN], out / "before_after.png")
    result = {
        "method": "perpo",
        "task": task,
        "metric": "mean_iou",
        "before": before.sampled["mean_iou"],
        "after": after["perpo"].sampled["mean_iou"],
        "greedy_before": before.greedy["mean_iou"],
        "greedy_after": after["perpo"].greedy["mean_iou"],
        "models": {
            name: {f"{how}_{key}": values[key] for how, values in _both(found) for key in ("mean_iou", "acc@0.5")}
            for name, found in {"start": before, **after}.items()
        },
        "unseen": report(out / "scores.jsonl", reported, unseen, COMPARED),
        "rates": dict(rates),
        "lists": lists,
        "held_out": held_out,
        "steps": steps,
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "out": str(out),
    }
    print_table(result)
    return result


def sample_lists(base: Recipe, path: Path, prompts: int, seed: int, policy: Policy, say: Callable[[str], None]) -> int:
    """Write ranked lists of the policy's answers to ``prompts`` scenes; the number of lists that were kept."""
    options = make_options(
        "grounding",
        base.model.path,
        scenes_like(base.data.spec, n=prompts, seed=seed),
        n=ANSWERS,
        min_gap=base.method.min_gap,  # type: ignore[attr-defined]
        max_new_tokens=base.rollout.max_new_tokens,
        seed=seed,
    )
    say(f"sampling and ranking {ANSWERS} answers to each of {prompts} scenes …")
    lists = build_lists(options, path, policy=policy)
    say(f"{lists['kept']} lists, best {lists['mean_best']:.3f}, worst {lists['mean_worst']:.3f} on average")
    return lists["kept"]


def train_on(lists: Path, name: str, kind: str, rate: float, out: Path, seed: int, steps: int = STEPS) -> Policy:
    """The starting model after training on lists with one kind of loss at one learning rate; run folder ``out``."""
    recipe = load_recipe(
        name,
        {
            "method.kind": kind,
            "data.spec": f"lists:{lists}",
            "data.prompts_per_step": PER_STEP,
            "optim.steps": steps,
            "optim.lr": rate,
            "checkpoint.every": 0,
            "log.samples_every": 0,
            "log.every": 10,
            "out": str(out),
            "seed": seed,
        },
    )
    policy = load_model(recipe)
    train(recipe, policy=policy)
    return policy


def measure(policy: Policy, records: Any, max_new_tokens: int, samples: int = 2) -> Measured:
    """Grounding metrics of ``samples`` answers per record at temperature 1 (a fixed seed), and of the greedy one."""
    from fastrl.rollout import Sampling

    found: dict[bool, dict[str, float]] = {}
    each: dict[str, list[float]] = {}
    reward = GroundingReward(format="none")
    greedy_answers: list[tuple[Record, str]] = []
    for greedy in (False, True):
        n = 1 if greedy else samples
        sampling = Sampling(n=n, max_new_tokens=max_new_tokens, temperature=0.0 if greedy else 1.0)
        answered = list(sample_records(policy, records, sampling, seed=0, portion=128))
        pairs = [(record, completion.text) for record, completions in answered for completion in completions]
        texts, asked = [text for _, text in pairs], [record for record, _ in pairs]
        found[greedy] = evaluate_grounding(asked, texts)
        each["greedy" if greedy else "sampled"] = per_record(reward.score(texts, asked)["iou"], n)
        greedy_answers = pairs
    return Measured(found[False], found[True], greedy_answers, each)


def _both(found: Measured) -> list[tuple[str, dict[str, float]]]:
    return [("sampled", found.sampled), ("greedy", found.greedy)]


def _draw_comparison(before: Measured, after: dict[str, Measured], path: Path) -> None:
    """Mean IoU and accuracy of the start and of each method, sampled and greedy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    models = {"start": before, **{kind: after[kind] for kind in ("sft", "dpo", "perpo")}}
    for axis, (key, title) in zip(
        figure.subplots(1, 2), (("mean_iou", "mean IoU"), ("acc@0.5", "Acc@0.5")), strict=True
    ):
        for place, (name, found) in enumerate(models.items()):
            values = [metrics[key] for _, metrics in _both(found)]
            spots = [group + 0.2 * (place - 1.5) for group in range(2)]
            bars = axis.bar(spots, values, width=0.18, color=COLORS[name], label=METHODS.get(name, name))
            axis.bar_label(bars, fmt="%.2f", fontsize=7)
        axis.set_xticks([0, 1], ["sampled (temperature 1)", "greedy"])
        axis.set_title(f"{title}, held-out scenes", fontsize=9)
    figure.axes[0].legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=120)


def print_table(result: dict[str, Any]) -> None:
    """The comparison, on stdout."""
    start, rows = result["models"]["start"], []
    for name in ("start", "sft", "dpo", "perpo"):
        row = result["models"][name]
        keys = [f"{how}_{key}" for how in ("sampled", "greedy") for key in ("mean_iou", "acc@0.5")]
        change = [f"{row[k]:.3f}" if name == "start" else f"{row[k]:.3f} {row[k] - start[k]:+.3f}" for k in keys]
        rows.append((METHODS.get(name, "start"), *change))
    print_rows(
        f"{result['held_out']} held-out scenes; {result['lists']} lists, {result['steps']} steps each",
        ("model", "mean IoU", "Acc@0.5", "greedy mean IoU", "greedy Acc@0.5"),
        rows,
    )
    print_evidence(result["unseen"], "scenes")
    print(f"{result['seconds']:.0f} s; lists, curves and figures in {result['out']}")
