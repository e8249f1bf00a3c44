"""The small models that ship with fastrl (``tiny:perception``, …); ``build.py`` is the script that made them.

``perception`` is the ``language`` model of its day (which names kinds and colours) taught 400 steps further by ``fastrl
tiny build perception --from LANGUAGE --steps 400 --lr 1.5e-3``: greedy mean IoU 0.78 and counting score 0.82 on scenes
of difficulty 2 and the 112 pixels it was taught with, 0.38 and 0.65 on pictures of 84 pixels, which it never saw.
``video`` follows shapes through six frames of 84 pixels (``docs/utr.md``).
"""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


def resolve(path: str) -> Path:
    """Folder of a model given as a folder or as ``tiny:NAME``. Raises ``ValueError`` for a name that is not shipped."""
    prefix, _, name = path.partition(":")
    if prefix != "tiny":
        return Path(path)
    shipped = sorted(p.name for p in WEIGHTS.iterdir() if p.is_dir()) if WEIGHTS.is_dir() else []
    if name not in shipped:
        raise ValueError(f"no shipped model {path!r}; shipped: {', '.join(f'tiny:{n}' for n in shipped) or 'none'}")
    return WEIGHTS / name
