"""Does temporal perplexity tell good training data (Video-UTR §3.2)? Halves of one pool of dialogues, by their TPL.

All dialogues are the same task (a spatial query about one moving shape, answered by its trajectory) about clips of the
same number of frames. The halves are taken within dialogues of equally many actions, so that their answers are equally
long. TPL is measured by the starting model, with grey pictures in place of the frames that are not shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.build.utr import BuildOptions, build_dialogues
from fastrl.data import load_data
from fastrl.data.files import write_atomically
from fastrl.evaluate.intervals import spearman_interval
from fastrl.evaluate.tpl import TemporalPerplexity, temporal_perplexity
from fastrl.evaluate.trajectory import trajectory_ious
from fastrl.recipe import load_recipe
from fastrl.run.setup import load_model
from fastrl.studies.base import REPORTED, About, Arm, Job, Measured, Say, Study
from fastrl.studies.cells import read_cell
from fastrl.studies.training import measure, scene_sets, train_job
from fastrl.toy.demos.evidence import Compared, change
from fastrl.toy.demos.scenes import scenes_like

if TYPE_CHECKING:
    from fastrl.data.records import Record

RECIPE = "utr-tiny"
HALVES = ("random", "top", "bottom")
POOL, QUICK_POOL, HELD_OUT, LONGEST = 512, 256, 256, 160
DRAWN = 2  # clips drawn for each that is measured; those that do not move are left out
MOVES = 3  # different boxes of a clip that moves
RATES = (2.5e-4, 5e-4, 1e-3)


class Experiment(Study):
    """The same training on the half with the highest TPL, the lowest, and a random one."""

    about = About(
        name="temporal",
        question="does temporal perplexity tell which dialogues are worth training on?",
        paper="Video-UTR (arXiv:2502.12081), temporal perplexity (eq. 6)",
        design="one pool of UTR dialogues of the same task and length about moving clips; the half with the highest "
        "TPL, the lowest, a random one; trajectory IoU on 256 unseen moving clips; rank correlations of TPL",
        expected="top at least random, random above bottom; TPL falls with the number of frames that explain an answer",
        minutes=30,
        quick_minutes=4,
    )
    measures = {"sampled": "trajectory IoU, sampled", "greedy": "greedy"}  # noqa: RUF012
    rates = RATES
    seeds = 5

    def __init__(self, *, quick: bool = False, say: Say = lambda text: None) -> None:
        super().__init__(quick=quick, say=say)
        self.recipe = load_recipe(RECIPE, {"optim.steps": 32} if quick else {})
        self.pool = QUICK_POOL if quick else POOL

    def arms(self) -> Sequence[Arm]:
        return [Arm("start"), *(Arm(half, "UTR") for half in HALVES)]

    def comparisons(self) -> Sequence[Compared]:
        pairs = (("start", "random"), ("random", "top"), ("bottom", "random"), ("bottom", "top"))
        return [
            change(f"{after} − {before}{end}", how, before, after)
            for how, end in (("sampled", ""), ("greedy", ", greedy"))
            for before, after in pairs
        ]

    def claims(self) -> Mapping[str, str]:
        return {"top − random": "does not fall", "random − bottom": "rises", "top − bottom": "rises"}

    def settings(self) -> Mapping[str, Any]:
        return {"pool": self.pool, "steps": self.recipe.optim.steps, "held_out": HELD_OUT, "rates": RATES}

    def begin(self) -> None:
        drawn = scene_sets(self.recipe.data_spec, HELD_OUT * DRAWN)
        self.sets = {name: [r for r in records if moves(r)][:HELD_OUT] for name, records in drawn.items()}
        self.start = load_model(self.recipe)

    def prepare(self, seed: int, shared: Path) -> None:
        path = shared / "tpl.jsonl"
        if path.exists():
            return
        shared.mkdir(parents=True, exist_ok=True)
        spec = scenes_like(self.recipe.data_spec, n=self.pool * DRAWN, seed=seed + 1)
        options = BuildOptions(spec, frames=self.recipe.data.frames or 6, queries=("spatial",), seed=seed)
        build_dialogues(options, shared / "dialogues.jsonl")
        records = self._pool(shared)
        self.say(f"temporal perplexity of {len(records)} dialogues …")
        found = temporal_perplexity(self.start, records, absent="grey", seed=seed)
        lines = [json.dumps({"id": each.id, "tpl": each.tpl, "tokens": each.tokens}) + "\n" for each in found]
        write_atomically(path, "".join(lines))

    def run(self, job: Job) -> Mapping[str, Measured]:
        if not job.arm.group:
            return {name: self._measure_start(self.sets[name]) for name in job.sets}
        records = self._pool(job.shared)
        rows = [json.loads(line) for line in (job.shared / "tpl.jsonl").read_text(encoding="utf-8").splitlines()]
        tpl = {row["id"]: row["tpl"] for row in rows}
        chosen = half_of(records, [tpl[record.id] for record in records], job.arm.name)
        policy = train_job(self.recipe, job, chosen)
        return {name: measure(policy, self.sets[name], LONGEST, {"": overlap}, samples=1) for name in job.sets}

    def findings(self, out: Path) -> Mapping[str, Any]:
        start = next(path for path in (out / "start").rglob("done.json")).parent
        scores = read_cell(start).sets[REPORTED].scores
        found = {}
        for name, key in (("greedy IoU before training", "greedy"), ("frames that explain the answer", "explaining")):
            value, low, high = spearman_interval(scores["tpl"], scores[key])
            found[f"rank correlation of TPL and {name}"] = {"value": value, "low": low, "high": high}
        return found

    def _pool(self, shared: Path) -> list[Record]:
        """The first ``pool`` dialogues about clips that move."""
        records = load_data(f"utr:{shared / 'dialogues.jsonl'}")
        return [record for record in records if moves(record)][: self.pool]

    def _measure_start(self, records: Sequence[Record]) -> Measured:
        found = measure(self.start, records, LONGEST, {"": overlap}, samples=1)
        scored = temporal_perplexity(self.start, records, absent="grey", curve=True)
        extra = {"tpl": [each.tpl for each in scored], "explaining": [explaining(each) for each in scored]}
        return found._replace(scores={**found.scores, **extra})


def moves(record: Record) -> bool:
    """Whether each of a record's true tracks has ``MOVES`` or more different boxes."""
    return all(len({tuple(b) for b in track["boxes"].values()}) >= MOVES for track in record.target["tracks"])


def overlap(answers: Sequence[str], records: Sequence[Record]) -> Sequence[float]:
    """The trajectory IoU of each answer."""
    return trajectory_ious(records, answers)


def explaining(found: TemporalPerplexity) -> float:
    """Number of frames that explain the answer by themselves."""
    return float(len(found.explaining()))


def half_of(records: Sequence[Record], tpl: Sequence[float], which: str) -> list[Record]:
    """Half of the records, in their order, taken within those whose truth has equally many actions.

    ``top`` and ``bottom``: of the highest and lowest TPL; ``random``: every other record (their order is random).
    Together, top and bottom are all records; where their number is odd the middle one is in both.
    """
    groups: dict[int, list[int]] = {}
    for number, record in enumerate(records):
        groups.setdefault(sum(len(track["spans"]) for track in record.target["tracks"]), []).append(number)
    chosen: list[int] = []
    for members in groups.values():
        count = -(-len(members) // 2)
        ranked = sorted(members, key=lambda i: (-tpl[i], i))
        chosen += {"top": ranked[:count], "bottom": ranked[-count:], "random": members[::2]}[which]
    return [records[i] for i in sorted(chosen)]
