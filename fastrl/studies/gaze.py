"""Does attention come to lie on what is said (RePer §4.4)? Attention inside the boxes of the things a caption names.

The paper counts attention on the image as a whole and shows its places as pictures. Scenes have exact boxes, so that
two measures of places can be computed for each turn of reflection, before and after training:

- *share*: the part of the attention on the image that lies inside the boxes of the things the caption names;
- *saliency* (normalised scanpath saliency): the map of attention with mean 0 and standard deviation 1, averaged over
  those boxes.

A caption that names nothing that is there is measured on the boxes of everything that is. Maps have a cell for each
image token (4 × 4 of a picture of 112 pixels); a cell counts by the part of it that the boxes cover.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.build.reper import BuildOptions, build_dialogues
from fastrl.critics import RuleCritic
from fastrl.data import load_data
from fastrl.data.scenes import tasks
from fastrl.data.scenes.world import sample_scene
from fastrl.evaluate.caption import evaluate_caption
from fastrl.evaluate.reflect import Reflection, reflect, spoken
from fastrl.models.attention.readout import read_attention
from fastrl.recipe import load_recipe
from fastrl.run.setup import load_model
from fastrl.studies.base import CHOOSING, REPORTED, About, Arm, Job, Measured, Say, Study
from fastrl.studies.training import changed, train_job
from fastrl.toy.demos.evidence import Compared, change
from fastrl.toy.demos.scenes import HELD_OUT_SEED, REPORTED_SEED

if TYPE_CHECKING:
    from pathlib import Path

    from fastrl.data.records import Record
    from fastrl.models.load import Policy

RECIPE, DIFFICULTY = "reper-caption-tiny", 2
TURNS, LONGEST = 3, 64
PICTURES, QUICK_PICTURES, QUICK_STEPS = 1024, 256, 48
HELD_OUT, QUICK_HELD_OUT = 256, 96
MIN_BEST = 0.9
RATES = (1e-3, 2e-3, 4e-3)
TRAINED = "RePer"
FILE = "dialogues.jsonl"
GAINED = f"{TRAINED} − start"
KINDS = {"share": "attention inside named boxes", "saliency": "saliency of named boxes", "mass": "attention on image"}
CLAIMED = ("saliency", "mass")


class Experiment(Study):
    """Where the answers of each turn look, before and after RePer."""

    about = About(
        name="gaze",
        question="does attention come to lie on the things that are said?",
        paper="RePer (arXiv:2504.07165), §4.4 (attention by turn, figure)",
        design="captions of scenes in three turns of reflection; the share of image attention inside the exact boxes "
        "of the named things, and its normalised scanpath saliency, by turn, before and after RePer",
        expected="saliency and attention on the image rise with every turn, and more so after training",
        minutes=10,
        quick_minutes=5,
    )
    rates = RATES

    def __init__(self, *, quick: bool = False, say: Say = lambda text: None) -> None:
        super().__init__(quick=quick, say=say)
        self.recipe = load_recipe(RECIPE, {"optim.steps": QUICK_STEPS} if quick else {})
        self.pictures = QUICK_PICTURES if quick else PICTURES
        self.held_out = QUICK_HELD_OUT if quick else HELD_OUT

    @property
    def measures(self) -> Mapping[str, str]:  # type: ignore[override]
        turns = range(1, TURNS + 1)
        scores = {f"score {turn}": f"score, turn {turn}" for turn in reversed(turns)}
        areas = {f"area {turn}": f"named boxes' part of the picture, turn {turn}" for turn in turns}
        return {**scores, **{f"{k} {turn}": f"{KINDS[k]}, turn {turn}" for k in KINDS for turn in turns}, **areas}

    def arms(self) -> Sequence[Arm]:
        return [Arm("start"), Arm(TRAINED, TRAINED)]

    def differences(self) -> Mapping[str, tuple[str, str]]:
        return {GAINED: (TRAINED, "start")}

    def comparisons(self) -> Sequence[Compared]:
        found = []
        for kind, title in KINDS.items():
            found += [change(f"{title}, turn {t}: after − before", f"{kind} {t}", "start", TRAINED) for t in (1, 2, 3)]
            for arm in ("start", TRAINED):
                found += [
                    Compared(f"{arm}: {title}, turn {b} − {a}", (arm, f"{kind} {a}"), (arm, f"{kind} {b}"))
                    for a, b in pairwise(range(1, TURNS + 1))
                ]
        shares = [
            Compared(f"{arm}: share − part of the picture, turn {t}", (arm, f"area {t}"), (arm, f"share {t}"))
            for arm in ("start", TRAINED)
            for t in (1, 2, 3)
        ]
        more = [Compared(more_so(k), (GAINED, f"{k} 1"), (GAINED, f"{k} {TURNS}")) for k in CLAIMED]
        return [*found, *shares, *more, change("score of turn 3: after − before", "score 3", "start", TRAINED)]

    def claims(self) -> Mapping[str, str]:
        # Not on the share, which grows with the area of what is named
        pairs = list(pairwise(range(1, TURNS + 1)))
        turns = [f"{TRAINED}: {KINDS[kind]}, turn {b} − {a}" for kind in CLAIMED for a, b in pairs]
        trained = [f"{KINDS['saliency']}, turn {turn}: after − before" for turn in range(1, TURNS + 1)]
        return dict.fromkeys([*turns, *trained, *(more_so(kind) for kind in CLAIMED)], "rises")

    def settings(self) -> Mapping[str, Any]:
        sizes = {"pictures": self.pictures, "steps": self.recipe.optim.steps, "held_out": self.held_out}
        return {**sizes, "rates": RATES}

    def begin(self) -> None:
        seeds = {CHOOSING: HELD_OUT_SEED, REPORTED: REPORTED_SEED}
        self.sets = {name: pictures(self.held_out, seed) for name, seed in seeds.items()}
        self.start = load_model(self.recipe)

    def prepare_training(self, seed: int, shared: Path) -> None:
        shared.mkdir(parents=True, exist_ok=True)
        spec = f"scenes:caption?n={self.pictures}&seed={seed + 1}&difficulty={DIFFICULTY}"
        path = self.recipe.model.path
        options = BuildOptions(path, spec, "rule", min_best=MIN_BEST, max_new_tokens=LONGEST, seed=seed)
        build_dialogues(options, shared / FILE, policy=self.start, critic=RuleCritic(), records=load_data(spec))

    def run(self, job: Job) -> Mapping[str, Measured]:
        policy = self.start
        if job.arm.group:
            policy = train_job(changed(self.recipe, {"data.spec": f"reflection:{job.shared / FILE}"}), job)
        return {name: measured(policy, self.sets[name]) for name in job.sets}


def more_so(kind: str) -> str:
    """The comparison of how much a measure changes over all turns, after training less before."""
    return f"{KINDS[kind]}, turn {TURNS} − 1: after − before"


def pictures(count: int, seed: int) -> list[Record]:
    """Caption records of scenes whose target also has ``names`` (colour and kind) and ``boxes`` of all shapes."""
    found: list[Record] = []
    number = 0
    while len(found) < count:
        rng = random.Random(f"gaze/{seed}/{number}")
        scene = sample_scene(rng, DIFFICULTY)
        record = tasks.caption_record(rng, scene, f"gaze-{seed}-{number}", DIFFICULTY)
        number += 1
        if record is not None:
            shapes = {"names": [s.name for s in scene.shapes], "boxes": [s.box for s in scene.shapes]}
            found.append(replace(record, target={**record.target, **shapes}))
    return found


def measured(policy: Policy, records: Sequence[Record]) -> Measured:
    """Scores and looks of each turn of greedy reflection with plain requests."""
    found = reflect(policy, RuleCritic(), records, turns=TURNS, max_new_tokens=LONGEST, portion=128)
    rows = [_looks(policy, each) for each in found]
    return Measured([record.id for record in records], {key: [row[key] for row in rows] for key in rows[0]})


def _looks(policy: Policy, reflection: Reflection) -> dict[str, float]:
    """The measures of one picture's dialogue."""
    record, row = reflection.record, {}
    read = read_attention(policy, spoken(reflection))
    for number, (turn, seen) in enumerate(zip(reflection.turns, read, strict=True), start=1):
        size = record.images[0].size  # type: ignore[union-attr]
        cover = covered(named_boxes(record, turn.answer), size, seen.maps[0].shape)
        row[f"score {number}"] = evaluate_caption([record], [turn.answer])["score"]
        row[f"share {number}"] = share(seen.maps[0], cover)
        row[f"saliency {number}"] = saliency(seen.maps[0], cover)
        row[f"mass {number}"] = seen.mass
        row[f"area {number}"] = float(cover.mean())
    return row


def named_boxes(record: Record, answer: str) -> list[Sequence[int]]:
    """Boxes of the shapes whose colour and kind an answer names; of all shapes, if it names none of them."""
    pairs = list(zip(record.target["names"], record.target["boxes"], strict=True))
    return [box for name, box in pairs if name in answer.lower()] or [box for _, box in pairs]


def covered(boxes: Sequence[Sequence[int]], size: tuple[int, int], cells: Sequence[int]) -> Tensor:
    """[rows, columns] float32, the part of each cell of a picture of ``size`` (width, height) that boxes cover."""
    width, height = size
    mask = torch.zeros(height, width)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = 1.0
    return torch.nn.functional.adaptive_avg_pool2d(mask[None], (cells[0], cells[1]))[0]


def share(attention: Tensor, cover: Tensor) -> float:
    """The part of a map's attention that lies in the covered cells, in [0, 1]."""
    return float((attention * cover).sum() / attention.sum())


def saliency(attention: Tensor, cover: Tensor) -> float:
    """Normalised scanpath saliency: the standardised map, averaged over the covered cells; 0 for a flat map."""
    spread = float(attention.std(correction=0))
    if spread == 0:
        return 0.0
    return float(((attention - attention.mean()) / spread * cover).sum() / cover.sum())
