"""Scores of the shipped small models on scenes that nothing was trained or chosen on, and of models built like them.

``python -m benchmarks.tiny`` measures ``tiny:…`` into ``results/tiny.json``; ``--variant NAME TITLE FOLDER`` measures
the same model built otherwise (other threads, another seed) beside it. The tolerance is what these differ by, with a
margin: it says where a build on another machine, whose rounding differs, is expected to land.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.data import load_data
from fastrl.models.open import open_policy, resolve_model
from fastrl.toy.demos import perception_r1, reper, utr
from fastrl.toy.demos.scenes import REPORTED_SEED
from fastrl.toy.teach.stages import SHIPPED, digest

if TYPE_CHECKING:
    from fastrl.models.load import Policy

RESULTS = Path(__file__).parent / "results" / "tiny.json"
SCENES, FEW = 128, 32  # of each measure; of the check that the shipped models still score what is written here
LENGTHS = {"grounding": 64, "counting": 128, "detection": 192, "ocr": 48}  # tokens of the longest answer
LEAST, MARGIN = 0.05, 2.0  # the tolerance: never less, and this many times the largest difference that was seen
ASSUMED = 0.1  # the tolerance of a model of which no variant was built

Scores = Mapping[str, float]
Measure = Callable[["Policy", int], Scores]


def scenes(task: str, size: int) -> Measure:
    """Greedy answers to one question about each picture of ``size`` pixels, by every measure of the demo; detection's
    AP as well."""

    def measure(policy: Policy, n: int) -> Scores:
        records = load_data(f"scenes:{task}?n={n}&seed={REPORTED_SEED}&difficulty=2&size={size}")
        found = perception_r1.measure(policy, records, task, LENGTHS[task], samples=1)
        keys = {name: key for key, (how, name) in perception_r1.keys_of(task).items() if how == "greedy"}
        means = {f"{task} {name}, {size} px": found.mean(key) for name, key in keys.items()}
        means |= {f"detection AP, {size} px": found.ap}
        return {name: value for name, value in means.items() if value is not None}

    return measure


def captions(size: int) -> Measure:
    """Greedy captions in three turns of reflection, the score of each."""

    def measure(policy: Policy, n: int) -> Scores:
        records = load_data(f"scenes:caption?n={n}&seed={REPORTED_SEED}&difficulty=2&size={size}")
        turns, _ = reper.measure(policy, records)
        return {f"caption score, turn {number}": turn["score"] for number, turn in enumerate(turns, start=1)}

    return measure


def clips(frames: int) -> Measure:
    """The whole trajectory of the one shape in a clip, greedily; temporal perplexity of the truth, in nats a token."""

    def measure(policy: Policy, n: int) -> Scores:
        records = load_data(f"scenes:utr?n={n}&seed={REPORTED_SEED}&difficulty=1&size=84&frames={frames}")
        found = utr.measure(policy, records)
        names = {"trajectory IoU": found.greedy["mean_iou"], "temporal perplexity": found.tpl}
        return {f"{name}, {frames} frames": value for name, value in names.items()}

    return measure


MEASURES: Mapping[str, Sequence[Measure]] = {
    "language": (captions(112), scenes("ocr", 112), scenes("grounding", 112)),
    "llava": (captions(84), scenes("grounding", 84), clips(6)),
    "perception": tuple(scenes(task, size) for task in ("grounding", "counting", "detection") for size in (112, 84)),
    "video": (clips(6), clips(8)),
    "video-narrow": (clips(6), clips(8)),
}


def scores_of(name: str, folder: Path | str, n: int = SCENES) -> dict[str, float]:
    """Every measure of the model in ``folder``, which was built like the shipped model ``name``."""
    policy = open_policy(folder, device="cpu")
    return {key: value for measure in MEASURES[name] for key, value in measure(policy, n).items()}


def tolerances(shipped: Scores, variants: Mapping[str, Scores]) -> dict[str, float]:
    """How far from the shipped score another build may lie, by measure; see the module."""
    if not variants:
        return dict.fromkeys(shipped, ASSUMED)
    seen = {key: max(abs(found[key] - value) for found in variants.values()) for key, value in shipped.items()}
    return {key: round(max(LEAST, MARGIN * difference), 3) for key, difference in seen.items()}


def table(models: Mapping[str, Any]) -> str:
    """The results as a Markdown table; the column of variants has their scores in order."""
    lines = ["| model | measure | score | ± | built otherwise |", "|---|---|--:|--:|---|"]
    for name, found in models.items():
        for key, value in found["scores"].items():
            others = ", ".join(f"{scores[key]:.3f}" for scores in found["variants"].values()) or "–"
            lines.append(f"| `tiny:{name}` | {key} | {value:.3f} | {found['tolerance'][key]:.3f} | {others} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure the chosen models, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SHIPPED, default=SHIPPED, metavar="NAME", help="shipped models")
    parser.add_argument(
        *("--variant", "-v"), nargs=3, action="append", default=[], metavar=("NAME", "TITLE", "FOLDER"), dest="variants"
    )
    parser.add_argument("--scenes", type=int, default=SCENES, metavar="N", help="[128]")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="[benchmarks/results/tiny.json]")
    args = parser.parse_args(argv)
    from benchmarks.run import environment  # what results depend on, besides the weights

    before = json.loads(args.json.read_text(encoding="utf-8"))["models"] if args.json.is_file() else {}
    models: dict[str, Any] = dict(before)
    for name in args.only:
        folder = resolve_model(f"tiny:{name}")
        shipped = scores_of(name, folder, args.scenes)
        titles = {title: where for model, title, where in args.variants if model == name}
        variants = {title: scores_of(name, where, args.scenes) for title, where in titles.items()}
        models[name] = {
            "sha256": digest(folder),
            "scores": shipped,
            "few": scores_of(name, folder, FEW),
            "variants": variants,
            "tolerance": tolerances(shipped, variants),
        }
    args.json.write_text(json.dumps(environment() | {"scenes": args.scenes, "models": models}, indent=1) + "\n")
    print(table(models))
    return 0


if __name__ == "__main__":
    sys.exit(main())
