"""Does temporal perplexity tell good training data (Video-UTR §3.2)? Halves of one pool of dialogues, by their TPL.

All dialogues are the same task (a spatial query about one moving shape, answered by its trajectory) about clips of the
same number of frames. The halves are taken within dialogues of equally many actions, so that their answers are equally
long. TPL is measured by the starting model, with grey pictures in place of the frames that are not shown.

Built dialogues are all right; what the paper filters is collected data. So the same is done once more with a pool in
which a third of the dialogues tell how the subject of another clip moves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.build.utr import BuildOptions, build_dialogues
from fastrl.data import load_data
from fastrl.data.files import write_atomically
from fastrl.evaluate.intervals import paired_interval, spearman_interval
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
POOLS = {"right": "", "wrong": ", a third wrong"}  # pool -> end of the names of its halves
WRONG = 3  # one dialogue in so many is, in the second pool
POOL, QUICK_POOL, HELD_OUT, LONGEST = 512, 256, 256, 160
DRAWN = 2  # clips drawn for each that is measured; those that do not move are left out
MOVES = 3  # different boxes of a clip that moves
RATES = (2.5e-4, 5e-4, 1e-3)


class Experiment(Study):
    """The same training on the half with the highest TPL, the lowest, and a random one; of two pools."""

    about = About(
        name="temporal",
        question="does temporal perplexity tell which dialogues are worth training on?",
        paper="Video-UTR (arXiv:2502.12081), temporal perplexity (eq. 6)",
        design="a pool of UTR dialogues of the same task and length about moving clips, and one with a third of wrong "
        "answers; the half with the highest TPL, the lowest, a random one; trajectory IoU on 256 unseen moving clips; "
        "rank correlations of TPL",
        expected="top at least random, random above bottom; TPL falls with the number of frames that explain an answer",
        minutes=20,
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
        return [
            Arm("start"),
            *(
                Arm(half + end, "UTR", {"half": half, "pool": pool}, quick=pool == "right")
                for pool, end in POOLS.items()
                for half in HALVES
            ),
        ]

    def comparisons(self) -> Sequence[Compared]:
        pairs = (("start", "random"), ("random", "top"), ("bottom", "random"), ("bottom", "top"))
        return [
            change(f"{after} − {before}{of_pool}{end}", how, named(before, of_pool), named(after, of_pool))
            for how, end in (("sampled", ""), ("greedy", ", greedy"))
            for of_pool in POOLS.values()
            for before, after in pairs
        ]

    def claims(self) -> Mapping[str, str]:
        claims = {"top − random": "does not fall", "random − bottom": "rises", "top − bottom": "rises"}
        wrong = POOLS["wrong"]
        return {**claims, f"top − random{wrong}": "rises", f"top − bottom{wrong}": "rises"}

    def settings(self) -> Mapping[str, Any]:
        return {"pool": self.pool, "steps": self.recipe.optim.steps, "held_out": HELD_OUT, "rates": RATES}

    def begin(self) -> None:
        drawn = scene_sets(self.recipe.data_spec, HELD_OUT * DRAWN)
        self.sets = {name: [r for r in records if moves(r)][:HELD_OUT] for name, records in drawn.items()}
        self.start = load_model(self.recipe)

    def prepare(self, seed: int, shared: Path) -> None:
        if not (shared / tpl_file("right")).exists():
            shared.mkdir(parents=True, exist_ok=True)
            spec = scenes_like(self.recipe.data_spec, n=self.pool * DRAWN, seed=seed + 1)
            options = BuildOptions(spec, frames=self.recipe.data.frames or 6, queries=("spatial",), seed=seed)
            build_dialogues(options, shared / "dialogues.jsonl")
        for pool in ("right",) if self.quick else POOLS:
            path = shared / tpl_file(pool)
            if path.exists():
                continue
            records = self._pool(shared, pool)
            self.say(f"temporal perplexity of {len(records)} dialogues …")
            found = temporal_perplexity(self.start, records, absent="grey", seed=seed)
            lines = [json.dumps({"id": each.id, "tpl": each.tpl, "tokens": each.tokens}) for each in found]
            write_atomically(path, "".join(f"{line}\n" for line in lines))

    def run(self, job: Job) -> Mapping[str, Measured]:
        if not job.arm.group:
            return {name: self._measure_start(self.sets[name]) for name in job.sets}
        chosen = self._half(job.shared, job.arm.options["pool"], job.arm.options["half"])
        policy = train_job(self.recipe, job, chosen)
        return {name: measure(policy, self.sets[name], LONGEST, {"": overlap}, samples=1) for name in job.sets}

    def findings(self, out: Path) -> Mapping[str, Any]:
        start = next(path for path in (out / "start").rglob("done.json")).parent
        scores = read_cell(start).sets[REPORTED].scores
        found = {}
        for name, key in (("greedy IoU before training", "greedy"), ("frames that explain the answer", "explaining")):
            value, low, high = spearman_interval(scores["tpl"], scores[key])
            found[f"rank correlation of TPL and {name}"] = {"value": value, "low": low, "high": high}
        seeds = [path.parent for path in sorted(out.glob(f"seed-*/{tpl_file('wrong')}"))]
        kept = [float("wrong" in record.target) for shared in seeds for record in self._half(shared, "wrong", "top")]
        if kept:
            value, low, high = paired_interval([0.0] * len(kept), kept)
            found["part of the half of highest TPL that is wrong, of a third"] = {
                "value": value,
                "low": low,
                "high": high,
            }
        return found

    def _pool(self, shared: Path, pool: str) -> list[Record]:
        """The first ``pool`` dialogues about clips that move, as they are or a third of them with wrong answers."""
        records = load_data(f"utr:{shared / 'dialogues.jsonl'}")
        found = [record for record in records if moves(record)][: self.pool]
        return with_wrong(found) if pool == "wrong" else found

    def _half(self, shared: Path, pool: str, half: str) -> list[Record]:
        records = self._pool(shared, pool)
        lines = (shared / tpl_file(pool)).read_text(encoding="utf-8").splitlines()
        tpl = {row["id"]: row["tpl"] for row in map(json.loads, lines)}
        return half_of(records, [tpl[record.id] for record in records], half)

    def _measure_start(self, records: Sequence[Record]) -> Measured:
        found = measure(self.start, records, LONGEST, {"": overlap}, samples=1)
        scored = temporal_perplexity(self.start, records, absent="grey", curve=True)
        extra = {"tpl": [each.tpl for each in scored], "explaining": [explaining(each) for each in scored]}
        return found._replace(scores={**found.scores, **extra})


def named(half: str, of_pool: str) -> str:
    """The arm of a half of a pool; all pools have one start."""
    return half if half == "start" else half + of_pool


def tpl_file(pool: str) -> str:
    """Of the TPL of a pool's dialogues, in a seed's folder."""
    return "tpl.jsonl" if pool == "right" else f"tpl-{pool}.jsonl"


def with_wrong(records: Sequence[Record]) -> list[Record]:
    """The records, one in ``WRONG`` of those with equally many actions with the movement of the next such one.

    Its ``target`` has ``wrong``, and names its own subject. A group with a single such record keeps it as it is.
    """
    found = list(records)
    for members in by_actions(records).values():
        chosen = members[1::WRONG]
        for place, other in zip(chosen, chosen[1:] + chosen[:1], strict=True):
            if place != other:
                found[place] = moved_as(records[place], records[other])
    return found


def moved_as(record: Record, other: Record) -> Record:
    """The record with the other one's movement in its answer."""
    (own,), (theirs,) = record.target["tracks"], other.target["tracks"]
    answer = other.target["answer"].replace(theirs["name"], own["name"], 1)
    track = {**own, "boxes": theirs["boxes"], "spans": theirs["spans"]}
    return replace(record, target={**record.target, "tracks": [track], "answer": answer, "wrong": True})


def by_actions(records: Sequence[Record]) -> dict[int, list[int]]:
    """Number of actions in a truth → the places of such records."""
    groups: dict[int, list[int]] = {}
    for number, record in enumerate(records):
        groups.setdefault(sum(len(track["spans"]) for track in record.target["tracks"]), []).append(number)
    return groups


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
    chosen: list[int] = []
    for members in by_actions(records).values():
        count = -(-len(members) // 2)
        ranked = sorted(members, key=lambda i: (-tpl[i], i))
        chosen += {"top": ranked[:count], "bottom": ranked[-count:], "random": members[::2]}[which]
    return [records[i] for i in sorted(chosen)]
