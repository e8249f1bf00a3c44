"""How an evaluation matches the facts of captions: by rules, and softly as CAPTURE does unless that is turned off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastrl.captions import lists_facts
from fastrl.captions.embedding import AUTO, OFF, Soft, open_soft


def caption_soft(task: str, soft: str | None, *, free: bool) -> Soft:
    """Soft matching of an evaluation.

    Args:
        task: what is evaluated.
        soft: see :func:`fastrl.captions.embedding.open_soft`; None is ``none``.
        free: whether the truth of a record is reference captions (:func:`is_free`): otherwise ``auto`` has nothing
            to match, and no model is looked for.

    Raises:
        ValueError: a model is named for another task than captions, or cannot be loaded.
    """
    soft = OFF if soft is None else soft
    if task != "caption":
        if soft not in (AUTO, OFF):
            raise ValueError(f"--soft matches words of captions; {task} has none")
        return Soft()
    return Soft() if soft == AUTO and not free else open_soft(soft)


def is_free(task: str, target: Mapping[str, Any]) -> bool:
    """Whether a record is a caption whose truth is reference captions, in free words."""
    return task == "caption" and not lists_facts(target)
