"""Text clean-up for several tasks: thoughts, answer tags, special tokens, Markdown fences, white space.

All functions take linear time for any text: they use ``find`` and patterns without backtracking.
"""

from __future__ import annotations

import re
import unicodedata

END_OF_TURN = ["<|im_end|>", "</s>", "<|endoftext|>", "<|user|>", "<eos>", "<end_of_turn>", "<end_of_utterance>"]
MAX_MARKS = 64  # combining marks in a row; no script has as many, and sorting them takes quadratic time

_SPECIAL = re.compile(r"<\|[A-Za-z0-9_]{1,40}+\|>")
_BOXED, _BOXED_END = "<|begin_of_box|>", "<|end_of_box|>"
_FENCE_OPEN = re.compile(r"(?P<fence>```++)[A-Za-z0-9_+-]{0,20}+[ \t]*+\r?+\n?+")
_THOUGHT = re.compile(  # a tag that lost its ">" is one too
    r"<\s{0,8}+\|?+\s{0,8}+(?P<end>/?+(?:end_of_)?+)\s{0,8}+(?:seed:|begin_of_)?+"
    r"(?:thinking|think|thoughts|thought_process|thought|reasoning|rationale|analysis|scratchpad)\b"
    r"(?:[^<>\n]{0,100}+>)?+|◁(?P<stop>/?+)think▷|\[(?P<close>/?+)think\]"
    r"|<\|?+channel\|?+>\s{0,8}+(?:(?P<final>final)|analysis|commentary|thought)\b|(?P<channel><channel\|>)"
    r"|<unused94>thought\b|(?P<unused><unused95>)",
    re.IGNORECASE,
)
_CLOSES = ("end", "stop", "close", "final", "channel", "unused")  # groups that are only in tags that end a thought
_ANSWER = re.compile(r"<\s{0,8}+answer\b(?:[^<>\n]{0,100}+>)?+", re.IGNORECASE)  # also without its ">"
_ANSWER_END = re.compile(r"<\s{0,8}+/\s{0,8}+answer\b(?:\s{0,8}+>)?+", re.IGNORECASE)
_ESCAPED = re.compile(r"[^{\"']*+[\"']?+[^{\"']*+\{(?:\\[nrt]|\s){0,100}+\\{1,3}+[\"']")
_ESCAPE = re.compile(r"\\([\"'nrt\\/])")
_MEANS = {"n": "\n", "r": "\r", "t": "\t"}


def strip_special_tokens(text: str) -> str:
    """Remove every ``<|name|>`` token (turn markers, box and reference tokens) and keep the text between them."""
    return _SPECIAL.sub("", text)


def without_end_of_turn(text: str) -> str:
    """The text without its end-of-turn token, if any."""
    end = next((token for token in END_OF_TURN if text.endswith(token)), "")
    return text.removesuffix(end)


def canonical(text: str) -> str:
    """The text in Unicode's composed form (NFC), in which canonically equal texts are equal.

    A text with more than ``MAX_MARKS`` combining marks in a row is returned unchanged.
    """
    if text.isascii():
        return text
    marks = 0
    for character in text:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks > MAX_MARKS:
            return text
    return unicodedata.normalize("NFC", text)


def collapse_whitespace(text: str) -> str:
    """Replace each run of white space by one blank; strip both ends."""
    return " ".join(text.split())


def thought_tags(text: str) -> list[str]:
    """The tags that open or close a thought, in order, in lower case."""
    return [match.group().lower() for match in _THOUGHT.finditer(text)]


def unfinished_thought(text: str) -> bool:
    """Whether a thought is opened and never closed, so that nothing after the tag is an answer."""
    return _without_thought(text)[1]


def _without_thought(text: str) -> tuple[str, bool]:
    """The text after the last closing tag and before an opening one, and whether there is such an opening one."""
    start, end, open_ = 0, len(text), False
    for match in _THOUGHT.finditer(text):
        if any(match[name] for name in _CLOSES):
            start, end, open_ = match.end(), len(text), False
        elif not open_ and not match.group().endswith("/>"):  # <think/> holds nothing
            end, open_ = match.start(), True
    return text[start:end], open_


def answer_region(text: str) -> str:
    """The part of a reply that is the answer: outside of thoughts, and inside ``<answer>`` tags if present.

    Tags count in any case. A thought (``<think>``, ``<thinking>``, ``<thought>``, ``<reasoning>``, …) ends at the last
    closing tag; one that is never closed reaches to the end, and nothing in it is an answer. An ``<answer>`` that is
    never closed (a reply cut short) reaches to the end too; one that was opened before a thought is open behind it.
    """
    text = _without_thought(text)[0]
    opening = _ANSWER.search(text)
    start = 0 if opening is None else opening.end()
    end = _ANSWER_END.search(text, start)
    return text[start:] if end is None else text[start : end.start()]


def unescaped(text: str) -> str:
    """JSON written as a string of JSON, ``[{\\"bbox_2d\\": …``, without its backslashes; any other text as it is."""
    for _ in range(2):
        if _ESCAPED.match(text) is None:
            break
        text = _ESCAPE.sub(lambda match: _MEANS.get(match[1], match[1]), text)
    return text


def strip_fence(text: str) -> str:
    """The contents of the first Markdown code fence, or the text itself if there is none."""
    opening = _FENCE_OPEN.search(text)
    if opening is None:
        return text
    end = text.find(opening["fence"], opening.end())
    return text[opening.end() :] if end < 0 else text[opening.end() : end]


def plain_answer(text: str) -> str:
    """A reply as plain text: its answer region without special tokens or a fence around the whole, ends stripped.

    If the region has GLM's ``<|begin_of_box|>…<|end_of_box|>``, the answer is the text between them.
    """
    region = answer_region(text)
    start = region.rfind(_BOXED)
    if start >= 0:
        region = region[start + len(_BOXED) :].partition(_BOXED_END)[0]
    plain = without_end_of_turn(strip_special_tokens(region).strip()).strip()
    if plain.startswith("```"):
        plain = strip_fence(plain).strip()
    return plain
