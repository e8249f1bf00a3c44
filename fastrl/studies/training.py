"""What the studies' jobs share: recipes that keep no weights, ranked lists made once, answers scored one by one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.build.perpo import build_lists, make_options
from fastrl.data import load_data
from fastrl.evaluate.run import sample_records
from fastrl.recipe import Recipe, build_recipe, load_recipe
from fastrl.rewards.counting import point_distances
from fastrl.run.setup import load_model
from fastrl.studies.base import CHOOSING, REPORTED, Job, Measured
from fastrl.toy.demos.evidence import per_record
from fastrl.toy.demos.scenes import HELD_OUT_SEED, REPORTED_SEED, scenes_like
from fastrl.trainer import train

if TYPE_CHECKING:
    from fastrl.data.records import Record
    from fastrl.models.load import Policy

LISTS = "lists.jsonl"
Score = Callable[[Sequence[str], Sequence["Record"]], Sequence[float]]  # answers, their records -> one number each


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A recipe with other values, by dotted path. Raises ``RecipeError``."""
    values = recipe.model_dump(mode="json")
    for path, value in changes.items():
        section = values
        *parents, key = path.split(".")
        for parent in parents:
            section = section[parent]
        section[key] = value
    return build_recipe(values, source=recipe.name)


def train_job(recipe: Recipe, job: Job, records: Sequence[Record] | None = None) -> Policy:
    """Train a job's arm in its folder, without keeping weights, and return the model.

    ``records``: the data, instead of the recipe's. Raises ``KeyboardInterrupt`` if training was told to stop, which
    ends it early without an error.
    """
    given = {"optim.lr": job.rate, "method.beta": job.beta}
    settings = {path: value for path, value in given.items() if value is not None}
    kept = {"checkpoint.every": 0, "checkpoint.final": False, "log.samples_every": 0, "log.to": [], "log.every": 20}
    run = changed(recipe, {"out": str(job.folder / "run"), "seed": job.seed, **settings, **kept})
    policy = load_model(run)
    if train(run, policy=policy, records=records).interrupted:
        raise KeyboardInterrupt
    return policy


def teach(
    path: str, lessons: Sequence[Record], folder: Path, *, steps: int, per_step: int, rate: float, seed: int
) -> None:
    """Supervised fine-tuning of the model ``path`` on the last answer of dialogues; the model's folder is ``folder``.

    All of the model is trained. Raises ``KeyboardInterrupt`` if training was told to stop; nothing is kept then.
    """
    run = folder.with_name(f"{folder.name}-run")
    shutil.rmtree(run, ignore_errors=True)
    plain = {"method.sigma": "one", "method.alpha": 0.0, "method.turns": "last", "model.lora": None, "model.freeze": []}
    sizes = {"optim.steps": steps, "optim.lr": rate, "data.prompts_per_step": per_step, "optim.token_budget": 16384}
    kept = {"checkpoint.every": 0, "log.samples_every": 0, "log.to": [], "log.every": 20, "seed": seed}
    recipe = load_recipe("reper-caption-tiny", {**plain, **sizes, **kept, "model.path": path, "out": str(run)})
    found = train(recipe, records=lessons)
    if found.interrupted or found.model is None:
        raise KeyboardInterrupt
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(str(found.model), folder)
    shutil.rmtree(run)


def scene_sets(spec: str, n: int) -> dict[str, Sequence[Record]]:
    """Both sets of ``n`` scenes like those of ``spec``, by name."""
    seeds = {CHOOSING: HELD_OUT_SEED, REPORTED: REPORTED_SEED}
    return {name: load_data(scenes_like(spec, n=n, seed=seed)) for name, seed in seeds.items()}


def make_lists(
    recipe: Recipe, spec: str, task: str, shared: Path, *, n: int, min_gap: float, seed: int, limit: int | None = None
) -> Path:
    """The list file of a seed: ``n`` answers of the recipe's model to each of the (first ``limit``) prompts of
    ``spec``; an interrupted build continues. Raises ``ValueError`` if no list is kept.
    """
    shared.mkdir(parents=True, exist_ok=True)
    sampled = {"max_new_tokens": recipe.rollout.max_new_tokens, "temperature": recipe.rollout.temperature}
    pixels = {"min_pixels": recipe.model.min_pixels, "max_pixels": recipe.model.max_pixels}
    kept = {"skip_bad": recipe.data.skip_bad, "unreadable": recipe.method.unreadable}  # type: ignore[attr-defined]
    given = {"n": n, "min_gap": min_gap, "seed": seed, "limit": limit, **sampled, **pixels, **kept}
    found = build_lists(make_options(task, recipe.model.path, spec, **given), shared / LISTS)
    if not found["kept"]:
        raise ValueError(f"{spec}: none of {found['prompts']} lists has rewards that differ by {min_gap:g} or at all")
    return shared / LISTS


def distance(answers: Sequence[str], records: Sequence[Record]) -> list[float]:
    """How far each answer's matched points are off (:func:`point_distances`); 1, a diagonal, for one without points.

    Every record needs a score here: pairs of scores are compared."""
    return [1.0 if value is None else value for value in point_distances(answers, records)]


def measure(
    policy: Policy,
    records: Sequence[Record],
    length: int,
    scores: Mapping[str, Score],
    samples: int = 2,
    whole: Callable[[Sequence[str], Sequence[Record]], Mapping[str, float]] = lambda answers, records: {},
) -> Measured:
    """Scores of ``samples`` answers per record at temperature 1 (``sampled``; a fixed seed) and of the greedy one.

    Args:
        policy: the model.
        records: of one set.
        length: of the longest answer, in tokens.
        scores: suffix of a measure's name (empty for the main one) → how an answer is scored.
        samples: answers whose mean is a record's sampled score; 0: greedy answers only.
        whole: measures of all greedy answers together.
    """
    from fastrl.rollout import Sampling

    each: dict[str, Sequence[float]] = {}
    numbers: Mapping[str, float] = {}
    for name, n in (("sampled", samples), ("greedy", 1)):
        if n:
            sampling = Sampling(n=n, max_new_tokens=length, temperature=1.0 if name == "sampled" else 0.0)
            answered = list(sample_records(policy, records, sampling, seed=0, portion=128))
            texts = [completion.text for _, completions in answered for completion in completions]
            asked = [record for record, completions in answered for _ in completions]
            each |= {name + suffix: per_record(score(texts, asked), n) for suffix, score in scores.items()}
            numbers = whole(texts, asked) if name == "greedy" else numbers
    return Measured([record.id for record in records], each, numbers)
