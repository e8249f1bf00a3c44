"""The image-unconditional study (PerPO §4.7): the same lists, trained on with the pictures and with grey ones.

A model can learn preferences from the text alone: the form of good answers, likely positions. For a perception model
this is reward hacking, and it appears as a gain also when training on blank pictures. Only the additional gain of a
method comes from the images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.build.perpo import make_options
from fastrl.data import brings, load_data
from fastrl.evaluate import EVALUATIONS, evaluate
from fastrl.evaluate.run import MAX_NEW_TOKENS
from fastrl.methods import method_for
from fastrl.methods.perpo import PerPO
from fastrl.methods.rollouts import functions_of
from fastrl.recipe import Recipe, load_recipe, load_records
from fastrl.rewards.base import unknown
from fastrl.run.setup import check_tasks, load_model, scorable_records
from fastrl.studies.base import REPORTED, About, Arm, Job, Measured, Say, Study
from fastrl.studies.training import changed, make_lists, measure, scene_sets, train_job
from fastrl.toy.demos.evidence import Compared, change
from fastrl.toy.demos.families import DEFAULT, recipe_for
from fastrl.toy.demos.scenes import scenes_like

if TYPE_CHECKING:
    from fastrl.data.records import Record

RECIPE = "perpo-grounding"  # of the small model of a family
KINDS = ("perpo", "dpo", "sft")
SEEING, BLIND = "pictures", "grey"
ANSWERS, PROMPTS, PER_STEP = 12, 1024, 16
RATES = (5e-5, 1e-4, 2e-4)
BETAS = (0.05, 0.1, 0.2)  # of PerPO and DPO; the middle is the papers'

# The measure of each task; an answer's score is that of its record alone
SHOWN = {
    "grounding": "mean_iou",
    "counting": "accuracy",
    "detection": "AP",
    "ocr": "edit_distance",
    "trajectory": "mean_iou",
    "qa": "accuracy",
}


@dataclass(frozen=True)
class Own:
    """A study of one's own recipe and data, instead of the small model on scenes."""

    recipe: Recipe
    held_out: str
    limit: int | None = None
    max_new_tokens: int | None = None


class Experiment(Study):
    """PerPO, DPO and SFT on the same lists, with the pictures and without."""

    about = About(
        name="blind",
        question="does what a method gains come from the pictures?",
        paper="PerPO (arXiv:2502.04371), §4.7",
        design="the same ranked lists for every arm, pictures as they are or grey; PerPO, DPO and SFT; measured on "
        "pictures",
        expected="what seeing adds to training blind is larger for PerPO than for DPO",
        minutes=10,
        quick_minutes=4,
    )
    seeds = 5

    def __init__(
        self,
        *,
        quick: bool = False,
        say: Say = lambda text: None,
        own: Own | None = None,
        family: str | None = None,
    ) -> None:
        """``family`` is the model type of the small model (None: Qwen2.5-VL). Raises ``ValueError`` for one that has no
        small model."""
        super().__init__(quick=quick, say=say)
        self.own, self.family = own, family or DEFAULT
        self.recipe = own.recipe if own is not None else self._small()
        # Lists are the data of PerPO and its baselines only; other methods are compared with themselves
        self.kinds = KINDS if method_for(self.recipe.method) is PerPO else (self.recipe.method.kind,)
        self.rates = RATES if own is None else ()
        self.betas = {} if own is not None else {kind: BETAS for kind in KINDS if kind != "sft"}
        self.sets: dict[str, Sequence[Record]] = {}
        self.task = ""

    def again(self) -> Callable[..., Study]:
        return partial(super().again(), own=self.own, family=self.family)

    @property
    def measures(self) -> Mapping[str, str]:  # type: ignore[override]
        name = SHOWN.get(self.task, "score")
        lower = " (lower is better)" if name == "edit_distance" else ""
        return {"sampled": f"{name}, sampled{lower}", "greedy": f"greedy{lower}"}

    def arms(self) -> Sequence[Arm]:
        seeing = [(kind, blank) for kind in self.kinds for blank in (False, True)]
        return [Arm("start"), *(Arm(_arm(k, blank), k, {"kind": k, "blank": blank}) for k, blank in seeing)]

    def differences(self) -> Mapping[str, tuple[str, str]]:
        return {_added(kind): (_arm(kind, False), _arm(kind, True)) for kind in self.kinds}

    def comparisons(self) -> Sequence[Compared]:
        found = []
        for how in ("sampled", "greedy"):
            end = "" if how == "sampled" else f", {how}"
            for kind in self.kinds:
                seeing, blind = _arm(kind, False), _arm(kind, True)
                found += [
                    change(f"{kind}: seeing{end}", how, "start", seeing),
                    change(f"{kind}: blind{end}", how, "start", blind),
                    change(f"{kind}: seeing − blind{end}", how, blind, seeing),
                ]
            found += [
                change(f"seeing − blind: perpo − {kind}{end}", how, _added(kind), _added("perpo"))
                for kind in self.kinds[1:]
            ]
        return found

    def claims(self) -> Mapping[str, str]:
        return {f"seeing − blind: perpo − {kind}": "rises" for kind in self.kinds if kind != "perpo"}

    def settings(self) -> Mapping[str, Any]:
        if self.own is None:
            sizes = {"prompts": self._prompts, "steps": self.recipe.optim.steps, "held_out": self._held_out}
            other = {} if self.family == DEFAULT else {"family": self.family}
            return {**other, **sizes, "rates": RATES, "betas": BETAS}
        run = {key: value for key, value in self.recipe.model_dump(mode="json").items() if key not in ("out", "seed")}
        given = {"held_out": self.own.held_out, "limit": self.own.limit, "max_new_tokens": self.own.max_new_tokens}
        return {"recipe": self.recipe.name, **given, "keys": run}

    def begin(self) -> None:
        if self.own is None:
            self.sets = scene_sets(self.recipe.data.spec, self._held_out)
        else:
            self.sets = {REPORTED: load_data(self.own.held_out)[: self.own.limit]}
        records = self.sets[REPORTED]
        self.task = records[0].task
        if self.task not in SHOWN or self.task not in EVALUATIONS:
            raise ValueError(unknown("task for a study", self.task, SHOWN))
        if self.task == "detection" and not all(record.target["boxes"] for record in records):
            raise ValueError(f"{self.own.held_out if self.own else ''}: a picture without objects has no AP of its own")
        if self.own is not None:
            self._check_training(self.own)
        self.start = load_model(self.recipe)

    def _check_training(self, own: Own) -> None:
        """Raise ``ValueError`` if a recipe of one's own and its data cannot be trained on, or no lists be built of
        them."""
        recipe = self.recipe
        if not self._builds_lists:
            functions = functions_of(recipe.reward, recipe.mix_rewards) if recipe.scores_groups else None
            data = scorable_records(recipe, functions)
            if functions is not None:
                check_tasks(recipe, data, functions)
            return
        lists = "or build lists yourself and give --data lists:FILE"
        if recipe.data.mix:
            raise ValueError(f"data.mix: lists of this study are built of one data set; take --data SPEC, {lists}")
        if recipe.reward.model_dump(exclude_defaults=True):
            raise ValueError(f"reward: lists of this study are ranked by the task's own reward; leave it out, {lists}")
        make_options(self.task, recipe.model.path, recipe.data_spec)
        task = load_records(recipe)[0].task
        if task != self.task:
            raise ValueError(f"{recipe.data_spec} is for {task}, {own.held_out} for {self.task}: give data of one task")

    def prepare(self, seed: int, shared: Path) -> None:
        if self._builds_lists:
            own = self.own is not None
            spec = self.recipe.data_spec if own else scenes_like(self.recipe.data.spec, n=self._prompts, seed=seed)
            n = self.recipe.rollout.group_size if own else ANSWERS
            limit = self.recipe.optim.steps * self.recipe.data.prompts_per_step if own else None
            gap = self.recipe.method.min_gap  # type: ignore[attr-defined]
            task = self.task if own else "grounding"
            make_lists(self.recipe, spec, task, shared, n=n, min_gap=gap, seed=seed, limit=limit)

    def run(self, job: Job) -> Mapping[str, Measured]:
        policy = self.start
        if job.arm.group:
            changes: dict[str, Any] = {"method.kind": job.arm.options["kind"]}
            changes["data.blank_images"] = job.arm.options["blank"]
            if self._builds_lists:
                changes |= {"data.spec": f"lists:{job.shared / 'lists.jsonl'}", "data.adapter": None}
            policy = train_job(changed(self.recipe, changes), job)
        return {name: self._measure(policy, self.sets[name]) for name in job.sets}

    def _measure(self, policy: Any, records: Sequence[Record]) -> Measured:
        length = self.recipe.rollout.max_new_tokens
        if self.own is not None:
            length = self.own.max_new_tokens or MAX_NEW_TOKENS[self.task]
        return measure(policy, records, length, {"": self._score})

    def _score(self, answers: Sequence[str], records: Sequence[Record]) -> list[float]:
        shown = SHOWN[self.task]
        return [
            float(evaluate(self.task, [record], [answer])[shown] or 0.0)
            for answer, record in zip(answers, records, strict=True)
        ]

    @property
    def _builds_lists(self) -> bool:
        """Whether the arms' lists are sampled here: the method takes lists, and the data has none."""
        return method_for(self.recipe.method) is PerPO and brings(self.recipe.data.spec) != "answers"

    @property
    def _prompts(self) -> int:
        return PROMPTS // 2 if self.quick else PROMPTS

    @property
    def _held_out(self) -> int:
        return 256 if self.quick else 512

    def _small(self) -> Recipe:
        steps = {"optim.steps": 32 if self.quick else 64, "data.prompts_per_step": PER_STEP}
        return load_recipe(recipe_for(RECIPE, self.family), steps)


def _arm(kind: str, blank: bool) -> str:
    return f"{kind}, {BLIND if blank else SEEING}"


def _added(kind: str) -> str:
    return f"{kind}, {SEEING} − {BLIND}"
