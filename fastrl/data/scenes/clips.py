"""Short clips of moving shapes, with identity, per-frame boxes and action spans as exact truth."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from fastrl.data.scenes.world import BACKGROUNDS, COLORS, KINDS, Box, draw_shape

MOTIONS: dict[str, tuple[int, int]] = {
    "moves left": (-1, 0),
    "moves right": (1, 0),
    "moves up": (0, -1),
    "moves down": (0, 1),
    "stays": (0, 0),
}


@dataclass(frozen=True)
class Span:
    """An action over frames ``first`` to ``last``, both included, counted from 0."""

    action: str
    first: int
    last: int


@dataclass(frozen=True)
class Mover:
    """One shape of a clip: a box per frame (pixels) and its actions."""

    kind: str
    color: str
    boxes: tuple[Box, ...]
    spans: tuple[Span, ...]

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class Clip:
    """A clip as data; ``seconds`` is the time of each frame."""

    width: int
    height: int
    background: tuple[int, int, int]
    movers: tuple[Mover, ...]
    seconds: tuple[float, ...]

    @property
    def frames(self) -> int:
        return len(self.seconds)


def sample_clip(
    rng: random.Random, frames: int = 6, difficulty: int = 2, size: int = 84, fps: float = 2.0, turns: bool = True
) -> Clip:
    """Draw a clip of ``difficulty`` (1 to 4) shapes with distinct names, each moving in one or two directions.

    With ``turns`` a shape may change its action half-way, so that no single frame determines its trajectory.
    """
    if frames < 1:
        raise ValueError(f"frames: at least 1, got {frames}")
    names = rng.sample([(k, c) for k in KINDS[:4] for c in COLORS], max(1, min(difficulty, 4)))
    movers = [_sample_mover(rng, kind, color, frames, size, turns) for kind, color in names]
    return Clip(size, size, rng.choice(BACKGROUNDS), tuple(movers), tuple(round(i / fps, 2) for i in range(frames)))


def _sample_mover(rng: random.Random, kind: str, color: str, frames: int, size: int, turns: bool) -> Mover:
    side = round(rng.randint(18, 28) * size / 84)
    step = max(2, round(rng.randint(6, 10) * size / 84))
    actions = [rng.choice(list(MOTIONS))]
    if turns and frames >= 4 and rng.random() < 0.6:
        actions.append(rng.choice([a for a in MOTIONS if a != actions[0]]))
    x, y = rng.randint(0, size - side), rng.randint(0, size - side)
    cut = frames // len(actions)
    boxes: list[Box] = []
    spans: list[Span] = []
    for frame in range(frames):
        action = actions[min(frame // max(cut, 1), len(actions) - 1)]
        if frame:
            dx, dy = MOTIONS[action]
            x = min(max(x + dx * step, 0), size - side)
            y = min(max(y + dy * step, 0), size - side)
        boxes.append((x, y, x + side, y + side))
        if spans and spans[-1].action == action:
            spans[-1] = Span(action, spans[-1].first, frame)
        else:
            spans.append(Span(action, frame, frame))
    return Mover(kind, color, tuple(boxes), tuple(spans))


def render_frame(clip: Clip, frame: int) -> Image.Image:
    """Draw one frame (counted from 0) of the clip. RGB."""
    image = Image.new("RGB", (clip.width, clip.height), clip.background)
    draw = ImageDraw.Draw(image)
    for mover in clip.movers:
        draw_shape(draw, mover.kind, COLORS[mover.color], mover.boxes[frame])
    return image
