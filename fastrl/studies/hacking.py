"""Anti-scaling under a proxy reward (Video-UTR §3.1): more of the data that one frame explains, and more of UTR's.

The proxy is the likelihood of the text that is trained on. For *what one frame tells* (what does the clip show?) it can
rise without any look at time; the truth that matters is the trajectory of a subject, on clips that were not trained on.
Both kinds of data are about the same clips. Each arm is one pass over its data. Two models are trained, one of
half the width; how much a model's truth changes, and as a part of what it begins with, is compared between them.

More data is more steps as well: one pass is the paper's setting, and this study does not separate the two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.data import load_data
from fastrl.data.scenes import Scenes
from fastrl.data.scenes.tasks import shown_in
from fastrl.evaluate.intervals import relative_interval
from fastrl.evaluate.tpl import temporal_perplexity
from fastrl.evaluate.trajectory import trajectory_ious
from fastrl.recipe import Recipe, load_recipe
from fastrl.run.setup import load_model
from fastrl.studies.base import CHOOSING, REPORTED, About, Arm, Job, Line, Measured, Plot, Say, Study
from fastrl.studies.training import changed, measure, train_job
from fastrl.toy.demos.evidence import Compared, change
from fastrl.toy.demos.scenes import HELD_OUT_SEED, REPORTED_SEED, scenes_like
from fastrl.toy.demos.utr import MAX_NEW_TOKENS, build_sets, read_sets

if TYPE_CHECKING:
    from fastrl.data.records import Record
    from fastrl.models.load import Policy

RECIPE = "utr-tiny"
KINDS = {"hack": "one frame", "utr": "UTR"}
WIDTHS = {"wide": "tiny:video", "narrow": "tiny:video-narrow"}  # the second has half the first one's width
SIZES = (64, 256, 1024)
QUICK_SIZES = (64, 256)
HELD_OUT, QUICK_HELD_OUT = 256, 128
RATES = (2.5e-4, 5e-4, 1e-3)


class Experiment(Study):
    """One pass over more and more clips, asked what one frame tells or where a subject is in all; two widths."""

    about = About(
        name="hacking",
        question="does more data that one frame explains raise the proxy reward and lower the truth?",
        paper="Video-UTR (arXiv:2502.12081), temporal hacking and the anti-scaling law",
        design="one pass over 64, 256, 1,024 clips, asked what one frame tells or UTR's questions, by two models, one "
        "of half the width; proxy: log-likelihood of such texts about unseen clips; truth: trajectory IoU there",
        expected="one frame: proxy up, truth down with more data, and more so for the wider model; UTR: both up",
        minutes=20,
        quick_minutes=4,
    )
    measures = {  # noqa: RUF012
        "greedy": "trajectory IoU, greedy",
        "hack": "nats a token, one frame's text",
        "utr": "nats a token, UTR's text",
    }
    rates = RATES
    # Each kind's rate is that which its own proxy likes best: the truth would choose the rate that hacks least
    chosen_by = {f"{title}, {width}": kind for kind, title in KINDS.items() for width in WIDTHS}  # noqa: RUF012

    def __init__(self, *, quick: bool = False, say: Say = lambda text: None) -> None:
        super().__init__(quick=quick, say=say)
        self.recipe = load_recipe(RECIPE)
        self.sizes = QUICK_SIZES if quick else SIZES
        self.held_out = QUICK_HELD_OUT if quick else HELD_OUT
        self.built: dict[Path, Mapping[str, Sequence[Record]]] = {}

    def arms(self) -> Sequence[Arm]:
        # The rate is chosen on the largest set, which stands first for that
        found = []
        for width in WIDTHS:
            found.append(Arm(start_of(width), "", {"width": width}))
            for kind, title in KINDS.items():
                options = {"kind": kind, "width": width}
                sizes = reversed(self.sizes)
                found += [Arm(arm_name(kind, n, width), f"{title}, {width}", {**options, "size": n}) for n in sizes]
        return found

    def differences(self) -> Mapping[str, tuple[str, str]]:
        return {
            gain(kind, n, width): (arm_name(kind, n, width), start_of(width))
            for width in WIDTHS
            for kind in KINDS
            for n in self.sizes
        }

    def comparisons(self) -> Sequence[Compared]:
        few, many = self.sizes[0], self.sizes[-1]
        found = []
        for width in WIDTHS:
            for kind, title in KINDS.items():
                ends = arm_name(kind, few, width), arm_name(kind, many, width)
                for measured, name in (("greedy", "truth"), (kind, "proxy")):
                    found += [
                        change(f"{width}, {title}: {name}, {few} clips", measured, start_of(width), ends[0]),
                        change(f"{width}, {title}: {name}, {many} clips", measured, start_of(width), ends[1]),
                        change(f"{width}, {title}: {name}, {many} − {few}", measured, *ends),
                    ]
            found += [
                change(f"{width}, truth, UTR − one frame, {n}", "greedy", *(arm_name(k, n, width) for k in KINDS))
                for n in self.sizes
            ]
        wide, narrow = WIDTHS
        for kind, title in KINDS.items():
            for n in self.sizes:
                gains = gain(kind, n, narrow), gain(kind, n, wide)
                found.append(change(f"{title}, {n} clips: change of the truth, {wide} − {narrow}", "greedy", *gains))
        return found

    def plots(self) -> Sequence[Plot]:
        lines = [
            Line(f"{name}, {width}", [(float(n), arm_name(kind, n, width)) for n in self.sizes])
            for kind, name in KINDS.items()
            for width in WIDTHS
        ]
        return [Plot(title, "clips", measured, lines) for measured, title in self.measures.items()]

    def claims(self) -> Mapping[str, str]:
        ends = f"{self.sizes[-1]} − {self.sizes[0]}"
        ways = {"hack": {"proxy": "rises", "truth": "falls"}, "utr": {"proxy": "rises", "truth": "rises"}}
        found = {
            f"{width}, {KINDS[kind]}: {name}, {ends}": way
            for width in WIDTHS
            for kind, each in ways.items()
            for name, way in each.items()
        }
        wide, narrow = WIDTHS
        larger = f"{KINDS['hack']}, {self.sizes[-1]} clips: change of the truth, {wide} − {narrow}"
        return {**found, larger: "falls"}

    def findings(self, out: Path) -> Mapping[str, Any]:
        """Part of the starting truth that one frame's data adds or takes, of the wide model less the narrow one's: the
        wide model has more to lose."""
        rows = [json.loads(line) for line in (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
        found = {}
        for n in self.sizes:
            states = {w: (start_of(w), arm_name("hack", n, w)) for w in WIDTHS}
            if all(name in rows[0] for pair in states.values() for name in pair):
                scores = {s: [row[s]["greedy"] for row in rows] for pair in states.values() for s in pair}
                wide, narrow = ((scores[start], scores[after]) for start, after in states.values())
                value, low, high = relative_interval(wide, narrow)
                title = f"{KINDS['hack']}, {n} clips: change of the truth as a part of the start's, wide − narrow"
                found[title] = {"value": value, "low": low, "high": high}
        return found

    def settings(self) -> Mapping[str, Any]:
        return {"sizes": self.sizes, "widths": WIDTHS, "held_out": self.held_out, "rates": RATES}

    def begin(self) -> None:
        seeds = {CHOOSING: HELD_OUT_SEED, REPORTED: REPORTED_SEED}
        specs = {name: scenes_like(self.recipe.data_spec, n=self.held_out, seed=seed) for name, seed in seeds.items()}
        self.sets = {name: (load_data(spec), shown_of(spec)) for name, spec in specs.items()}
        self.starts = {width: load_model(self._of(width)) for width in WIDTHS}

    def prepare_training(self, seed: int, shared: Path) -> None:
        shared.mkdir(parents=True, exist_ok=True)
        build_sets(self._spec(seed), self._frames, seed, shared)

    def run(self, job: Job) -> Mapping[str, Measured]:
        width = job.arm.options["width"]
        policy = self.starts[width]
        if job.arm.group:
            kind, size = job.arm.options["kind"], job.arm.options["size"]
            records = self._built(job)[kind][:size]
            steps = max(1, len(records) // self.recipe.data.prompts_per_step)
            policy = train_job(changed(self._of(width), {"optim.steps": steps}), job, records)
        return {name: self._measure(policy, *self.sets[name]) for name in job.sets}

    def _of(self, width: str) -> Recipe:
        """The recipe for the model of a width."""
        return changed(self.recipe, {"model.path": WIDTHS[width]})

    @property
    def _frames(self) -> int:
        return self.recipe.data.frames or 6

    def _spec(self, seed: int) -> str:
        return scenes_like(self.recipe.data_spec, n=self.sizes[-1], seed=seed + 1)

    def _built(self, job: Job) -> Mapping[str, Sequence[Record]]:
        """Both sets of a seed, about as many clips as the largest arm has; smaller arms have their first."""
        if job.shared not in self.built:
            self.built = {job.shared: read_sets(self._spec(job.seed), job.seed, job.shared)}
        return self.built[job.shared]

    def _measure(self, policy: Policy, asked: Sequence[Record], shown: Sequence[Record]) -> Measured:
        found = measure(policy, asked, MAX_NEW_TOKENS, {"": overlap}, samples=0)
        texts = {"hack": shown, "utr": asked}
        likelihood = {
            kind: [each.full for each in temporal_perplexity(policy, records, single="first")]
            for kind, records in texts.items()
        }
        return found._replace(scores={**found.scores, **likelihood})


def overlap(answers: Sequence[str], records: Sequence[Record]) -> Sequence[float]:
    """The trajectory IoU of each answer."""
    return trajectory_ious(records, answers)


def shown_of(spec: str) -> Sequence[Record]:
    """What a clip shows, of every clip of ``spec``, in its order."""
    scenes = load_data(spec).records
    assert isinstance(scenes, Scenes)
    return [shown_in(scenes.clip(number)) for number in range(len(scenes))]


def arm_name(kind: str, size: int, width: str) -> str:
    """``one frame, 64, wide``."""
    return f"{KINDS[kind]}, {size}, {width}"


def start_of(width: str) -> str:
    """The arm that is not trained."""
    return f"start, {width}"


def gain(kind: str, size: int, width: str) -> str:
    """Name of the difference between an arm and its start."""
    return f"{arm_name(kind, size, width)} − start"
