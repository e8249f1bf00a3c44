"""Makes untrusted text (answers, questions, names) safe for a page: escaped, valid and bounded."""

from __future__ import annotations

import html
import unicodedata

LONGEST = 2000  # characters of one text
ISOLATES, EMBEDDINGS = "\u2066\u2067\u2068", "\u202a\u202b\u202d\u202e"
END_ISOLATE, END_EMBEDDING = "\u2069", "\u202c"


def shown(value: object, limit: int = LONGEST) -> str:
    """HTML of a text in a ``bdi`` element, which limits the effect of directional marks."""
    return f"<bdi>{html.escape(plain(value, limit))}</bdi>"


def attribute(value: object, limit: int = 200) -> str:
    """The same for an attribute's value, between isolating marks."""
    return html.escape(f"\u2068{plain(value, limit)}{END_ISOLATE}")


def label(value: object, limit: int = 60) -> str:
    """The same for a figure, where dollar signs would begin a formula."""
    return plain(value, limit).replace("\n", " ").replace("$", r"\$")


def plain(value: object, limit: int) -> str:
    """A text cut to ``limit`` characters (then with its length), without invalid characters and with directional marks
    closed."""
    text = str(value)
    cut = closed("".join("\ufffd" if _odd(c) else c for c in text[:limit]))
    return cut if len(text) <= limit else f"{cut}… ({len(text):,} characters)"


def closed(text: str) -> str:
    """``text`` with every directional mark closed, and without unmatched closing marks."""
    out: list[str] = []
    begun: list[str] = []  # closing marks that are still needed
    for c in text:
        if c in ISOLATES or c in EMBEDDINGS:
            begun.append(END_ISOLATE if c in ISOLATES else END_EMBEDDING)
        elif c == END_ISOLATE:
            if c not in begun:
                continue
            while begun.pop() != c:  # also closes the embeddings inside
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
