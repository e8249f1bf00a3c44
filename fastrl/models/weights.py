"""Reading a model's weights: what the files lack is refused by name, never drawn at random."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SHOWN = 5  # names in one message


@contextmanager
def reading(folder: Path, what: str) -> Iterator[None]:
    """Inside: something of a model's folder is read. Whatever a library says about it gets the folder's name."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{folder}: its {what} cannot be read ({type(error).__name__}: {error})") from error


def read_weights(model: Any, folder: Path, *, dtype: torch.dtype) -> Any:
    """``model.from_pretrained(folder)`` of a transformers class, with every parameter from the folder's files.

    Warns of tensors in the files that the model has no place for; they are left out.

    Raises:
        ValueError: files that cannot be read, parameters that they lack, or hold in another shape.
    """
    try:
        with _silent():
            core, found = model.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:  # whatever a library says about a broken file, the message names the folder
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
    """Without transformers' own table of these things, nor its progress bar."""
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
