"""Text of unknown origin (answers, questions, names) made fit for a page: harmless, readable by any tool, bounded."""

from __future__ import annotations

import html
import unicodedata

LONGEST = 2000  # characters of one text
ISOLATES, EMBEDDINGS = "\u2066\u2067\u2068", "\u202a\u202b\u202d\u202e"
END_ISOLATE, END_EMBEDDING = "\u2069", "\u202c"


def shown(value: object, limit: int = LONGEST) -> str:
    """HTML of a text in a ``bdi`` element: whatever direction it sets ends with it."""
    return f"<bdi>{html.escape(plain(value, limit))}</bdi>"


def attribute(value: object, limit: int = 200) -> str:
    """The same for an attribute's value, between isolating marks."""
    return html.escape(f"\u2068{plain(value, limit)}{END_ISOLATE}")


def label(value: object, limit: int = 60) -> str:
    """The same for a figure, where dollar signs would begin a formula."""
    return plain(value, limit).replace("\n", " ").replace("$", r"\$")


def plain(value: object, limit: int) -> str:
    """A text cut to ``limit`` characters, and then with its length; without characters that no text has, directional
    marks closed."""
    text = str(value)
    cut = closed("".join("\ufffd" if _odd(c) else c for c in text[:limit]))
    return cut if len(text) <= limit else f"{cut}… ({len(text):,} characters)"


def closed(text: str) -> str:
    """``text`` with every directional mark in it ended in it, and without ends of what did not begin in it."""
    out: list[str] = []
    begun: list[str] = []  # the ends that are due
    for c in text:
        if c in ISOLATES or c in EMBEDDINGS:
            begun.append(END_ISOLATE if c in ISOLATES else END_EMBEDDING)
        elif c == END_ISOLATE:
            if c not in begun:
                continue
            while begun.pop() != c:  # ends the embeddings inside it, too
                pass
        elif c == END_EMBEDDING:
            if not begun or begun[-1] != c:
                continue
            begun.pop()
        out.append(c)
    return "".join(out) + "".join(reversed(begun))


def _odd(c: str) -> bool:
    """A lone surrogate, or a control character other than tab and line end."""
    return c not in "\t\n" and unicodedata.category(c) in ("Cs", "Cc")
