"""Does thinking before the answer help perception (Perception-R1 §4, "with thinking")? Accuracy and length.

Two models are taught the same scenes by supervised fine-tuning: one answers at once, the other writes a thought (what
is in the picture) between ``<think>`` tags and then the same answer between ``<answer>`` tags. Both are then trained by
GRPO with the format reward of their form. Prompt and form are recipe keys: ``data.suffix`` and
``reward.options.format``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.answers import View, format_answer
from fastrl.data.prompts import suffixed
from fastrl.data.records import Dataset, Record
from fastrl.data.reflection import SpokenTurn
from fastrl.data.scenes import tasks
from fastrl.data.scenes.world import sample_scene
from fastrl.recipe import load_recipe
from fastrl.rewards import reward_for
from fastrl.rewards.counting import exact_counts
from fastrl.run.setup import load_model
from fastrl.studies.base import CHOOSING, REPORTED, About, Arm, Job, Measured, Say, Study
from fastrl.studies.training import changed, distance, measure, teach, train_job
from fastrl.toy.demos.evidence import Compared, change
from fastrl.toy.demos.scenes import HELD_OUT_SEED, REPORTED_SEED

if TYPE_CHECKING:
    from fastrl.models.families import Family
    from fastrl.models.load import Policy

RECIPE = "perception-r1-counting-tiny"
SUFFIX = "Think first."  # short: the small tokenizer spells unknown words letter by letter
DIFFICULTY, SIDE, LONGEST = 2, 84, 160
TAUGHT, QUICK_TAUGHT, PER_STEP, TEACHING_RATE = 640, 240, 16, 1e-3
STEPS, QUICK_STEPS, PROMPTS, QUICK_PROMPTS, GROUP = 48, 12, 32, 12, 8
HELD_OUT, QUICK_HELD_OUT = 384, 160
RATES = (1.5e-4, 3e-4, 6e-4)
FORMS = {"plain": "at once", "thinking": "after a thought"}


class Experiment(Study):
    """Counting at once and after a thought, taught alike, before and after GRPO."""

    about = About(
        name="thinking",
        question="does a thought before the answer help perception?",
        paper="Perception-R1 (arXiv:2504.07954), Table 5 (with and without thinking)",
        design="one model is taught to answer at once, one to describe the picture first, on the same scenes; then "
        "GRPO for counting with the format reward of each; exact counts, how far points are off, and tokens",
        expected="thinking level or worse, and longer",
        minutes=20,
        quick_minutes=5,
    )
    measures = {  # noqa: RUF012
        "sampled": "points, sampled",
        "greedy": "points, greedy",
        "sampled exact": "exact count, sampled",
        "greedy exact": "exact count, greedy",
        "sampled distance": "distance of points, sampled",
        "greedy distance": "distance of points, greedy",
        "sampled format": "format, sampled",
        "greedy format": "format, greedy",
        "sampled tokens": "tokens, sampled",
        "greedy tokens": "tokens, greedy",
    }
    margins = {"sampled tokens": 1.0, "greedy tokens": 1.0, "sampled distance": 0.01, "greedy distance": 0.01}  # noqa: RUF012
    rates = RATES

    def __init__(self, *, quick: bool = False, say: Say = lambda text: None) -> None:
        super().__init__(quick=quick, say=say)
        self.taught = QUICK_TAUGHT if quick else TAUGHT
        steps, prompts = (QUICK_STEPS, QUICK_PROMPTS) if quick else (STEPS, PROMPTS)
        sizes = {"optim.steps": steps, "data.prompts_per_step": prompts, "rollout.group_size": GROUP}
        self.recipe = load_recipe(RECIPE, {**sizes, "rollout.max_new_tokens": LONGEST})
        self.held_out = QUICK_HELD_OUT if quick else HELD_OUT

    def arms(self) -> Sequence[Arm]:
        trained = [Arm(arm_name(form, True), arm_name(form, True), {"form": form, "grpo": True}) for form in FORMS]
        # What was taught is measured once for each seed; no rate is chosen for it
        taught = [Arm(arm_name(form, False), arm_name(form, True), {"form": form, "grpo": False}) for form in FORMS]
        return [*trained, *taught]

    def comparisons(self) -> Sequence[Compared]:
        found = []
        for name, title in self.measures.items():
            for grpo in (False, True):
                plain, thinking = (arm_name(form, grpo) for form in FORMS)
                found.append(change(f"{thinking} − {plain}: {title}", name, plain, thinking))
        for name in ("sampled", "greedy exact", "greedy distance"):
            for form in FORMS:
                taught, trained = arm_name(form, False), arm_name(form, True)
                found.append(change(f"{trained} − taught: {self.measures[name]}", name, taught, trained))
        return found

    def claims(self) -> Mapping[str, str]:
        plain, thinking = (arm_name(form, True) for form in FORMS)
        less = f"{thinking} − {plain}"
        better = {f"{less}: {self.measures[f'{how} exact']}": "does not rise" for how in ("sampled", "greedy")}
        closer = {f"{less}: {self.measures[f'{how} distance']}": "does not fall" for how in ("sampled", "greedy")}
        return {**better, **closer, f"{less}: {self.measures['greedy tokens']}": "rises"}

    def settings(self) -> Mapping[str, Any]:
        recipe = self.recipe
        sizes = {"taught": self.taught * PER_STEP, "steps": recipe.optim.steps, "held_out": self.held_out}
        return {**sizes, "prompts_per_step": recipe.data.prompts_per_step, "rates": RATES}

    def begin(self) -> None:
        seeds = {CHOOSING: HELD_OUT_SEED, REPORTED: REPORTED_SEED}
        self.family = load_model(self.recipe).family
        self.sets = {name: {form: asked(scenes(self.held_out, s), form) for form in FORMS} for name, s in seeds.items()}

    def prepare(self, seed: int, shared: Path) -> None:
        for form in FORMS:
            if (shared / form / "config.json").is_file():
                continue
            self.say(f"teaching {self.taught} steps of {PER_STEP} scenes to answer {FORMS[form]} …")
            drawn = scenes(self.taught * PER_STEP, 2 * seed + 1)
            lessons = asked([lesson(self.family, scene, form) for scene in drawn], form)
            sizes = {"steps": self.taught, "per_step": PER_STEP, "rate": TEACHING_RATE, "seed": seed}
            teach(self.recipe.model.path, lessons, shared / form, **sizes)

    def run(self, job: Job) -> Mapping[str, Measured]:
        form = job.arm.options["form"]
        recipe = changed(self.recipe, {"model.path": str(job.shared / form), "data.seed": job.seed})
        if job.arm.options["grpo"]:
            checked = {**recipe.reward.options, "format": "thinking" if form == "thinking" else "strict"}
            count = recipe.optim.steps * recipe.data.prompts_per_step
            records = asked(scenes(count, 2 * job.seed + 2), form)
            policy = train_job(changed(recipe, {"reward.options": checked}), job, records)
        else:
            policy = load_model(recipe)
        return {name: self._measured(policy, self.sets[name][form], form) for name in job.sets}

    def _measured(self, policy: Policy, records: Sequence[Record], form: str) -> Measured:
        points = reward_for("counting", format="thinking" if form == "thinking" else "strict")

        def tokens(answers: Sequence[str], records: Sequence[Record]) -> Sequence[float]:
            return [float(len(policy.tokenizer(answer, add_special_tokens=False)["input_ids"])) for answer in answers]

        scores = {
            "": lambda answers, asked: points.score(answers, asked)["points"],
            " exact": exact_counts,
            " distance": distance,
            " format": lambda answers, asked: points.score(answers, asked)["format"],
            " tokens": tokens,
        }
        return measure(policy, records, LONGEST, scores, samples=1)


def scenes(count: int, seed: int) -> list[Record]:
    """``count`` counting records whose target also has ``thought``, a description of the scene."""
    found: list[Record] = []
    number = 0
    while len(found) < count:
        rng = random.Random(f"thinking/{seed}/{number}")
        scene = sample_scene(rng, DIFFICULTY, SIDE)
        record = tasks.counting_record(rng, scene, f"thinking-{seed}-{number}", DIFFICULTY)
        number += 1
        if record is not None:
            shapes = sorted(scene.shapes, key=lambda s: (s.box[0], s.box[1]))
            thought = " ".join(f"A {shape.size} {shape.name}." for shape in shapes)
            found.append(replace(record, target={**record.target, "thought": thought}))
    return found


def asked(records: Sequence[Record], form: str) -> Sequence[Record]:
    """The records with the question of a form."""
    return suffixed(Dataset(list(records)), SUFFIX if form == "thinking" else None, "thinking")


def lesson(family: Family, record: Record, form: str) -> Record:
    """A record with its right answer as a dialogue of one turn."""
    width, height = record.images[0].size  # type: ignore[union-attr]
    answer = format_answer("counting", record.target, family.style, View.unresized(width, height), labels=False)
    if form == "thinking":
        answer = f"<think>{record.target['thought']}</think><answer>{answer}</answer>"
    return replace(record, target={**record.target, "dialogue": (SpokenTurn(answer, 1.0),)})


def arm_name(form: str, grpo: bool) -> str:
    """``after a thought, GRPO``."""
    return f"{FORMS[form]}, {'GRPO' if grpo else 'taught'}"
