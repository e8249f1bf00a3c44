"""The small world: shapes and words on a picture, with exact truth.

A scene is data (kinds, colours, integer boxes) from which ``render`` draws the picture, so boxes are exact to the
pixel. Boxes are ``(x1, y1, x2, y2)`` in pixels, upper edges exclusive. A partly covered shape keeps its whole box.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from fastrl.data.truth import short

KINDS = ("circle", "square", "triangle", "diamond", "star", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (150, 60, 180),
    "orange": (240, 140, 30),
    "cyan": (40, 190, 200),
    "black": (30, 30, 30),
}
SIZES = ("small", "large")
BACKGROUNDS = ((250, 250, 250), (225, 225, 230), (235, 228, 212), (210, 224, 212))
WORDS = [
    "apple",
    "bird",
    "boat",
    "book",
    "cake",
    "chair",
    "cloud",
    "coin",
    "door",
    "fish",
    "flag",
    "fork",
    "gate",
    "gold",
    "hand",
    "hat",
    "home",
    "horse",
    "iron",
    "jam",
    "key",
    "kite",
    "lamp",
    "leaf",
    "lion",
    "milk",
    "moon",
    "nest",
    "note",
    "ocean",
    "park",
    "pear",
    "pine",
    "rain",
    "ring",
    "road",
    "rose",
    "sail",
    "salt",
    "seed",
    "ship",
    "snow",
    "sofa",
    "star",
    "stone",
    "sun",
    "tree",
    "wall",
    "wave",
    "wind",
    "wolf",
    "zebra",
]

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Shape:
    """A coloured shape; ``box`` is exact to the pixel."""

    kind: str
    color: str
    size: str
    box: Box

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class Word:
    """A rendered word in a font of ``font`` pixels; ``box`` is the extent of its ink."""

    text: str
    box: Box
    font: int = 17


@dataclass(frozen=True)
class Scene:
    """A picture as data. Later shapes are drawn over earlier ones, words over shapes."""

    width: int
    height: int
    background: tuple[int, int, int]
    shapes: tuple[Shape, ...]
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class Difficulty:
    """The parameters of a difficulty level. Sizes are pixels on a 112-pixel picture and scale with it."""

    shapes: tuple[int, int]
    kinds: int
    small: tuple[int, int]
    large: tuple[int, int]
    overlap: float  # largest fraction of the smaller box that another may cover


LEVELS = {
    1: Difficulty((1, 2), 3, (20, 26), (38, 50), 0.0),
    2: Difficulty((2, 3), 4, (16, 24), (34, 46), 0.0),
    3: Difficulty((3, 5), 6, (14, 22), (30, 42), 0.1),
    4: Difficulty((4, 7), 6, (12, 20), (26, 38), 0.3),
}


def sample_scene(
    rng: random.Random, difficulty: int = 2, size: int = 112, words: int = 0, font: int = 17, snap: int = 1
) -> Scene:
    """Draw a scene. ``difficulty`` 1 to 4 (``LEVELS``), ``size``: side in pixels. Raises ``ValueError``.

    ``words`` is the number of words, ``font`` their height in pixels on a 112-pixel picture, and ``snap`` the grid in
    pixels of their corners, as in print.
    """
    if difficulty not in LEVELS:
        raise ValueError(f"difficulty: expected one of {sorted(LEVELS)}, got {short(difficulty)}")
    if not 56 <= size <= 4096:
        raise ValueError(f"size: expected 56 to 4096 pixels, got {size}")
    level, scale = LEVELS[difficulty], size / 112
    placed: list[Box] = []
    texts = [
        w for w in (_place_word(rng, size, round(font * scale), snap, placed) for _ in range(words)) if w is not None
    ]
    shapes: list[Shape] = []
    for _ in range(rng.randint(*level.shapes)):
        shape = _place_shape(rng, level, size, scale, placed)
        if shape is not None:
            shapes.append(shape)
    return Scene(size, size, rng.choice(BACKGROUNDS), tuple(shapes), tuple(texts))


def _place_shape(rng: random.Random, level: Difficulty, size: int, scale: float, placed: list[Box]) -> Shape | None:
    kind, color, label = rng.choice(KINDS[: level.kinds]), rng.choice(list(COLORS)), rng.choice(SIZES)
    low, high = level.small if label == "small" else level.large
    side = max(6, round(rng.randint(low, high) * scale))
    for _ in range(40):
        box = _random_box(rng, side, side, size)
        if all(covered(box, other) <= level.overlap for other in placed):
            placed.append(box)
            return Shape(kind, color, label, box)
    return None  # no room left: a scene may have fewer shapes than requested


def _place_word(rng: random.Random, size: int, font: int, snap: int, placed: list[Box]) -> Word | None:
    text = rng.choice(WORDS)
    left, top, right, bottom = _font(max(9, font)).getbbox(text)
    width, height = int(right - left), int(bottom - top)
    if width >= size - 4:
        return None
    for _ in range(40):
        box = _random_box(rng, width, height, size, snap)
        if all(covered(box, other) == 0 for other in placed):
            placed.append(box)
            return Word(text, box, max(9, font))
    return None


def _random_box(rng: random.Random, width: int, height: int, size: int, snap: int = 1) -> Box:
    x, y = rng.randint(1, size - width - 1), rng.randint(1, size - height - 1)
    x, y = max(1, x // snap * snap), max(1, y // snap * snap)
    return x, y, x + width, y + height


def covered(a: Box, b: Box) -> float:
    """Fraction of the smaller of two boxes that the other covers."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def render(scene: Scene) -> Image.Image:
    """Draw the scene. RGB, ``scene.width`` × ``scene.height``."""
    image = Image.new("RGB", (scene.width, scene.height), scene.background)
    draw = ImageDraw.Draw(image)
    for shape in scene.shapes:
        draw_shape(draw, shape.kind, COLORS[shape.color], shape.box)
    for word in scene.words:
        font = _font(word.font)
        left, top, _, _ = font.getbbox(word.text)
        draw.text((word.box[0] - left, word.box[1] - top), word.text, fill=(20, 20, 20), font=font)
    return image


def draw_shape(draw: ImageDraw.ImageDraw, kind: str, color: tuple[int, int, int], box: Box) -> None:
    """Draw one shape so that its ink spans ``box`` exactly. Raises ``ValueError`` for an unknown kind."""
    x1, y1, x2, y2 = box[0], box[1], box[2] - 1, box[3] - 1  # PIL's corners are inclusive
    w, h = x2 - x1, y2 - y1
    if kind == "circle":
        draw.ellipse((x1, y1, x2, y2), fill=color)
    elif kind == "square":
        draw.rectangle((x1, y1, x2, y2), fill=color)
    elif kind == "cross":
        draw.rectangle((x1 + round(w * 0.35), y1, x2 - round(w * 0.35), y2), fill=color)
        draw.rectangle((x1, y1 + round(h * 0.35), x2, y2 - round(h * 0.35)), fill=color)
    else:
        points = _POLYGONS.get(kind)
        if points is None:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {short(kind)}")
        draw.polygon([(x1 + round(u * w), y1 + round(v * h)) for u, v in points], fill=color)


_POLYGONS: dict[str, tuple[tuple[float, float], ...]] = {
    "triangle": ((0.5, 0.0), (1.0, 1.0), (0.0, 1.0)),
    "diamond": ((0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)),
    "star": (
        (0.5, 0.0), (0.64, 0.36), (1.0, 0.38), (0.71, 0.61), (0.82, 1.0),
        (0.5, 0.78), (0.18, 1.0), (0.29, 0.61), (0.0, 0.38), (0.36, 0.36),
    ),
}  # fmt: skip
