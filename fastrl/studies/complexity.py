"""Does reinforcement learning help where a truth has many right orders (Perception-R1 §4, perceptual perplexity)?

A list of n objects can be written in n! orders. Supervised fine-tuning on the truth is told one of them, GRPO is paid
for any. Both are trained on the same scenes with 1, 3 and 6 objects, and measured on scenes of each kind. A *record* of
this study is a bundle of three scenes, one of each kind, so that the gaps can be compared with each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from fastrl.data import load_data
from fastrl.recipe import load_recipe
from fastrl.run.setup import load_model
from fastrl.studies.base import CHOOSING, REPORTED, About, Arm, Job, Measured, Say, Study
from fastrl.studies.rewards import ap_of_each, f1
from fastrl.studies.training import changed, measure, train_job
from fastrl.toy.demos.evidence import Compared, change
from fastrl.toy.demos.scenes import HELD_OUT_SEED, REPORTED_SEED

if TYPE_CHECKING:
    from fastrl.data.records import Record

OBJECTS = {1: 1, 3: 2, 6: 4}  # objects -> the scenes' difficulty
ARMS = {"SFT": "SFT, one order", "shuffled": "SFT, random orders", "GRPO": "GRPO"}
HELD_OUT, QUICK_HELD_OUT = 256, 96
STEPS, PER_STEP, QUICK_STEPS, QUICK_PER_STEP = 48, 24, 24, 12
FACTORS = (0.5, 1.0, 2.0)  # of each recipe's own learning rate: the two train different parts of the model


class Experiment(Study):
    """SFT on the truth in one order or in random ones, against GRPO, on scenes with 1, 3 and 6 objects."""

    about = About(
        name="complexity",
        question="does reinforcement learning gain more on supervised fine-tuning the more orders a truth has?",
        paper="Perception-R1 (arXiv:2504.07954), Table 5 (SFT, RL) and Table 9 (perceptual perplexity)",
        design="detection scenes with 1, 3, 6 objects; SFT on the truth, from left to right or in random orders, "
        "against GRPO on the same scenes for as many steps; rates are factors of each recipe's own",
        expected="GRPO − SFT grows with the number of objects",
        minutes=25,
        quick_minutes=4,
    )
    measures = {  # noqa: RUF012
        "mean": "F1, greedy, mean of 1, 3, 6 objects",
        **{f"f1 {n}": f"F1, {n}" for n in OBJECTS},
        **{f"ap {n}": f"AP of a picture, {n}" for n in OBJECTS},
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
        }
        self.trained: dict[int, Sequence[Record]] = {}

    def arms(self) -> Sequence[Arm]:
        return [Arm("start"), *(Arm(title, key, {"recipe": key}) for key, title in ARMS.items())]

    def differences(self) -> Mapping[str, tuple[str, str]]:
        return {f"GRPO − {ARMS[key]}": (ARMS["GRPO"], ARMS[key]) for key in ("SFT", "shuffled")}

    def comparisons(self) -> Sequence[Compared]:
        found = []
        for kind, end in (("f1", ""), ("ap", ", AP")):
            for key in ("SFT", "shuffled"):
                gap = f"GRPO − {ARMS[key]}"
                found += [change(f"{gap}, {n}{end}", f"{kind} {n}", ARMS[key], ARMS["GRPO"]) for n in OBJECTS]
                found += [Compared(f"{gap}: 6 − 1{end}", (gap, f"{kind} 1"), (gap, f"{kind} 6"))]
            found += [change(f"GRPO, {n}{end}", f"{kind} {n}", "start", "GRPO") for n in OBJECTS]
        return found

    def settings(self) -> Mapping[str, Any]:
        recipe = self.recipes["GRPO"]
        sizes = {"steps": recipe.optim.steps, "prompts_per_step": recipe.data.prompts_per_step}
        return {**sizes, "held_out": self.held_out, "rates": FACTORS}

    def begin(self) -> None:
        seeds = {CHOOSING: HELD_OUT_SEED, REPORTED: REPORTED_SEED}
        self.sets = {name: {n: scenes_with(n, self.held_out, seed) for n in OBJECTS} for name, seed in seeds.items()}
        self.start = load_model(self.recipes["GRPO"])

    def run(self, job: Job) -> Mapping[str, Measured]:
        policy = self.start
        if job.arm.group:
            recipe = self.recipes[job.arm.options["recipe"]]
            rate = recipe.optim.lr if job.rate is None else recipe.optim.lr * job.rate
            policy = train_job(changed(recipe, {"optim.lr": rate}), job._replace(rate=None), self._training(job.seed))
        return {name: self._measure(policy, self.sets[name]) for name in job.sets}

    def _training(self, seed: int) -> Sequence[Record]:
        """As many scenes as the steps take, of each kind in turn; the same for every arm."""
        if seed not in self.trained:
            recipe = self.recipes["GRPO"]
            each = -(-recipe.optim.steps * recipe.data.prompts_per_step // len(OBJECTS))
            made = [scenes_with(n, each, seed + 1) for n in OBJECTS]
            self.trained[seed] = list(chain.from_iterable(zip(*made, strict=True)))
        return self.trained[seed]

    def _measure(self, policy: Any, sets: Mapping[int, Sequence[Record]]) -> Measured:
        length = self.recipes["GRPO"].rollout.max_new_tokens
        scores: dict[str, Sequence[float]] = {}
        for n, records in sets.items():
            found = measure(policy, records, length, {"": f1, "_ap": ap_of_each}, samples=0).scores
            scores |= {f"f1 {n}": found["greedy"], f"ap {n}": found["greedy_ap"]}
        bundles = zip(*(scores[f"f1 {n}"] for n in OBJECTS), strict=True)
        mean = {"mean": [sum(values) / len(values) for values in bundles]}
        ids = [" + ".join(record.id for record in records) for records in zip(*sets.values(), strict=True)]
        return Measured(ids, {**mean, **scores})


def scenes_with(objects: int, count: int, seed: int) -> list[Record]:
    """The first ``count`` detection scenes of a seed with exactly this many objects; ids say which kind they are."""
    drawn = load_data(f"scenes:detection?n={60 * count}&seed={seed}&difficulty={OBJECTS[objects]}&size=84")
    fitting = (record for record in drawn if len(record.target["boxes"]) == objects)
    found = [replace(record, id=f"{record.id}-{objects}") for record in islice(fitting, count)]
    if len(found) < count:
        raise ValueError(f"only {len(found)} of {len(drawn)} scenes have {objects} objects, {count} are needed")
    return found
