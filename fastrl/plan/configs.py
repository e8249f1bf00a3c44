"""Model configs of a Hugging Face folder (only ``config.json`` is needed), a shipped model, or a published one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastrl.models.families import Family, family_of, published
from fastrl.models.open import resolve_model


def config_of(path: str) -> dict[str, Any]:
    """A model's config as plain values.

    Args:
        path: a folder with a ``config.json``, ``tiny:NAME``, or the name of a published model (downloaded or not).

    Raises:
        FileNotFoundError: there is neither such a folder nor a published model of that name.
        ValueError: the model type is not supported.
    """
    file, known = _folder(path) / "config.json", published()
    if file.is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
    elif str(path) in known:
        values = dict(known[str(path)])
    else:
        raise FileNotFoundError(
            f"no config for model {path!r}: give a folder with its config.json (--model DIR), or one of "
            f"{', '.join(known)}"
        )
    family_of(values, path)
    return values


def image_limit(path: str, family: Family) -> int | None:
    """Largest image area in pixels that the folder's preprocessor allows; None if there is no such setting."""
    return family.image_limit(_folder(path))


def _folder(path: str | Path) -> Path:
    """The model's folder, or ``path`` itself for a published name without a folder."""
    try:
        return resolve_model(path)
    except FileNotFoundError:
        return Path(path)


def is_published(path: str | Path) -> bool:
    """Whether :func:`config_of` uses a family's published config of that name, because there is no folder."""
    return str(path) in published() and not (_folder(path) / "config.json").is_file()
