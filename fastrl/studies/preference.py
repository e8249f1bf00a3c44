"""PerPO against SFT, DPO and LiPO on one set of lists (PerPO §4.2, §4.8): with noise on rewards, with rewards that
call many answers equally good, and with lists of other lengths.

Lists are sampled once for each seed. Every arm trains on a copy of the same file:

- *noise*: a normal deviate of standard deviation σ is added to the reward of every answer, once;
- *plateau*: the reward is min(1, IoU / 0.5), so that every answer that half overlaps the truth is a best one;
- *N*: the first N answers of each list, in an order drawn once (answers that were sampled are exchangeable).

Answers of equal reward are in that drawn order as well, so that a plateau does not reveal which was better.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.data.files import write_atomically
from fastrl.recipe import load_recipe
from fastrl.rewards.grounding import GroundingReward
from fastrl.run.setup import load_model
from fastrl.studies.base import About, Arm, Job, Line, Measured, Plot, Say, Study
from fastrl.studies.training import LISTS, changed, make_lists, measure, scene_sets, train_job
from fastrl.toy.demos.evidence import Compared, change
from fastrl.toy.demos.scenes import scenes_like

if TYPE_CHECKING:
    from fastrl.data.records import Record
    from fastrl.models.load import Policy

RECIPE = "perpo-grounding-tiny"
KINDS = {"perpo": "PerPO", "lipo": "LiPO", "dpo": "DPO", "sft": "SFT"}
SIGMAS = (0.0, 0.2, 0.4)
LENGTHS = (2, 4, 8, 12)
LONGEST = LENGTHS[-1]
LONGER = f"PerPO, smooth: N {LONGEST} − N {LENGTHS[0]}"
FORMS = ("smooth", "plateau")
PLATEAU = 0.5  # IoU from which the plateau's reward is 1
MIN_GAP = 0.3  # between the best and the worst of the 12 answers, without noise
PROMPTS, STEPS, PER_STEP, HELD_OUT = 1024, 48, 16, 512
QUICK_PROMPTS, QUICK_STEPS, QUICK_HELD_OUT = 512, 24, 256
RATES = (5e-5, 1e-4, 2e-4)
BETAS = (0.05, 0.1, 0.2)  # of the three methods that compare answers; the middle is the papers'


class Experiment(Study):
    """Four methods × three strengths of noise × two forms of the reward, and lists of four lengths."""

    about = About(
        name="preference",
        question="is a ranking with gaps as margins better than the best answer, the extreme pair, or the order alone?",
        paper="PerPO (arXiv:2502.04371), grounding tables and §4.8 (list size)",
        design="one file of lists for each seed; PerPO, LiPO, DPO, SFT; noise σ 0, 0.2, 0.4 on smooth and plateau "
        "rewards; lists of 2, 4, 8, 12 answers with smooth rewards without noise",
        expected="PerPO above SFT and DPO, above SFT also where rewards are noisy; better with longer lists",
        minutes=35,
        quick_minutes=4,
    )
    measures = {  # noqa: RUF012
        "sampled": "IoU, sampled",
        "greedy": "IoU, greedy",
        "sampled_half": "min(1, 2 IoU), sampled",
        "greedy_half": "min(1, 2 IoU), greedy",
    }
    rates = RATES
    seeds = 5
    betas = {kind: BETAS for kind in KINDS if kind != "sft"}  # noqa: RUF012

    def __init__(self, *, quick: bool = False, say: Say = lambda text: None) -> None:
        super().__init__(quick=quick, say=say)
        steps = QUICK_STEPS if quick else STEPS
        changes = {"method.min_gap": 0.0, "optim.steps": steps, "data.prompts_per_step": PER_STEP}
        self.recipe = load_recipe(RECIPE, changes)
        self.prompts, self.held_out = (QUICK_PROMPTS, QUICK_HELD_OUT) if quick else (PROMPTS, HELD_OUT)

    def arms(self) -> Sequence[Arm]:
        grid = [(form, sigma, LONGEST) for form in FORMS for sigma in SIGMAS]
        grid += [("smooth", 0.0, n) for n in LENGTHS[:-1]]
        quick = (("smooth", 0.0, LONGEST), ("smooth", 0.4, LONGEST), ("plateau", 0.0, LONGEST))
        return [
            Arm("start"),
            *(
                Arm(arm_name(kind, *data), kind, {"kind": kind, "data": data}, data in quick)
                for data in grid
                for kind in KINDS
            ),
        ]

    def comparisons(self) -> Sequence[Compared]:
        found = []
        for arm in self.arms():
            if arm.name != "start" and arm.options["kind"] == "perpo":
                data = arm.options["data"]
                measure_of = "sampled" if data[0] == "smooth" else "sampled_half"
                found.append(change(f"PerPO, {condition(*data)}", measure_of, "start", arm.name))
                found += [
                    change(f"PerPO − {KINDS[kind]}, {condition(*data)}", measure_of, arm_name(kind, *data), arm.name)
                    for kind in ("sft", "dpo", "lipo")
                ]
        ends = (arm_name("perpo", "smooth", 0.0, n) for n in (LENGTHS[0], LONGEST))
        return [*found, change(LONGER, "sampled", *ends)]

    def plots(self) -> Sequence[Plot]:
        noise = [
            Plot(
                f"{form} rewards",
                "σ of the noise",
                "sampled" if form == "smooth" else "sampled_half",
                [Line(title, [(s, arm_name(kind, form, s, LONGEST)) for s in SIGMAS]) for kind, title in KINDS.items()],
            )
            for form in FORMS
        ]
        lines = [Line(title, [(n, arm_name(kind, "smooth", 0.0, n)) for n in LENGTHS]) for kind, title in KINDS.items()]
        return [*noise, Plot("smooth rewards without noise", "answers in a list", "sampled", lines)]

    def claims(self) -> Mapping[str, str]:
        where, noisy = (condition("smooth", sigma, LONGEST) for sigma in (SIGMAS[0], SIGMAS[-1]))
        others = [f"PerPO − {KINDS[kind]}, {where}" for kind in ("sft", "dpo", "lipo")]
        return dict.fromkeys([*others, f"PerPO − {KINDS['sft']}, {noisy}", LONGER], "rises")

    def settings(self) -> Mapping[str, Any]:
        return {
            "prompts": self.prompts,
            "steps": self.recipe.optim.steps,
            "held_out": self.held_out,
            "rates": RATES,
            "betas": BETAS,
        }

    def begin(self) -> None:
        self.sets = scene_sets(self.recipe.data.spec, self.held_out)
        self.start = load_model(self.recipe)

    def prepare(self, seed: int, shared: Path) -> None:
        spec = scenes_like(self.recipe.data.spec, n=self.prompts, seed=seed)
        lists = make_lists(self.recipe, spec, "grounding", shared, n=LONGEST, min_gap=MIN_GAP, seed=seed)
        rows = [json.loads(line) for line in lists.read_text(encoding="utf-8").splitlines()]
        for data in dict.fromkeys(arm.options["data"] for arm in self.arms() if arm.options):
            path = shared / file_name(*data)
            if not path.exists():
                lines = (json.dumps(varied(row, *data, seed=seed), ensure_ascii=False) for row in rows)
                write_atomically(path, "".join(f"{line}\n" for line in lines))

    def run(self, job: Job) -> Mapping[str, Measured]:
        policy = self.start
        if job.arm.group:
            spec = f"lists:{job.shared / file_name(*job.arm.options['data'])}"
            changes = {"method.kind": job.arm.options["kind"], "data.spec": spec}
            policy = train_job(changed(self.recipe, changes), job)
        return {name: self._measure(policy, self.sets[name]) for name in job.sets}

    def _measure(self, policy: Policy, records: Sequence[Record]) -> Measured:
        return measure(policy, records, self.recipe.rollout.max_new_tokens, {"": overlap, "_half": half})


def overlap(answers: Sequence[str], records: Sequence[Record]) -> Sequence[float]:
    """The IoU of each answer's box."""
    return [value or 0.0 for value in GroundingReward(format="none").score(answers, records)["iou"]]


def half(answers: Sequence[str], records: Sequence[Record]) -> Sequence[float]:
    """The plateau's reward of each answer."""
    return [on_plateau(value) for value in overlap(answers, records)]


def on_plateau(iou: float) -> float:
    """min(1, IoU / ``PLATEAU``)."""
    return min(1.0, iou / PLATEAU)


def varied(row: Mapping[str, Any], form: str, sigma: float, n: int, *, seed: int) -> dict[str, Any]:
    """A line of a list file with the first ``n`` of its answers in a drawn order, rewards of ``form`` and noise.

    The order and the deviates depend on the seed and the line's ``id`` only: they are the same for every ``n``, form
    and method, and deviates are proportional to ``sigma``.
    """
    rng = random.Random(f"preference/{seed}/{row['id']}")
    drawn = list(zip(row["answers"], row["rewards"], strict=True))
    rng.shuffle(drawn)
    deviates = [rng.gauss(0.0, 1.0) for _ in drawn]
    rewards = [
        (reward if form == "smooth" else on_plateau(reward)) + sigma * deviate
        for (_, reward), deviate in zip(drawn, deviates, strict=True)
    ]
    return {**row, "answers": [answer for answer, _ in drawn][:n], "rewards": rewards[:n]}


def file_name(form: str, sigma: float, n: int) -> str:
    """Of the lists with these rewards, beside ``LISTS``, which has the pictures' folder."""
    return f"{Path(LISTS).stem}-{form}-{sigma:g}-{n}.jsonl"


def condition(form: str, sigma: float, n: int) -> str:
    """As tables name it: only what differs from smooth rewards, no noise, 12 answers."""
    parts = [form, *([f"σ {sigma:g}"] if sigma else []), *([f"N {n}"] if n != LONGEST else [])]
    return ", ".join(parts)


def arm_name(kind: str, form: str, sigma: float, n: int) -> str:
    """``perpo, smooth, σ 0.2``."""
    return f"{kind}, {condition(form, sigma, n)}"
