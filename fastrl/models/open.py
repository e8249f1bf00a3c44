"""Resolving the model that ``--model`` or ``model.path`` names, the same for every command.

The small models that ship with fastrl (``tiny:perception``, …) are in ``fastrl/toy/weights``. ``fastrl tiny build``
builds each of them again from nothing, in the stages of ``fastrl/toy/teach/stages.py``. ``perception`` answers about
boxes in pictures of 112 pixels and never saw those of 84 that the demos show it; ``language`` reads and captions,
``video`` and the narrower ``video-narrow`` follow shapes through six frames of 84 pixels, ``llava`` is a LLaVA-1.5
(CLIP tower, Llama) that was taught all of it at 84 pixels. ``docs/tiny.md`` has what each scores.
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
