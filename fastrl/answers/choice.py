"""Model text → a choice: one of several options, or yes or no. Never raises; linear time; bounded input."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastrl.answers.text import canonical, plain_answer

MAX_READ = 4096  # characters read of an answer (without the thought before it), and of each option
MAX_TEXT = 1 << 21  # characters of a reply in which the answer is searched
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_LEAD = re.compile(r"\(?([A-Za-z])(?:[).:,]++(?:\s|$)|$)")
_EITHER = re.compile(r"\(?[A-Za-z]\)?[.]?\s*+(?:or|and|/|,)\s*+\(?[A-Za-z]\)?(?![A-Za-z'’])")
_SAID = re.compile(
    r"\b(?:answer|option|choice)(?:\s+(?:is|would be|should be|must be))?\s*+:?\s*+(?:option\s+)?"
    r"\(?([A-Za-z])\)?(?![A-Za-z0-9'’])",
    re.IGNORECASE,
)
_PAREN = re.compile(r"\(([A-Za-z])\)")
_TRAILING = re.compile(r"(?:^|[\s:])([B-Z])[.)]?$")
_NUMBER = re.compile(r"\(?([0-9]{1,3})[).:]?")
_WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"[.!?\n]")

_YES = frozenset({"yes", "yeah", "yep", "yup", "true", "correct", "affirmative"})
_NO = frozenset({"no", "nope", "false", "incorrect", "negative"})
_NEGATIONS = frozenset({"no", "not", "none", "nope", "neither", "nor", "never", "without", "cannot", "nothing"})
_UNSURE = frozenset(
    {"sure", "unsure", "unclear", "uncertain", "maybe", "perhaps", "possibly", "determine", "tell", "know"}
)
_STATEMENT = re.compile(r"(?:there(?:'s| is| are| appears?| seems?)|it (?:is|does|has)|i (?:can )?see)\b")


def parse_choice(text: str, choices: Sequence[str]) -> int | None:
    """The index (from 0) of the option that an answer names, or None if there is none or it is ambiguous.

    Tried in this order, each only if it matches exactly one option: a letter at the start (``B``, ``(b)``, ``B. look
    down``); only the text of an option; only a number (the option's index from 0, as in data sets); ``the answer is
    B``; a letter in parentheses; a letter at the end; the text of an option inside the answer, as whole words (the
    longest, if one option contains another).
    """
    plain = _plain(text)
    limit = min(len(choices), len(LETTERS))
    if _EITHER.match(plain):  # "A or B"
        return None
    lead = _LEAD.match(plain)
    if lead is not None and (index := _index(lead.group(1), limit)) is not None:
        return index
    options = [_words(choice[:MAX_READ]) for choice in choices]
    answer_words = _words(plain)
    same = [n for n, option in enumerate(options) if option and option == answer_words]
    if len(same) == 1:
        return same[0]
    number = _NUMBER.fullmatch(plain)
    if number is not None:
        return int(number.group(1)) if int(number.group(1)) < len(choices) else None
    for pattern in (_SAID, _PAREN, _TRAILING):
        named = {_index(match.group(1), limit) for match in pattern.finditer(plain)} - {None}
        if len(named) == 1:
            return named.pop()
    padded = f" {answer_words} "
    inside = [n for n, option in enumerate(options) if option and f" {option} " in padded]
    longest = [n for n in inside if not any(n != m and f" {options[n]} " in f" {options[m]} " for m in inside)]
    return longest[0] if len(longest) == 1 else None


def parse_yes_no(text: str) -> bool | None:
    """Whether an answer means yes; None if it says neither, both, or that it does not know.

    Only its first sentence is read. A first word of yes or no decides; otherwise a negation anywhere means no (as in
    POPE), and a yes anywhere or a statement that something is there means yes.
    """
    sentence = _SENTENCE_END.split(_plain(text), maxsplit=1)[0].lower().replace("’", "'")
    words = [word.strip("'") for word in re.findall(r"[a-z']+", sentence)]
    if not words:
        return None
    start, kinds = set(words[:3]), set(words)
    if start & _YES and start & _NO:  # "yes or no"
        return None
    if words[0] in _YES or words[0] in _NO:
        return words[0] in _YES
    if kinds & _UNSURE:
        return None
    if kinds & (_NEGATIONS | _NO) or any(word.endswith("n't") for word in words):
        return False
    if kinds & _YES or _STATEMENT.match(sentence.strip()):
        return True
    return None


def _plain(text: str) -> str:
    """The answer without tags, special tokens, a fence, emphasis and quotes around it."""
    plain = plain_answer(text[:MAX_TEXT])[:MAX_READ].replace("*", "")
    return plain.strip(" \t\r\n\"'`“”‘’_")


def _words(text: str) -> str:
    """Lower-case words without punctuation, separated by blanks."""
    return " ".join(_WORD.findall(canonical(text).casefold()))


def _index(letter: str, limit: int) -> int | None:
    found = LETTERS.find(letter.upper())
    return found if 0 <= found < limit else None
