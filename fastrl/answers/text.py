"""Text clean-up shared by several tasks: special tokens, answer tags, Markdown fences, white space.

Everything here runs in linear time on any text: plain ``find`` calls and patterns without backtracking.
"""

from __future__ import annotations

import re

_SPECIAL = re.compile(r"<\|[A-Za-z0-9_]{1,40}+\|>")
_FENCE_OPEN = re.compile(r"```[A-Za-z0-9_+-]{0,20}+[ \t]*+\r?+\n?+")


def strip_special_tokens(text: str) -> str:
    """Remove every ``<|name|>`` token (turn markers, box and reference tokens) and keep the text between them."""
    return _SPECIAL.sub("", text)


def collapse_whitespace(text: str) -> str:
    """Each run of white space becomes one blank; none at the ends."""
    return " ".join(text.split())


def answer_region(text: str) -> str:
    """The part of a reply that is the answer: after a closing ``</think>``, inside ``<answer>`` tags where present.

    An ``<answer>`` that is never closed (a reply cut short) reaches to the end.
    """
    end_of_thought = text.rfind("</think>")
    if end_of_thought >= 0:
        text = text[end_of_thought + len("</think>") :]
    start = text.find("<answer>")
    if start >= 0:
        start += len("<answer>")
        end = text.find("</answer>", start)
        text = text[start:] if end < 0 else text[start:end]
    return text


def strip_fence(text: str) -> str:
    """The inside of the first Markdown code fence, or the text itself where there is none."""
    opening = _FENCE_OPEN.search(text)
    if opening is None:
        return text
    end = text.find("```", opening.end())
    return text[opening.end() :] if end < 0 else text[opening.end() : end]


def plain_answer(text: str) -> str:
    """A reply as plain text: its answer region without special tokens or a fence around the whole, ends stripped."""
    plain = strip_special_tokens(answer_region(text)).strip()
    if plain.startswith("```"):
        plain = strip_fence(plain).strip()
    return plain
