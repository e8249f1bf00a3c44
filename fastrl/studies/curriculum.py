"""From easy to hard with growing groups (Perception-R1 §3.4): order by the initial model's own rewards.

The initial model answers every scene a few times (``fastrl score``); a scene's difficulty is 1 less its mean F1.
The paper splits its data by such a score and replaces easy data by harder data while the answers per prompt grow. Here
no data is replaced: all scenes are ordered, and training draws from the easiest part of them, which grows to all. Order
and groups are changed one at a time and together. Every arm samples as many answers and draws as many prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastrl.build.score import ScoreOptions, score_data
from fastrl.data import load_data
from fastrl.recipe import load_recipe
from fastrl.run.setup import load_model
from fastrl.studies.base import About, Arm, Job, Measured, Say, Study
from fastrl.studies.rewards import ap_of_all, ap_of_each, f1
from fastrl.studies.training import changed, measure, scene_sets, train_job
from fastrl.toy.demos.evidence import Compared, change
from fastrl.toy.demos.scenes import scenes_like

RECIPE = "perception-r1-detection-tiny"
LEVELS = (1, 2, 3, 4)  # difficulties of the scenes, as many of each
SCENES, QUICK_SCENES, ANSWERS, COMPONENT = 2048, 384, 4, "f1"
STEPS, QUICK_STEPS, PROMPTS, QUICK_PROMPTS = 60, 18, 24, 12
GROUPS = (4, 8, 12)  # answers per prompt in thirds of the steps; their mean is that of the other arms
START = 0.25
HELD_OUT, QUICK_HELD_OUT = 384, 160
RATES = (1.5e-2, 3e-2, 6e-2)
ARMS = {  # name -> from easy to hard, growing groups
    "shuffled": (False, False),
    "easy to hard": (True, False),
    "growing groups": (False, True),
    "easy to hard, growing groups": (True, True),
}


class Experiment(Study):
    """GRPO on shuffled scenes and from easy to hard, with equal and with growing groups."""

    about = About(
        name="curriculum",
        question="does training from easy to hard with growing groups help?",
        paper="Perception-R1 (arXiv:2504.07954), §3.4 (detection, easy data replaced by harder; no number of its own)",
        design="GRPO on detection scenes of all difficulties, ranked by the initial model's F1; shuffled or from an "
        "easiest part that grows to all (nothing is replaced), 8 answers per prompt or 4, 8, 12 in thirds of the "
        "steps; equal prompts and answers for every arm",
        expected="easy to hard with growing groups above shuffled",
        minutes=10,
        quick_minutes=5,
    )
    measures = {  # noqa: RUF012
        "greedy": "F1, greedy",
        "sampled": "F1, sampled",
        "greedy_ap": "AP of a picture, greedy",
        "sampled_ap": "AP of a picture, sampled",
        "AP": "AP of all, greedy",
    }
    rates = RATES

    def __init__(self, *, quick: bool = False, say: Say = lambda text: None) -> None:
        super().__init__(quick=quick, say=say)
        steps, prompts = (QUICK_STEPS, QUICK_PROMPTS) if quick else (STEPS, PROMPTS)
        self.recipe = load_recipe(RECIPE, {"optim.steps": steps, "data.prompts_per_step": prompts})
        self.scenes = QUICK_SCENES if quick else SCENES
        self.held_out = QUICK_HELD_OUT if quick else HELD_OUT

    def arms(self) -> Sequence[Arm]:
        return [Arm("start"), *(Arm(name, "GRPO", {"ordered": a, "growing": b}) for name, (a, b) in ARMS.items())]

    def comparisons(self) -> Sequence[Compared]:
        shuffled, *others = ARMS
        return [
            change(f"{after} − {before}{end}", how, before, after)
            for how, end in (("greedy", ""), ("sampled", ", sampled"), ("greedy_ap", ", AP"))
            for before, after in [("start", shuffled), *((shuffled, other) for other in others)]
        ]

    def claims(self) -> Mapping[str, str]:
        shuffled, *others = ARMS
        return {f"{other} − {shuffled}": "rises" for other in (others[0], others[-1])}

    def settings(self) -> Mapping[str, Any]:
        recipe = self.recipe
        sizes = {"steps": recipe.optim.steps, "prompts_per_step": recipe.data.prompts_per_step, "scenes": self.scenes}
        return {**sizes, "groups": GROUPS, "held_out": self.held_out, "rates": RATES}

    def begin(self) -> None:
        each = {level: scene_sets(at_level(self.recipe.data.spec, level), self.held_out) for level in LEVELS}
        self.sets = {
            name: [
                replace(record, id=f"{record.id}-{level}")
                for level in LEVELS
                for record in each[level][name][:: len(LEVELS)]
                if record.target["boxes"]
            ]
            for name in each[LEVELS[0]]
        }
        self.start = load_model(self.recipe)

    def prepare(self, seed: int, shared: Path) -> None:
        for level in LEVELS:
            spec = self._spec(level, seed)
            options = ScoreOptions(
                self.recipe.model.path,
                spec,
                n=ANSWERS,
                max_new_tokens=self.recipe.rollout.max_new_tokens,
                component=COMPONENT,
                seed=seed,
            )
            score_data(options, shared / f"scores-{level}.jsonl", policy=self.start)
        lines = [(shared / f"scores-{level}.jsonl").read_text(encoding="utf-8") for level in LEVELS]
        (shared / "scores.jsonl").write_text("".join(lines), encoding="utf-8")

    def run(self, job: Job) -> Mapping[str, Measured]:
        policy = self.start
        if job.arm.group:
            steps = self.recipe.optim.steps
            changes: dict[str, Any] = {"data.seed": job.seed, "rollout.group_size": GROUPS[len(GROUPS) // 2]}
            if job.arm.options["growing"]:
                changes["rollout.group_schedule"] = {i * steps // len(GROUPS): n for i, n in enumerate(GROUPS)}
            if job.arm.options["ordered"]:
                scores = str(job.shared / "scores.jsonl")
                changes["data.curriculum"] = {"by": "difficulty", "steps": steps, "start": START, "scores": scores}
            records = [record for level in LEVELS for record in load_data(self._spec(level, job.seed))]
            policy = train_job(changed(self.recipe, changes), job, records)
        length, scores = self.recipe.rollout.max_new_tokens, {"": f1, "_ap": ap_of_each}
        return {name: measure(policy, self.sets[name], length, scores, samples=1, whole=ap_of_all) for name in job.sets}

    def _spec(self, level: int, seed: int) -> str:
        """The scenes of a level and seed, a part of all scenes."""
        spec = scenes_like(self.recipe.data.spec, n=self.scenes // len(LEVELS), seed=len(LEVELS) * seed + level)
        return at_level(spec, level)


def at_level(spec: str, level: int) -> str:
    """A spec of scenes with another difficulty."""
    head, _, rest = spec.partition("difficulty=")
    return f"{head}difficulty={level}{rest.lstrip('0123456789')}"
