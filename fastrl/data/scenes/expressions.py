"""Referring expressions for a scene, built as predicates, so that each is checked to match exactly one shape."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from fastrl.data.scenes.world import Scene, Shape

RELATIONS: dict[str, tuple[int, int]] = {  # phrase -> (axis, sign of subject minus anchor)
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (1, -1),
    "below": (1, 1),
}
SUPERLATIVES: dict[str, tuple[int, int]] = {
    "leftmost": (0, -1),
    "rightmost": (0, 1),
    "topmost": (1, -1),
    "lowest": (1, 1),
}
MARGIN = 0.06  # fraction of the picture's side by which positions must differ for a spatial word


def related(subject: Shape, phrase: str, anchor: Shape, side: int) -> bool:
    """Whether ``subject`` is clearly ``phrase`` ("left of", …) ``anchor``: centres apart by more than the margin."""
    axis, sign = RELATIONS[phrase]
    return sign * (subject.center[axis] - anchor.center[axis]) > MARGIN * side


def matching(scene: Scene, test: Callable[[Shape], bool]) -> list[Shape]:
    """The shapes of the scene that satisfy ``test``."""
    return [s for s in scene.shapes if test(s)]


def expressions(scene: Scene, target: Shape) -> dict[str, list[str]]:
    """Every expression that matches only ``target``, by type: attribute, superlative, relation."""
    return {
        "attribute": list(_attributes(scene, target)),
        "superlative": list(_superlatives(scene, target)),
        "relation": list(_relations(scene, target)),
    }


def pick_expression(rng: random.Random, scene: Scene, target: Shape, spatial: bool) -> str | None:
    """One unambiguous expression for ``target``, None if there is none; spatial ones half the time if allowed."""
    by_type = expressions(scene, target)
    plain = by_type["attribute"]
    spatial_ones = [e for kind in ("superlative", "relation") for e in by_type[kind][:6]] if spatial else []
    if spatial_ones and (not plain or rng.random() < 0.5):
        return rng.choice(spatial_ones)
    return rng.choice(plain) if plain else None


def _attributes(scene: Scene, target: Shape) -> Iterator[str]:
    if len(matching(scene, lambda s: s.kind == target.kind)) == 1:
        yield target.kind
    if len(matching(scene, lambda s: s.name == target.name)) == 1:
        yield target.name
    if len(matching(scene, lambda s: (s.size, s.name) == (target.size, target.name))) == 1:
        yield f"{target.size} {target.name}"


def _superlatives(scene: Scene, target: Shape) -> Iterator[str]:
    for noun, test in _nouns(target):
        rivals = [s for s in matching(scene, test) if s is not target]
        if not rivals:
            continue
        for word, (axis, sign) in SUPERLATIVES.items():
            lead = min(sign * (target.center[axis] - s.center[axis]) for s in rivals)
            if lead > MARGIN * scene.width:
                yield f"{word} {noun}"


def _relations(scene: Scene, target: Shape) -> Iterator[str]:
    for anchor in scene.shapes:
        if anchor is target or len(matching(scene, lambda s, a=anchor: s.name == a.name)) != 1:
            continue
        for noun, test in _nouns(target):
            for phrase in RELATIONS:
                meant = [
                    s for s in matching(scene, test) if s is not anchor and related(s, phrase, anchor, scene.width)
                ]
                near = [s for s in matching(scene, test) if s is not anchor and _nearly(s, phrase, anchor, scene.width)]
                if meant == [target] and near == [target]:
                    yield f"{noun} {phrase} the {anchor.name}"


def _nearly(subject: Shape, phrase: str, anchor: Shape, side: int) -> bool:
    axis, sign = RELATIONS[phrase]
    return sign * (subject.center[axis] - anchor.center[axis]) > -MARGIN * side


def _nouns(target: Shape) -> list[tuple[str, Callable[[Shape], bool]]]:
    return [
        (target.kind, lambda s: s.kind == target.kind),
        (f"{target.color} shape", lambda s: s.color == target.color),
        ("shape", lambda _: True),
    ]
