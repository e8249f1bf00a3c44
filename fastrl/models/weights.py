"""Reading a model's weights: missing ones are an error that names them, never initialised at random."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

SHOWN = 5  # names in one message


@contextmanager
def reading(folder: Path, what: str) -> Iterator[None]:
    """Turn any library's error while reading a model's folder into a ``ValueError`` that names the folder."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{folder}: its {what} cannot be read ({type(error).__name__}: {error})") from error


def read_weights(model: Any, folder: Path, *, dtype: torch.dtype, device: Literal["cpu", "meta"] | None = None) -> Any:
    """``model.from_pretrained(folder)`` of a transformers class, with every parameter from the folder's files.

    Tensors in the files that the model does not have are ignored with a warning. On ``device`` "meta" only names and
    shapes are read.

    Raises:
        ValueError: a file cannot be read, or a parameter is missing from the files or has another shape there.
    """
    try:
        with _silent():
            core, found = model.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                device_map=device,
            )
    except Exception as error:  # libraries raise many types for a broken file; the message must name the folder
        raise ValueError(f"{folder}: its weights cannot be read ({type(error).__name__}: {error})") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{folder}: its weights lack {len(missing)} of the model's: {_listed(missing)}")
    if other := sorted(found["mismatched_keys"]):
        shapes = [f"{name} (file {list(there)}, config {list(here)})" for name, there, here in other]
        raise ValueError(f"{folder}: its weights do not have the shapes its config.json says: {_listed(shapes)}")
    if unexpected := sorted(found["unexpected_keys"]):
        warnings.warn(
            f"{folder}: {len(unexpected)} of its weights have no place in the model, left out: {_listed(unexpected)}",
            stacklevel=2,
        )
    return core


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}"


@contextmanager
def _silent() -> Iterator[None]:
    """Turn off transformers' own report of missing and unexpected weights, and its progress bar."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
