"""Does reinforcement learning help where a truth has many right orders (Perception-R1 §4, perceptual perplexity)?

A list of n objects can be written in n! orders. Supervised fine-tuning on the truth is told one of them, GRPO is paid
for any. Both are trained on the same scenes with 1, 3 and 6 objects, and measured on scenes of each kind. Scenes of all
kinds are drawn with six objects or more and shown with the first of them, so that sizes, kinds and places are the same
for every number; what still differs is how crowded a picture is. Grounding is the control for that: one expression has
one box, however many objects are in the picture, so that no gap should grow. A *record* of this study is one scene with
1, 3 and 6 of its objects, of each task, so that gaps can be compared with each other.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, cycle, islice
from typing import TYPE_CHECKING, Any

from fastrl.data.scenes import tasks
from fastrl.data.scenes.world import Scene, sample_scene
from fastrl.recipe import load_recipe
from fastrl.run.setup import load_model
from fastrl.studies.base import CHOOSING, REPORTED, About, Arm, Job, Measured, Say, Study
from fastrl.studies.preference import overlap
from fastrl.studies.rewards import ap_of_each, f1
from fastrl.studies.training import changed, measure, train_job
from fastrl.toy.demos.evidence import Compared, change
from fastrl.toy.demos.scenes import HELD_OUT_SEED, REPORTED_SEED

if TYPE_CHECKING:
    from fastrl.data.records import Record

OBJECTS = (1, 3, 6)
DIFFICULTY = 4  # of all scenes, which have 4 to 7 objects
ARMS = {"SFT": "SFT, one order", "shuffled": "SFT, random orders", "GRPO": "GRPO"}
GROUNDING = {"grounding SFT": "grounding, SFT", "grounding GRPO": "grounding, GRPO"}
STARTS = {"detection": "start", "grounding": "grounding, start"}
GROUNDING_SPEC = "scenes:grounding?n=8192"  # names the task; the scenes are made here
SIDE = 84  # of the pictures, in pixels
DRAWN = 60  # scenes drawn, at most, for one that has six objects, each of which can be asked for
HELD_OUT, QUICK_HELD_OUT = 256, 96
STEPS, PER_STEP, QUICK_STEPS, QUICK_PER_STEP = 48, 24, 24, 12
FACTORS = (0.5, 1.0, 2.0)  # of each recipe's own learning rate: the two train different parts of the model


class Experiment(Study):
    """SFT on the truth against GRPO on scenes with 1, 3 and 6 objects, in detection and in grounding."""

    about = About(
        name="complexity",
        question="does reinforcement learning gain more on supervised fine-tuning the more orders a truth has?",
        paper="Perception-R1 (arXiv:2504.07954), Table 5 (SFT, RL) and Table 9 (perceptual perplexity)",
        design="scenes with 1, 3 or 6 of their objects; detection: SFT on the truth, from left to right or in random "
        "orders, against GRPO on the same scenes for as many steps; grounding, whose truth has one order: SFT on the "
        "truth against GRPO; rates are factors of each recipe's own",
        expected="in detection GRPO − SFT grows with the number of objects, in grounding it does not",
        minutes=10,
        quick_minutes=4,
    )
    measures = {  # noqa: RUF012
        "mean": "F1 or IoU, mean",
        **{f"f1 {n}": f"F1, {n}" for n in OBJECTS},
        **{f"ap {n}": f"AP of a picture, {n}" for n in OBJECTS},
        **{f"iou {n}": f"IoU, {n}" for n in OBJECTS},
    }
    rates = FACTORS

    def __init__(self, *, quick: bool = False, say: Say = lambda text: None) -> None:
        super().__init__(quick=quick, say=say)
        steps, per_step = (QUICK_STEPS, QUICK_PER_STEP) if quick else (STEPS, PER_STEP)
        small = {"optim.steps": steps, "data.prompts_per_step": per_step}
        self.held_out = QUICK_HELD_OUT if quick else HELD_OUT
        self.recipes = {
            "SFT": load_recipe("sft-detection-tiny", {**small, "method.order": "truth"}),
            "shuffled": load_recipe("sft-detection-tiny", {**small, "method.order": "random"}),
            "GRPO": load_recipe("perception-r1-detection-tiny", small),
            "grounding SFT": load_recipe("sft-detection-tiny", {**small, "data.spec": GROUNDING_SPEC}),
            "grounding GRPO": load_recipe("perception-r1-grounding-tiny", small),
        }
        self.trained: dict[tuple[str, int], Sequence[Record]] = {}

    def arms(self) -> Sequence[Arm]:
        starts = [Arm(name, "", {"task": task}) for task, name in STARTS.items()]
        named = [(key, title, "detection") for key, title in ARMS.items()]
        named += [(key, title, "grounding") for key, title in GROUNDING.items()]
        return [*starts, *(Arm(title, key, {"recipe": key, "task": task}) for key, title, task in named)]

    def differences(self) -> Mapping[str, tuple[str, str]]:
        gaps = {f"GRPO − {ARMS[key]}": (ARMS["GRPO"], ARMS[key]) for key in ("SFT", "shuffled")}
        return {**gaps, "grounding, GRPO − SFT": (GROUNDING["grounding GRPO"], GROUNDING["grounding SFT"])}

    def comparisons(self) -> Sequence[Compared]:
        found = []
        for kind, end in (("f1", ""), ("ap", ", AP"), ("iou", ", IoU")):
            task = "grounding" if kind == "iou" else "detection"
            for gap, (grpo, sft) in self.differences().items():
                if gap.startswith("grounding") == (task == "grounding"):
                    found += [change(f"{gap}, {n}{end}", f"{kind} {n}", sft, grpo) for n in OBJECTS]
                    found += [Compared(f"{gap}: 6 − 1{end}", (gap, f"{kind} 1"), (gap, f"{kind} 6"))]
            arm = GROUNDING["grounding GRPO"] if task == "grounding" else ARMS["GRPO"]
            found += [change(f"{arm}, {n}{end}", f"{kind} {n}", STARTS[task], arm) for n in OBJECTS]
        return found

    def claims(self) -> Mapping[str, str]:
        grows = {f"GRPO − {ARMS[key]}: 6 − 1": "rises" for key in ("SFT", "shuffled")}
        return {**grows, "grounding, GRPO − SFT: 6 − 1, IoU": "does not rise"}

    def settings(self) -> Mapping[str, Any]:
        recipe = self.recipes["GRPO"]
        sizes = {"steps": recipe.optim.steps, "prompts_per_step": recipe.data.prompts_per_step}
        return {**sizes, "tasks": list(STARTS), "held_out": self.held_out, "rates": FACTORS}

    def begin(self) -> None:
        seeds = {CHOOSING: HELD_OUT_SEED, REPORTED: REPORTED_SEED}
        self.sets = {
            name: {task: by_number(islice(bundles(task, seed), self.held_out)) for task in STARTS}
            for name, seed in seeds.items()
        }
        self.start = load_model(self.recipes["GRPO"])

    def run(self, job: Job) -> Mapping[str, Measured]:
        policy, task = self.start, job.arm.options["task"]
        if job.arm.group:
            recipe = self.recipes[job.arm.options["recipe"]]
            rate = recipe.optim.lr if job.rate is None else recipe.optim.lr * job.rate
            records = self._training(task, job.seed)
            policy = train_job(changed(recipe, {"optim.lr": rate}), job._replace(rate=None), records)
        return {name: self._measure(policy, task, self.sets[name][task]) for name in job.sets}

    def _training(self, task: str, seed: int) -> Sequence[Record]:
        """As many scenes as the steps take, each with another number of objects than the one before; the same for
        every arm of a task."""
        if (task, seed) not in self.trained:
            recipe = self.recipes["GRPO"]
            needed = range(recipe.optim.steps * recipe.data.prompts_per_step)
            turns = zip(needed, bundles(task, seed + 1), cycle(OBJECTS), strict=False)
            self.trained[task, seed] = [bundle[n] for _, bundle, n in turns]
        return self.trained[task, seed]

    def _measure(self, policy: Any, task: str, sets: Mapping[int, Sequence[Record]]) -> Measured:
        length = self.recipes["GRPO" if task == "detection" else "grounding GRPO"].rollout.max_new_tokens
        measured = {"f1": f1, "ap": ap_of_each} if task == "detection" else {"iou": overlap}
        scores: dict[str, Sequence[float]] = {}
        for n, records in sets.items():
            found = measure(policy, records, length, {f" {key}": each for key, each in measured.items()}, samples=0)
            scores |= {f"{key} {n}": found.scores[f"greedy {key}"] for key in measured}
        main = next(iter(measured))
        of_scenes = zip(*(scores[f"{main} {n}"] for n in OBJECTS), strict=True)
        mean = {"mean": [sum(values) / len(values) for values in of_scenes]}
        # The scenes of both tasks are compared by their number
        return Measured([f"scene {i}" for i in range(len(mean["mean"]))], {**mean, **scores})


def bundles(task: str, seed: int) -> Iterator[Mapping[int, Record]]:
    """Number of objects → a record of a task: one scene after the other, each with 1, 3 and 6 of its objects.

    Scenes of which one of the records cannot be made (too few objects; no expression that fits one object alone) are
    left out. Raises ``ValueError`` if that is so of ``DRAWN`` scenes in a row.
    """
    left_out, most = 0, max(OBJECTS)
    for number in count():
        scene = sample_scene(random.Random(f"complexity/{seed}/{number}"), DIFFICULTY, SIDE)
        found = {n: _record(task, scene, n, f"{seed}-{number}") for n in OBJECTS if len(scene.shapes) >= most}
        made = {n: record for n, record in found.items() if record is not None}
        if len(made) == len(OBJECTS):
            left_out = 0
            yield made
        else:
            left_out += 1
            if left_out == DRAWN:
                raise ValueError(f"{task}: none of {DRAWN} scenes in a row can be shown with {most} objects")


def _record(task: str, scene: Scene, objects: int, number: str) -> Record | None:
    """The record of a scene's first ``objects`` shapes."""
    rng = random.Random(f"complexity/{task}/{number}/{objects}")
    make = tasks.detection_record if task == "detection" else tasks.grounding_record
    return make(rng, replace(scene, shapes=scene.shapes[:objects]), f"{task}-{number}-{objects}", DIFFICULTY)


def by_number(found: Iterable[Mapping[int, Record]]) -> dict[int, list[Record]]:
    """Number of objects → the records of all scenes with as many."""
    kept = list(found)
    return {n: [each[n] for each in kept] for n in OBJECTS}
