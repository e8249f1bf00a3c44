"""How each shipped model is made: stages of teaching, each of which begins with the weights of another or from nothing.

A build of the same tree on the same machine gives the same bytes; ``docs/tiny.md`` says what another machine gives.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastrl.data.files import write_atomically
from fastrl.models.families.llava import Llava
from fastrl.rewards.base import unknown
from fastrl.toy.teach.architectures import WIDTH
from fastrl.toy.teach.build import build

NARROW = 64


@dataclass(frozen=True)
class Stage:
    """One run of :func:`fastrl.toy.teach.build.build`, with its arguments; ``start`` names another stage."""

    kind: str
    start: str | None = None
    steps: int = 1500
    rows: int = 16
    lr: float = 3e-3
    seed: int = 0
    retokenize: bool = False
    width: int = WIDTH


# The last stage of a shipped model has its name. "perception-1" begins with a model that names kinds and colours:
# without them it learns where shapes are, but not to tell them apart. "video-1" begins with one that finds shapes.
STAGES: Mapping[str, Stage] = {
    "language-1": Stage("language"),
    "language-2": Stage("language", "language-1"),
    "language": Stage("dialogues", "language-2", steps=300, lr=1e-3),
    "perception-1": Stage("perception", "language-1", steps=400, lr=1.5e-3),
    "perception": Stage("perception", "perception-1"),
    "video-1": Stage("video", "perception-1", steps=800, rows=8, retokenize=True),
    "video": Stage("video", "video-1", steps=400, rows=8, lr=1.5e-3),
    "llava-1": Stage("llava-pictures"),
    Llava.model_type: Stage(Llava.model_type, "llava-1", steps=600, rows=8),
    "language-narrow": Stage("language", width=NARROW),
    "perception-narrow": Stage("perception", "language-narrow", steps=400, lr=1.5e-3, width=NARROW),
    "video-narrow": Stage("video", "perception-narrow", steps=800, rows=8, retokenize=True, width=NARROW),
}
SHIPPED = ("language", Llava.model_type, "perception", "video", "video-narrow")


def stages_of(name: str) -> dict[str, Stage]:
    """The stages of the shipped model ``name`` in their order; the last has its name. Raises ``ValueError``."""
    if name not in SHIPPED:
        raise ValueError(unknown("shipped model", name, SHIPPED))
    found, at = {}, name
    while at is not None:
        found[at] = STAGES[at]
        at = STAGES[at].start
    return dict(reversed(found.items()))


def build_shipped(name: str, out: Path, log: Callable[[str], None] = print) -> Path:
    """Build the shipped model ``name`` from nothing, every stage in a folder of ``out``, and return its folder.

    A stage that ``out`` has from an earlier call, built in the same way from the same bytes, is not built again: an
    interrupted build continues, and models share the stages that they begin with. Raises ``ValueError`` for a name
    that is not shipped.
    """
    began: Path | None = None
    for number, (stage_name, stage) in enumerate(stages := stages_of(name).items(), start=1):
        folder, mark = out / stage_name, out / f"{stage_name}.json"
        how = asdict(stage) | {"from": None if began is None else digest(began)}
        title = f"stage {number} of {len(stages)}, {stage_name}"
        if _built(folder, mark, how):
            log(f"{title}: built before, in {folder}")
        else:
            log(f"{title}: {stage.steps} steps of {stage.kind} …")
            mark.unlink(missing_ok=True)
            options: dict[str, Any] = {k: v for k, v in asdict(stage).items() if k not in ("kind", "start")}
            build(stage.kind, folder, start=began, log=log, **options)
            write_atomically(mark, json.dumps({"how": how, "sha256": digest(folder)}, indent=1) + "\n")
        began = folder
    assert began is not None
    return began


def digest(folder: Path) -> str:
    """SHA-256 of a model's weights, in hexadecimal."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def _built(folder: Path, mark: Path, how: Mapping[str, Any]) -> bool:
    """Whether ``folder`` has the finished weights of a stage that was built like this."""
    if not mark.is_file() or not (folder / "model.safetensors").is_file():
        return False
    return json.loads(mark.read_text(encoding="utf-8")) == {"how": how, "sha256": digest(folder)}
