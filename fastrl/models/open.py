"""Resolving the model that ``--model`` or ``model.path`` names, the same for every command.

The small models that ship with fastrl (``tiny:perception``, …) are in ``fastrl/toy/weights``; ``fastrl tiny build``
made them. ``perception`` is an earlier ``language`` model (which names kinds and colours) trained 400 steps further
with ``fastrl tiny build perception --from LANGUAGE --steps 400 --lr 1.5e-3``. It reaches a greedy mean IoU of 0.78 and
a counting score of 0.82 on scenes of difficulty 2 at the 112 pixels it was trained with, and 0.38 and 0.65 on pictures
of 84 pixels, which it never saw. ``video`` follows shapes through six frames of 84 pixels (``docs/utr.md``). ``llava``
is a LLaVA-1.5 (CLIP tower of 84 pixels, Llama) that was taught grounding, captions, dialogues and clips in two stages,
``fastrl tiny build llava-pictures --out A`` and ``fastrl tiny build llava --from A --steps 600 --rows 8``.
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
        ValueError: no model of that ``tiny:`` name is shipped.
        FileNotFoundError: there is neither such a folder nor a downloaded snapshot of that name.
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
