"""What all parsers share: a text with a position that only moves forward, numbers, and characters that mean the same.

Answers are untrusted, so parsing has to be linear in their length. Every look at the text goes through ``Scanner``,
which counts the characters it looks at: tests assert that the count grows with the text and not with its square. The
patterns keep to two rules that make the count true: they are possessive, and an attempt that fails has looked at no
more than a bounded number of characters beside the blanks behind it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

MAX_LABEL = 1000  # characters

# Longer digit runs match nothing, which rejects them: no real coordinate needs them.
NUMBER = r"[-+]?+(?:[0-9]{1,24}+(?:\.[0-9]{0,40}+)?+|\.[0-9]{1,40}+)(?:[eE][-+]?+[0-9]{1,6}+)?+"
_NUMBER = re.compile(NUMBER)
GAP = r"\s*+,\s*+"
FOUR = GAP.join([f"({NUMBER})"] * 4)
REST = r"\s*+,?+\s*+"  # a comma may stand behind the last one

# Written by models that answer in Chinese, Japanese, Arabic or Persian; each stands for one ASCII character, so places
# stay the same.
_WIDE = str.maketrans(
    "：，、；［］【】（）｛｝＝．－＋−％０１２３４５６７８９،؛٪٠١٢٣٤٥٦٧٨٩۰۱۲۳۴۵۶۷۸۹",
    ":,,;[][](){}=.-+-%0123456789,;%01234567890123456789",
)


class Scanner:
    """A text and the place up to which it is read.

    ``text`` is as written (labels are taken from it), ``plain`` the same with full-width punctuation and digits as
    ASCII (structure is read from it). ``visited`` counts characters looked at.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.plain = text if text.isascii() else text.translate(_WIDE)
        self.position = 0
        self.visited = 0

    def at(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """Match a pattern that matches anywhere (maybe nothing) at the position, and move behind it."""
        match = pattern.match(self.plain, self.position)
        assert match is not None
        self.visited += match.end() - self.position + 1
        self.position = match.end()
        return match

    def seek(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """The next match from the position on, and move behind it; None, at the end of the text: there is none."""
        match = pattern.search(self.plain, self.position)
        end = len(self.plain) if match is None else match.end()
        self.visited += end - self.position + 1
        self.position = end
        return match

    def each(self, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
        """All matches from the position on."""
        while (match := self.seek(pattern)) is not None:
            yield match


def number(text: str) -> float | None:
    """A finite number, as a coordinate may be written; None for anything else."""
    text = text.strip()
    if len(text) > 80 or _NUMBER.fullmatch(text) is None:
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def finite(raw: Sequence[str | None]) -> tuple[float, ...] | None:
    """The numbers of a match's groups; None if one of them is no finite number."""
    values = [number(v) for v in raw if v is not None]
    return None if None in values else tuple(v for v in values if v is not None)


def numbers(text: str) -> tuple[float, ...] | None:
    """Numbers between commas (or semicolons, or blanks), one more behind them allowed; None if one of them is none."""
    text = text.strip()
    between = next((mark for mark in ",;" if mark in text), None)
    parts = text.split() if between is None else text.removesuffix(between).split(between)
    values = [number(part) for part in parts]
    return None if None in values else tuple(value for value in values if value is not None)


def clean_label(label: str) -> str | None:
    """Printable, bounded, stripped. Lone surrogates (which no file or terminal can take) become question marks."""
    label = label[:MAX_LABEL].encode("utf-8", "replace").decode("utf-8").strip()
    return label or None
