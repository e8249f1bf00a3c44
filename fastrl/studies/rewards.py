"""Perception-R1's reward for detection, part by part (§3.3, Tables 5 and 6): each part added in turn, and the matching.

Every arm is GRPO on the same scenes with another reward. They are judged by COCO's AP, of all pictures and of each, and
by F1 of boxes with an IoU of at least 0.5 after an optimal match.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from fastrl.data import load_data
from fastrl.evaluate.coco import evaluate_detection
from fastrl.methods.sft import in_random_order
from fastrl.recipe import load_recipe
from fastrl.rewards import reward_for
from fastrl.run.setup import load_model
from fastrl.studies.base import About, Arm, Job, Measured, Say, Study
from fastrl.studies.training import changed, measure, scene_sets, train_job
from fastrl.toy.demos.evidence import Compared, change

if TYPE_CHECKING:
    from fastrl.data.records import Record

RECIPE = "perception-r1-detection-tiny"
PARTS = ("format", "location", "class", "f1", "missing")  # in the order in which they are added
SEQUENCE = "all, in sequence"
UNORDERED = "all, in sequence, truths in random orders"
MATCH, UNORDERED_MATCH = "optimal match − sequence", "optimal match − sequence, truths in random orders"
HELD_OUT, QUICK_HELD_OUT = 384, 192
QUICK_STEPS, QUICK_PROMPTS = 24, 16
RATES = (1.5e-2, 3e-2, 6e-2)


class Experiment(Study):
    """GRPO with format alone, then with one more part each; with all parts, boxes matched best or in sequence."""

    about = About(
        name="rewards",
        question="does every part of the detection reward, and its optimal match, help?",
        paper="Perception-R1 (arXiv:2504.07954), §3.3, Table 6 (parts) and Table 5 (matching)",
        design="GRPO on detection scenes; format, + location, + class, + F1, + missing; all parts with an optimal "
        "match or with boxes in sequence, of truths from left to right or in random orders; AP and F1",
        expected="AP rises with each part; in sequence is below an optimal match",
        minutes=20,
        quick_minutes=5,
    )
    measures = {  # noqa: RUF012
        "greedy_ap": "AP of a picture, greedy",
        "sampled_ap": "AP of a picture, sampled",
        "greedy": "F1, greedy",
        "sampled": "F1, sampled",
        "AP": "AP of all, greedy",
    }
    rates = RATES

    def __init__(self, *, quick: bool = False, say: Say = lambda text: None) -> None:
        super().__init__(quick=quick, say=say)
        small = {"optim.steps": QUICK_STEPS, "data.prompts_per_step": QUICK_PROMPTS}
        self.recipe = load_recipe(RECIPE, small if quick else {})
        self.held_out = QUICK_HELD_OUT if quick else HELD_OUT

    def arms(self) -> Sequence[Arm]:
        steps = [PARTS[: count + 1] for count in range(len(PARTS))]
        added = [Arm(arm_name(parts), "GRPO", {"parts": parts, "matching": "optimal"}) for parts in steps]
        # The rate is chosen on the whole reward, which stands first for that
        whole, rest = added[-1], added[:-1]
        in_turn = {"parts": PARTS, "matching": "sequence"}
        sequence = [Arm(SEQUENCE, "GRPO", in_turn), Arm(UNORDERED, "GRPO", {**in_turn, "unordered": True})]
        return [Arm("start"), whole, *rest, *sequence]

    def comparisons(self) -> Sequence[Compared]:
        names = [arm_name(PARTS[: count + 1]) for count in range(len(PARTS))]
        pairs = [("start", names[0]), *pairwise(names)]
        titles = {
            ("start", names[-1]): "all parts",
            (SEQUENCE, names[-1]): MATCH,
            (UNORDERED, names[-1]): UNORDERED_MATCH,
        }
        pairs += titles
        return [
            change(titles.get((before, after), after) + end, how, before, after)
            for how, end in (("greedy_ap", ", AP"), ("sampled_ap", ", AP sampled"), ("greedy", ", F1"))
            for before, after in pairs
        ]

    def claims(self) -> Mapping[str, str]:
        added = {f"{arm_name(PARTS[: count + 1])}, AP": "rises" for count in range(1, len(PARTS))}
        return {**added, f"{MATCH}, AP": "rises", f"{UNORDERED_MATCH}, AP": "rises"}

    def settings(self) -> Mapping[str, Any]:
        per_step = self.recipe.data.prompts_per_step
        sizes = {"steps": self.recipe.optim.steps, "prompts_per_step": per_step, "held_out": self.held_out}
        return {**sizes, "rates": RATES}

    def begin(self) -> None:
        found = scene_sets(self.recipe.data.spec, 2 * self.held_out)
        self.sets = {name: [r for r in each if r.target["boxes"]][: self.held_out] for name, each in found.items()}
        self.start = load_model(self.recipe)

    def run(self, job: Job) -> Mapping[str, Measured]:
        policy = self.start
        if job.arm.group:
            weights = {part: float(part in job.arm.options["parts"]) for part in PARTS}
            changes = {"reward.weights": weights, "data.seed": job.seed}
            options = {**self.recipe.reward.options, "matching": job.arm.options["matching"]}
            records = Unordered(load_data(self.recipe.data.spec)) if job.arm.options.get("unordered") else None
            policy = train_job(changed(self.recipe, changes | {"reward.options": options}), job, records)
        length = self.recipe.rollout.max_new_tokens
        scores = {"": f1, "_ap": ap_of_each}
        return {name: measure(policy, self.sets[name], length, scores, samples=1, whole=ap_of_all) for name in job.sets}


class Unordered(Sequence["Record"]):
    """Detection records, the objects of each in an order that depends on the record's number alone."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> Record:  # type: ignore[override]
        record = self.records[number]
        rng = torch.Generator().manual_seed(number)
        return replace(record, target=in_random_order(record.task, record.target, rng))


def f1(answers: Sequence[str], records: Sequence[Record]) -> Sequence[float]:
    """F1 of the boxes of each answer, whatever their labels."""
    return [value or 0.0 for value in reward_for("detection").score(answers, records)["f1"]]


def ap_of_each(answers: Sequence[str], records: Sequence[Record]) -> Sequence[float]:
    """COCO's AP of each picture by itself."""
    return [
        evaluate_detection([record], [answer])["AP"] or 0.0 for answer, record in zip(answers, records, strict=True)
    ]


def ap_of_all(answers: Sequence[str], records: Sequence[Record]) -> Mapping[str, float]:
    """COCO's AP of all pictures together."""
    return {"AP": evaluate_detection(records, answers)["AP"] or 0.0}


def arm_name(parts: Sequence[str]) -> str:
    """``format``, ``+ location``, …: the part that is added to those before it."""
    return parts[0] if len(parts) == 1 else f"+ {parts[-1]}"
