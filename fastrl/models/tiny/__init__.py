"""The small models that ship with fastrl (``tiny:perception``, …); ``build.py`` is the script that made them."""

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
