"""Are more answers per prompt better (Perception-R1 §4, rollout scaling)? Groups of 4, 8 and 16.

More answers per prompt are more work. The sizes are therefore compared twice: with equal prompts in a step, where
larger groups sample more, and with equal answers in a step, where larger groups see fewer prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastrl.recipe import load_recipe
from fastrl.rewards import reward_for
from fastrl.rewards.counting import exact_counts
from fastrl.run.setup import load_model
from fastrl.studies.base import About, Arm, Job, Line, Measured, Plot, Say, Study
from fastrl.studies.training import Score, changed, distance, measure, scene_sets, train_job
from fastrl.toy.demos.evidence import Compared, change

TASKS = ("grounding", "counting")
PAID = {"grounding": "iou", "counting": "points"}  # part of the reward, by which rates are chosen
COUNTED = {"exact": "exact count", "distance": "distance of points"}  # counting's own measures
SIZES, MIDDLE = (4, 8, 16), 8
PROMPTS, QUICK_PROMPTS = 32, 16  # in a step, of groups of MIDDLE answers
STEPS, QUICK_STEPS = 48, 16
HOW = {"sampled": "", "greedy": ", greedy"}
MEASURED = {  # task -> measure -> end of a comparison's name
    "grounding": HOW,
    "counting": {f"{how} {key}": f", {title}{end}" for key, title in COUNTED.items() for how, end in HOW.items()},
}
HELD_OUT, QUICK_HELD_OUT = 512, 192
RATES = (1.5e-4, 3e-4, 6e-4)
EQUAL = {"prompts": "equal prompts", "answers": "equal answers"}


class Experiment(Study):
    """GRPO with groups of 4, 8 and 16 at equal prompts, and at equal answers."""

    about = About(
        name="rollouts",
        question="are more answers per prompt better?",
        paper="Perception-R1 (arXiv:2504.07954), rollout scaling (figure)",
        design="GRPO for grounding and counting with groups of 4, 8 and 16 answers; at equal prompts in a step, and at "
        "equal answers in a step (equal work of sampling); equal steps and one learning rate for all sizes of a task",
        expected="better with more answers, at equal prompts",
        minutes=15,
        quick_minutes=5,
    )
    measures = {  # noqa: RUF012
        "sampled": "IoU or matched points, sampled",
        "greedy": "greedy",
        **{f"{how} {key}": f"{title}, {how}" for key, title in COUNTED.items() for how in ("sampled", "greedy")},
    }
    rates = RATES

    def __init__(self, *, quick: bool = False, say: Say = lambda text: None) -> None:
        super().__init__(quick=quick, say=say)
        self.steps = QUICK_STEPS if quick else STEPS
        self.prompts = QUICK_PROMPTS if quick else PROMPTS
        self.held_out = QUICK_HELD_OUT if quick else HELD_OUT

    def arms(self) -> Sequence[Arm]:
        found = []
        for task in TASKS:
            quick = task == TASKS[0]
            found.append(Arm(f"{task}, start", "", {"task": task}, quick))
            middle = {"task": task, "size": MIDDLE, "prompts": self.prompts}
            found.append(Arm(f"{task}, {MIDDLE}", task, middle, quick))
            for equal in EQUAL:
                for size in SIZES:
                    if size != MIDDLE:
                        prompts = self.prompts if equal == "prompts" else self.prompts * MIDDLE // size
                        options = {"task": task, "size": size, "prompts": prompts}
                        found.append(Arm(arm_name(task, size, equal), task, options, quick))
        return found

    def comparisons(self) -> Sequence[Compared]:
        found = []
        for task in TASKS:
            for key, end in MEASURED[task].items():
                middle, start = f"{task}, {MIDDLE}", f"{task}, start"
                found.append(change(f"{middle} − start{end}", key, start, middle))
                for equal, title in EQUAL.items():
                    few, many = arm_name(task, SIZES[0], equal), arm_name(task, SIZES[-1], equal)
                    found += [
                        change(f"{task}, {title}: {MIDDLE} − {SIZES[0]}{end}", key, few, middle),
                        change(f"{task}, {title}: {SIZES[-1]} − {MIDDLE}{end}", key, middle, many),
                        change(f"{task}, {title}: {SIZES[-1]} − {SIZES[0]}{end}", key, few, many),
                    ]
        return found

    def plots(self) -> Sequence[Plot]:
        return [
            Plot(
                f"{task}: reward, sampled",
                "answers per prompt",
                "sampled",
                [Line(title, [(float(n), arm_name(task, n, equal)) for n in SIZES]) for equal, title in EQUAL.items()],
            )
            for task in TASKS
        ]

    def claims(self) -> Mapping[str, str]:
        few, many = SIZES[0], SIZES[-1]
        pairs = ((MIDDLE, few), (many, MIDDLE), (many, few))
        ends = {("grounding", ""): "rises", ("counting", ", exact count"): "rises"}
        ends[("counting", ", distance of points")] = "falls"
        return {f"{t}, {EQUAL['prompts']}: {b} − {a}{end}": way for (t, end), way in ends.items() for b, a in pairs}

    def settings(self) -> Mapping[str, Any]:
        sizes = {"steps": self.steps, "prompts_per_step": self.prompts, "held_out": self.held_out}
        return {**sizes, "sizes": SIZES, "rates": RATES}

    def begin(self) -> None:
        self.recipes = {task: load_recipe(f"perception-r1-{task}-tiny", {"optim.steps": self.steps}) for task in TASKS}
        self.sets = {task: scene_sets(recipe.data.spec, self.held_out) for task, recipe in self.recipes.items()}

    def run(self, job: Job) -> Mapping[str, Measured]:
        task = job.arm.options["task"]
        recipe, part = self.recipes[task], PAID[task]
        if job.arm.group:
            sizes = {"rollout.group_size": job.arm.options["size"], "data.prompts_per_step": job.arm.options["prompts"]}
            policy = train_job(changed(recipe, {**sizes, "data.seed": job.seed}), job)
        else:
            policy = load_model(recipe)
        reward, length = reward_for(task), recipe.rollout.max_new_tokens
        scores: dict[str, Score] = {"": lambda answers, records: reward.score(answers, records)[part]}
        scores |= {" exact": exact_counts, " distance": distance} if task == "counting" else {}
        found = {name: measure(policy, self.sets[task][name], length, scores) for name in job.sets}
        # All arms are compared on records of the same names; the tasks' scenes are not the same
        return {n: m._replace(ids=[f"scene {i}" for i in range(len(m.ids))]) for n, m in found.items()}


def arm_name(task: str, size: int, equal: str) -> str:
    """``grounding, 4, equal prompts``; the middle size is the same arm in both comparisons."""
    return f"{task}, {size}" if size == MIDDLE else f"{task}, {size}, {EQUAL[equal]}"
