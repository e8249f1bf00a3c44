"""Scenes: a seeded generator of pictures and clips with exact truth, for trying all methods on a CPU.

``scenes:grounding?n=256&seed=1&difficulty=2`` names a data set: task, number of records, seed, difficulty 1 to 4;
``size`` is the side of the pictures in pixels, ``frames`` the length of clips (``trajectory``: follow a named shape;
``utr``: a dialogue; ``shown``: the clip's content, which each single frame shows). Records are made on demand, and the
same spec gives the same records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import overload

from fastrl.data.clips import Clip
from fastrl.data.records import Record
from fastrl.data.scenes.tasks import CLIP_MAKERS, MAKERS, scene_clip, scene_record
from fastrl.data.scenes.world import LEVELS, Scene, Shape, Word, render, sample_scene
from fastrl.data.truth import short

__all__ = ["LEVELS", "MAKERS", "Scene", "Scenes", "Shape", "Word", "load", "render", "sample_scene", "scene_record"]

_DEFAULTS = {"n": 1024, "seed": 0, "difficulty": 2, "size": 112, "frames": 6}


class Scenes(Sequence[Record]):
    """``n`` records of one task, made on demand; ``skipped`` is always 0."""

    skipped = 0

    def __init__(self, task: str, n: int, seed: int, difficulty: int, size: int, frames: int) -> None:
        self.task, self.n, self.seed = task, n, seed
        self.options = {"difficulty": difficulty, "size": size, "frames": frames}
        if n:
            self[0]  # raises now, and not during a run, if task, difficulty or size are invalid

    def __len__(self) -> int:
        return self.n

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.n))]
        if not -self.n <= index < self.n:
            raise IndexError(index)
        return scene_record(self.task, index % self.n, self.seed, **self.options)

    def clip(self, index: int) -> Clip:
        """The clip of record ``index``, with all its shapes. Raises ``ValueError`` if the task has no clips."""
        return scene_clip(self.task, index, self.seed, **self.options)


def load(path: str, query: Mapping[str, str]) -> Scenes:
    """The data set ``scenes:PATH?QUERY``. Raises ``ValueError`` for an unknown task or key, or a non-integer value."""
    options = dict(_DEFAULTS)
    for key, value in query.items():
        if key not in options:
            allowed = ", ".join((*options, "prompt"))  # the latter is read before (``fastrl.data.prompts``)
            raise ValueError(f"scenes: unknown key {short(key)}; allowed: {allowed}")
        if key == "frames" and path in MAKERS and path not in CLIP_MAKERS:
            raise ValueError(f"scenes:{path} has pictures, not clips: no frames to choose")
        try:
            options[key] = int(value)
        except ValueError:
            raise ValueError(f"scenes: {key} must be an integer, got {short(value)}") from None
    if options["n"] < 0:
        raise ValueError(f"scenes: n must not be negative, got {options['n']}")
    return Scenes(path, **options)
