"""Format reward: 1 where an answer has exactly the form its model family writes, 0 otherwise (Perception-R1, Eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fastrl.answers import matches_format, matches_grounding_format
from fastrl.answers.text import thought_tags, without_end_of_turn
from fastrl.data.records import Record
from fastrl.rewards.reading import MAX_CHARACTERS

FormatCheck = Literal["strict", "loose", "thinking", "none"]
_THINK, _THOUGHT, _ANSWER, _END = "<think>", "</think>", "<answer>", "</answer>"  # of Perception-R1's thinking variant

# If the style is unknown: for each frame, the first family that used it.
_STYLES = {"resized": ("qwen2_5",), "thousand": ("qwen2",), "padded_unit": ("llava1_5",)}


def well_formed(task: str, answer: str, frame: str, check: FormatCheck = "strict", style: str = "") -> bool:
    """Whether ``answer`` is written in ``style``, or without one, in the style of a model that answers in ``frame``.

    ``resized`` asks for Qwen2.5-VL's JSON list, ``thousand`` for Qwen2-VL's box tokens, ``padded_unit`` for LLaVA-1.5's
    lists; any other frame takes either of the first two. ``loose`` replicates the released code's unescaped pattern
    (for grounding only): nearly any text starting with ``<`` passes. ``thinking`` asks for
    ``<think>…</think><answer>…</answer>`` with such an answer inside (Perception-R1's ablation). A text longer than is
    read for coordinates is not well formed.
    """
    if check == "loose":
        return matches_grounding_format(answer, loose=True)
    if len(answer) > MAX_CHARACTERS:
        return False
    if check == "thinking":
        inner = thought_out(answer)
        return inner is not None and well_formed(task, inner, frame, "strict", style)
    styles = (style,) if style else _STYLES.get(frame, ("qwen2_5", "qwen2"))
    return any(matches_format(task, answer, name) for name in styles)


def thought_out(answer: str) -> str | None:
    """What stands between the answer tags of ``<think>…</think><answer>…</answer>``; None for any other form.

    White space around the parts is allowed; a thought holds at least one sign and no other such tag.
    """
    head, closed, rest = without_end_of_turn(answer.strip()).strip().partition(_THOUGHT)
    rest = rest.strip()
    thought = head.removeprefix(_THINK)
    if not closed or thought == head or not thought.strip() or thought_tags(thought) or _ANSWER in thought:
        return None
    if not (rest.startswith(_ANSWER) and rest.endswith(_END)):
        return None
    inner = rest[len(_ANSWER) : -len(_END)]
    return None if _ANSWER in inner or _END in inner else inner.strip()


def without_format(check: FormatCheck) -> dict[str, str]:
    """``Reward.absent`` of an option ``format``: ``none`` leaves the component out."""
    return {"format": "format='none'"} if check == "none" else {}


def format_scores(
    task: str, answers: Sequence[str], records: Sequence[Record], frame: str | None, check: FormatCheck, style: str = ""
) -> list[float]:
    """:func:`well_formed` as 1.0 or 0.0 per answer; ``frame`` and ``style`` override the records' own."""
    pairs = zip(answers, records, strict=True)
    return [float(well_formed(task, a, frame or r.frame, check, style or _style(r, frame))) for a, r in pairs]


def _style(record: Record, frame: str | None) -> str:
    """The record's style, unless its frame is overridden: then the frame says what is asked for."""
    return record.style if frame is None or frame == record.frame else ""
