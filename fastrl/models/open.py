"""Where a model is: one answer for every command that takes ``--model`` or ``model.path``.

The small models that ship with fastrl (``tiny:perception``, …) lie in ``fastrl/toy/weights``; ``fastrl tiny build``
made them. ``perception`` is the ``language`` model of its day (which names kinds and colours) taught 400 steps further
by ``fastrl tiny build perception --from LANGUAGE --steps 400 --lr 1.5e-3``: greedy mean IoU 0.78 and counting score
0.82 on scenes of difficulty 2 and the 112 pixels it was taught with, 0.38 and 0.65 on pictures of 84 pixels, which it
never saw. ``video`` follows shapes through six frames of 84 pixels (``docs/utr.md``).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastrl.models.policy import Policy

WEIGHTS = Path(__file__).parent.parent / "toy" / "weights"


def resolve_model(path: str | Path) -> Path:
    """The folder of a model given as ``tiny:NAME``, as a folder, or as a downloaded hub name (``owner/name``).

    Nothing is downloaded.

    Raises:
        ValueError: a ``tiny:`` name that is not shipped.
        FileNotFoundError: no such folder and no downloaded snapshot of that name.
    """
    text = str(path)
    if text.startswith("tiny:"):
        return _shipped(text)
    folder = Path(path)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
        raise FileNotFoundError(f"model folder not found: {text}")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(text, local_files_only=True))
    except (ImportError, OSError, ValueError):
        raise FileNotFoundError(
            f"model folder not found: {text}, and no downloaded snapshot of that name; "
            f"get one with `hf download {text}`, or give a folder"
        ) from None


def open_policy(path: str | Path, **options: Any) -> Policy:
    """The policy that ``path`` names (see :func:`resolve_model`). ``options`` go to ``load_policy``."""
    from fastrl.models.load import load_policy

    return load_policy(resolve_model(path), **options)


def _shipped(path: str) -> Path:
    name = path.removeprefix("tiny:")
    shipped = sorted(p.name for p in WEIGHTS.iterdir() if p.is_dir()) if WEIGHTS.is_dir() else []
    if name not in shipped:
        raise ValueError(f"no shipped model {path!r}; shipped: {', '.join(f'tiny:{n}' for n in shipped) or 'none'}")
    return WEIGHTS / name
