"""Does quality rise with every turn of reflection (RePer §4)? Reasons that name what is wrong, and another picture's.

A model that cannot use a reason cannot show what training on reasons does. The small language model is first taught by
lessons in which exactly the denied fact changes (``fastrl.toy.teach.reasons``), about made-up mistakes and then about
those of its own captions, as instruction data teaches the models that the paper starts from. If this base does not do
better with the reasons for its own captions than with those for other pictures' captions, nothing is trained.

Captions of scenes are worded in several ways, all turns of a dialogue are in the loss, and α and the learning rate are
swept. The control is trained on dialogues whose reasons belong to another picture.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.build.reper import BuildOptions, build_dialogues
from fastrl.critics import Critic
from fastrl.data import load_data
from fastrl.data.files import write_atomically
from fastrl.data.scenes import tasks
from fastrl.data.scenes.world import Scene, sample_scene
from fastrl.evaluate.caption import evaluate_caption
from fastrl.evaluate.intervals import paired_interval
from fastrl.evaluate.reflect import reflect
from fastrl.evaluate.run import sample_records
from fastrl.models.open import open_policy, resolve_model
from fastrl.recipe import Recipe, load_recipe
from fastrl.rollout import Sampling
from fastrl.run.setup import load_model
from fastrl.studies.base import About, Arm, Job, Line, Measured, Plot, Say, Study
from fastrl.studies.machine import cores
from fastrl.studies.training import changed, scene_sets, teach, train_job
from fastrl.toy.demos.evidence import Compared, change
from fastrl.toy.demos.scenes import scenes_like
from fastrl.toy.teach.build import build, threads_of_torch
from fastrl.toy.teach.reasons import Shuffled, critic, own_lesson

if TYPE_CHECKING:
    from fastrl.data.records import Record
    from fastrl.models.load import Policy

RECIPE, SCENES = "reper-caption-tiny", "scenes:caption?n=1024&seed=1&difficulty=2"
TURNS, LONGEST = 3, 64
ALPHAS, QUICK_ALPHAS = (0, 1, 2, 5, 10), (0, 1, 10)
CLAIMED = (1, 10)  # with which false captions are claimed to become fewer; the second is the paper's best
CONTROL = "α 1, others' reasons"
TAUGHT, QUICK_TAUGHT, ROWS, TEACHING_RATE = 1200, 250, 12, 2e-3  # lessons: steps, scenes of a step
OWN, QUICK_OWN, DRAWN = (
    6144,
    2048,
    2,
)  # scenes of which the taught model's own captions become lessons, captions of each
OWN_STEPS, QUICK_OWN_STEPS, OWN_PER_STEP, OWN_RATE = 240, 60, 32, 1e-3
RIGHT = 3  # of its right captions one in so many is a lesson
MARK = "taught.json"
PICTURES, QUICK_PICTURES, STEPS, QUICK_STEPS = 768, 192, 96, 24
HELD_OUT, QUICK_HELD_OUT = 384, 192
MIN_BEST, MIN_GAP = 0.9, 0.1
RATES = (2.5e-4, 5e-4, 1e-3)


class Experiment(Study):
    """RePer with several α on dialogues with reasons, and on dialogues with the reasons of other pictures."""

    about = About(
        name="reflection",
        question="does quality rise with every turn, because of the reasons?",
        paper="RePer (arXiv:2504.07165), §4 (turns, Table 3; α, figure)",
        design="a model that was taught to use reasons; reflective unlikelihood on all turns of dialogues whose "
        "feedback names what is wrong, α of 0, 1, 2, 5, 10; control: dialogues with another picture's reasons; three "
        "turns with the captions' own reasons and with another picture's",
        expected="turn t + 1 above turn t, and above the same turn with another picture's reasons; α > 0 lowers false "
        "facts (the paper's best α is 10)",
        minutes=45,  # of which about 16 are lessons, and nothing else can run then
        quick_minutes=5,
    )
    rates = RATES

    def __init__(self, *, quick: bool = False, say: Say = lambda text: None) -> None:
        super().__init__(quick=quick, say=say)
        self.alphas = QUICK_ALPHAS if quick else ALPHAS
        self.taught = QUICK_TAUGHT if quick else TAUGHT
        self.own, self.own_steps = (QUICK_OWN, QUICK_OWN_STEPS) if quick else (OWN, OWN_STEPS)
        self.pictures = QUICK_PICTURES if quick else PICTURES
        self.steps = QUICK_STEPS if quick else STEPS
        self.held_out = QUICK_HELD_OUT if quick else HELD_OUT

    @property
    def measures(self) -> Mapping[str, str]:  # type: ignore[override]
        own = {f"score {turn}": f"turn {turn}" for turn in (3, 1, 2)}
        other = {f"other {turn}": f"turn {turn}, others' reasons" for turn in (2, 3)}
        return own | other | {f"false {turn}": f"false captions, turn {turn}" for turn in (1, 2, 3)}

    def arms(self) -> Sequence[Arm]:
        swept = [Arm(arm_name(a), arm_name(a), {"alpha": a, "shuffled": False}) for a in self.alphas]
        return [Arm("start"), *swept, Arm(CONTROL, "control", {"alpha": 1, "shuffled": True})]

    def comparisons(self) -> Sequence[Compared]:
        names = [arm.name for arm in self.arms()]
        trained = names[1:]
        found = [
            Compared(because(arm, turn), (arm, f"other {turn}"), (arm, f"score {turn}"))
            for arm in names
            for turn in range(2, TURNS + 1)
        ]
        for arm in names:
            found += [
                Compared(f"{arm}: turn 2 − 1", (arm, "score 1"), (arm, "score 2")),
                Compared(f"{arm}: turn 3 − 2", (arm, "score 2"), (arm, "score 3")),
                Compared(f"{arm}: turn 2 − 1, others' reasons", (arm, "score 1"), (arm, "other 2")),
            ]
        for measure, title in (("score 3", "turn 3"), ("score 1", "turn 1"), ("false 3", "false captions, turn 3")):
            found += [change(f"{arm} − start: {title}", measure, "start", arm) for arm in trained]
            found += [
                change(f"{arm} − {arm_name(0)}: {title}", measure, arm_name(0), arm)
                for arm in trained[1:]
                if arm != CONTROL
            ]
        return [*found, change("own − others' reasons in training: turn 3", "score 3", CONTROL, arm_name(1))]

    def plots(self) -> Sequence[Plot]:
        lines = [Line(f"turn {turn}", [(float(a), arm_name(a)) for a in self.alphas]) for turn in range(1, TURNS + 1)]
        return [
            Plot(f"score, {line.label}", "α", f"score {number}", [line]) for number, line in enumerate(lines, start=1)
        ]

    def claims(self) -> Mapping[str, str]:
        arm = arm_name(1)
        turns = {f"{arm}: turn 2 − 1": "rises", f"{arm}: turn 3 − 2": "rises"}
        reasons = {because(arm, turn): "rises" for turn in range(2, TURNS + 1)}
        false = {f"{arm_name(a)} − {arm_name(0)}: false captions, turn 3": "falls" for a in CLAIMED}
        return {**turns, **reasons, **false}

    def settings(self) -> Mapping[str, Any]:
        taught = {"lessons": self.taught * ROWS, "own": self.own, "own_steps": self.own_steps}
        sizes = {**taught, "pictures": self.pictures, "steps": self.steps}
        return {**sizes, "held_out": self.held_out, "alphas": self.alphas, "rates": RATES}

    def begin(self) -> None:
        self.sets: Mapping[str, Sequence[Record]] = scene_sets(SCENES, self.held_out)

    def prepare(self, seed: int, shared: Path) -> None:
        """Teach the base, in two parts, with all cores: every arm of every seed waits for it."""
        with threads_of_torch(cores()):
            self._teach(shared.parent / "lessons", base_of(shared))

    def _teach(self, first: Path, base: Path) -> None:
        if not (first / MARK).is_file():
            self.say(f"teaching {self.taught} steps of {ROWS} scenes to use reasons …")
            start, how = resolve_model("tiny:language"), {"rows": ROWS, "lr": TEACHING_RATE, "retokenize": True}
            build("reasons", first, steps=self.taught, start=start, threads=cores(), log=self.say, **how)
            write_atomically(first / MARK, json.dumps({"steps": self.taught, "threads": cores()}) + "\n")
        if not (base / "config.json").is_file():
            found = own_lessons(open_policy(str(first)), self.own)
            self.say(f"teaching {self.own_steps} steps on {len(found)} lessons from the model's own captions …")
            if not found:
                raise ValueError(f"{first}: no caption of this model differs from the truth in one word or none")
            sizes = {"steps": self.own_steps, "per_step": OWN_PER_STEP, "rate": OWN_RATE, "seed": 0}
            teach(str(first), found, base, **sizes)

    def prepare_training(self, seed: int, shared: Path) -> None:
        """The seed's dialogues by the base: with the captions' own reasons, and with another picture's."""
        shared.mkdir(parents=True, exist_ok=True)
        spec, recipe = scenes_like(SCENES, n=self.pictures, seed=seed + 1), self._recipe(shared)
        path, sizes = recipe.model.path, {"min_best": MIN_BEST, "min_gap": MIN_GAP, "max_new_tokens": LONGEST}
        policy, records = load_model(recipe), load_data(spec)
        for shuffled in (False, True):
            judge: Critic = Shuffled(critic()) if shuffled else critic()
            file, options = (
                dialogues_of(shared, shuffled=shuffled),
                BuildOptions(path, spec, "rule", **sizes, seed=seed),
            )
            found = build_dialogues(options, file, policy=policy, critic=judge, records=records)
            self.say(f"{found['kept']} dialogues of {found['pictures']} pictures")
            if not found["kept"]:
                wanted = f"captions differ by {MIN_GAP:g}, the best {MIN_BEST:g}"
                raise ValueError(f"{spec}: of no picture the base's {wanted}")

    def obstacle(self, untrained: Mapping[str, Measured]) -> str:
        scores = untrained["start"].scores
        found = paired_interval(scores["other 2"], scores["score 2"])
        if found.low > 0:
            return ""
        held = f"{found.change:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
        return f"the base uses no reasons: turn 2 with its captions' own less another picture's is {held}"

    def run(self, job: Job) -> Mapping[str, Measured]:
        recipe = self._recipe(job.shared)
        if job.arm.group:
            file = dialogues_of(job.shared, shuffled=job.arm.options["shuffled"])
            changes = {"method.alpha": float(job.arm.options["alpha"]), "data.spec": f"reflection:{file}"}
            policy = train_job(changed(recipe, changes), job)
        else:
            policy = load_model(recipe)
        return {name: self.measured(policy, self.sets[name]) for name in job.sets}

    def measured(self, policy: Policy, records: Sequence[Record]) -> Measured:
        """Score of each turn's greedy caption, and whether it states something false (0 or 1)."""
        scores: dict[str, Sequence[float]] = {}
        for name, judge in (("score", critic()), ("other", Shuffled(critic()))):
            rows = evaluated(policy, judge, records)
            first = 1 if name == "score" else 2  # the first turn is the same
            scores |= {f"{name} {turn}": [row["score"] for row in rows[turn - 1]] for turn in range(first, TURNS + 1)}
            if name == "score":
                scores |= {f"false {n}": [row["false_captions"] for row in row_of] for n, row_of in enumerate(rows, 1)}
        return Measured([record.id for record in records], scores)

    def _recipe(self, shared: Path) -> Recipe:
        fixed = {"method.turns": "all", "method.alpha": 0.0, "optim.steps": self.steps}
        return load_recipe(RECIPE, {**fixed, "model.path": str(base_of(shared))})


def base_of(shared: Path) -> Path:
    """The folder of the taught model, which all seeds share."""
    return shared.parent / "base"


def dialogues_of(shared: Path, *, shuffled: bool) -> Path:
    """The file of a seed's dialogues, with the captions' own reasons or with another picture's."""
    return shared / ("shuffled.jsonl" if shuffled else "dialogues.jsonl")


def own_lessons(policy: Policy, count: int) -> list[Record]:
    """Lessons from a model's own captions of ``count`` scenes: all with a wrong word, and one in ``RIGHT`` that are
    right."""
    drawn = _scenes(count)
    found: list[Record] = []
    right = 0
    asked = sample_records(policy, [record for record, _ in drawn], Sampling(DRAWN, LONGEST, 1.0), portion=128)
    for (record, scene), (_, completions) in zip(drawn, asked, strict=True):
        for text in dict.fromkeys(completion.text for completion in completions):
            rng = random.Random(f"{record.id}/{text}")
            lesson = own_lesson(rng, record, scene.shapes, scene.width, text)
            if lesson is None:
                continue
            right += lesson.target["dialogue"][0].score == 1.0
            if lesson.target["dialogue"][0].score < 1.0 or right % RIGHT == 0:
                found.append(replace(lesson, id=f"{lesson.id}-{len(found)}"))
    return found


def _scenes(count: int) -> list[tuple[Record, Scene]]:
    """Caption records with their scenes, on which no arm is trained or measured."""
    found: list[tuple[Record, Scene]] = []
    number = 0
    while len(found) < count:
        rng = random.Random(f"own/{number}")
        scene = sample_scene(rng, 2, words=int(rng.random() < 0.3))
        record = tasks.caption_record(rng, scene, f"own-{number}", 2)
        number += 1
        found += [(record, scene)] if record is not None else []
    return found


def evaluated(policy: Policy, judge: Critic, records: Sequence[Record]) -> list[list[dict[str, float]]]:
    """Caption metrics of every record's answer, by turn of greedy reflection."""
    found = reflect(policy, judge, records, turns=TURNS, max_new_tokens=LONGEST, portion=128)
    return [[evaluate_caption([each.record], [each.turns[turn].answer]) for each in found] for turn in range(TURNS)]


def because(arm: str, turn: int) -> str:
    """The comparison that says whether a turn's score comes from the reasons: with own less with another picture's."""
    return f"{arm}: own − others' reasons, turn {turn}"


def arm_name(alpha: float) -> str:
    """``α 10``."""
    return f"α {alpha:g}"
