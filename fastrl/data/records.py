"""``Record``: one row of data, whatever file format it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastrl.answers import View


@dataclass(frozen=True)
class Record:
    """One prompt with its truth.

    ``messages`` are chat messages whose content is a list of ``{"type": "image"}`` (taken in order from ``images``) and
    ``{"type": "text", "text": ...}`` parts. ``target`` holds the truth in **pixels of the original image**; its keys by task:

    - grounding: ``box`` (x1, y1, x2, y2), ``expression``
    - counting: ``label``, ``count``, ``points`` [(x, y), ...] or None, ``boxes`` or None
    - detection: ``boxes`` [[x1, y1, x2, y2], ...], ``labels`` [str, ...], ``crowd`` [bool, ...], ``categories`` [str, ...]
    - ocr: ``text``
    - caption: ``references`` [str, ...], and where known ``objects``, ``attributes``, ``relations``
    - trajectory: ``tracks``
    - qa: ``choices`` and ``answer``
    """

    id: str
    task: str
    images: tuple[Path | Image, ...]
    messages: tuple[Mapping[str, Any], ...]
    target: Mapping[str, Any]
    source: str = ""  # "file:line", for messages about this row
    views: tuple[View, ...] = field(default=())  # original and resized size of each image, once a processor is known
    frame: str = "auto"  # what a model's coordinates mean: auto | resized | thousand | original | unit
