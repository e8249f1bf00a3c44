"""Builds a JSONL file portion by portion, resumable with byte-identical results.

After each portion, whole lines are appended to the file and the summary next to it (``NAME.summary.json``) is replaced
atomically; it records the length of the file, so that a build that was interrupted in any way continues after its last
complete portion and produces the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastrl.data.disk import nothing_empty_left, writing
from fastrl.data.files import write_atomically

Tally = dict[str, Any]  # counts of the records so far, as JSON values


def build_portions(
    out: Path,
    options: Mapping[str, Any],
    portions: int,
    work: Callable[[int, Tally], list[str]],
    start: Tally,
    *,
    after: Callable[[int, Tally], None] = lambda portion, tally: None,
) -> Tally:
    """Build ``out``, or continue it.

    Args:
        out: the file.
        options: the build's options; a build is not continued with other options.
        portions: number of portions.
        work: returns the lines of a portion and updates the tally.
        start: the empty tally.
        after: called after each portion with its number and the tally.

    Returns:
        The tally at the end.

    Raises:
        ValueError: ``out`` exists and is not a build's, or one with other options, or its summary is damaged.
    """
    done, size, found = resume(out, options)
    tally = start if found is None else found
    if done >= portions:
        return tally
    with unfinished(out), out.open("r+b" if out.exists() else "w+b") as file:
        file.truncate(size)
        file.seek(size)
        for portion in range(done, portions):
            lines = work(portion, tally)
            data = "".join(lines).encode()
            with writing(out, len(data)):
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            state = {
                "done": portion + 1 == portions,
                "options": dict(options),
                "portions": portion + 1,
                "bytes": file.tell(),
                "tally": tally,
            }
            write_atomically(out.with_suffix(".summary.json"), json.dumps(state, indent=1) + "\n")
            after(portion, tally)
    return tally


@contextmanager
def unfinished(out: Path) -> Iterator[None]:
    """Remove the empty ``out`` and its new pictures if the block fails before the first portion is done. Creates the
    folder."""
    images = out.with_suffix(".images")
    images_new = not images.exists()
    with nothing_empty_left(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield
        except BaseException:
            if images_new and not out.with_suffix(".summary.json").exists():
                shutil.rmtree(images, ignore_errors=True)
            raise


def resume(out: Path, options: Mapping[str, Any]) -> tuple[int, int, Any]:
    """Number of completed portions of ``out``, their bytes in the file, and their tally (None: none completed).

    Raises:
        ValueError: ``out`` exists and is not a build's, or one with other options, or its summary is damaged.
    """
    state = out.with_suffix(".summary.json")
    if not state.is_file():
        if out.exists() and out.stat().st_size:
            raise ValueError(f"{out} exists and cannot be continued ({state.name} is missing); choose another --out")
        return 0, 0, None
    try:
        saved = json.loads(state.read_text(encoding="utf-8"))
        began, tally = dict(saved["options"]), dict(saved["tally"])
        portions, size = int(saved["portions"]), int(saved["bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{state}: not a build's summary ({type(error).__name__}: {error}); remove it and {out.name} to start again"
        ) from None
    changed = [f"{k}: was {began.get(k)!r}, is {options[k]!r}" for k in options if began.get(k) != options[k]]
    if changed:
        raise ValueError(f"{out} was started with other options ({'; '.join(changed)}); choose another --out")
    if not out.is_file() or out.stat().st_size < size:
        raise ValueError(f"{out} is shorter than recorded in {state.name}; remove both to start again")
    return portions, size, tally
